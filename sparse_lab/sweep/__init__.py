"""Many runs: planned as a whole, launched, counted."""
