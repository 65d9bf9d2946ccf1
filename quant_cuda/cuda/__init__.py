"""Products and the solver's inner loops on NVIDIA GPUs (csrc/cuda, and Triton)."""
