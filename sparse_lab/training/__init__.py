"""The training loop's own parts: the Lightning module, optimizers and learning rates, the clock, evaluation."""
