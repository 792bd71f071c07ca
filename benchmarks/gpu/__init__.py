"""`make bench-gpu`: the kernels on an NVIDIA GPU, held against their peers in one run."""
