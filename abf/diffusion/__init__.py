"""Two-stream layout, corruptions and losses of block diffusion."""
