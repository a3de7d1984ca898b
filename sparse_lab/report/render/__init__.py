"""A report as Markdown, LaTeX and HTML; `sections` says what stands in it."""
