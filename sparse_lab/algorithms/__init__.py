"""What changes masks while training goes, one algorithm a file; each hangs on an optimizer by `attach`."""
