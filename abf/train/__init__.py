"""The training loop: optimiser, checkpoints, signals, ranks."""
