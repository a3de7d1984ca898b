"""The command, one file a verb; `main` reads which."""
