"""How good a network is on images of any origin: what `sparse-lab evaluate` measures, writes and draws."""
