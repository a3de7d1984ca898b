"""What lies on disk of runs and sweeps, written whole and without secrets; and what a run ran on."""
