"""What changes masks while training goes, one algorithm a file."""
