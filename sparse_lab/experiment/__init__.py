"""One run: composed, checked, built, trained, written down."""
