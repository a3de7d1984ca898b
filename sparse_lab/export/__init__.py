"""From a finished run to a network that others can use."""
