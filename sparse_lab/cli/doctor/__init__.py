"""`sparse-lab doctor`: what is here, and what is missing for one command."""
