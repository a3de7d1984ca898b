"""The figures, one kind a file; `registry` says which belong to a report."""
