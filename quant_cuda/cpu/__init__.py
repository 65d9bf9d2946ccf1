"""Matmul with packed weights, the solver's inner loops and LLaMA decoding in compiled CPU code.

It must not know checkpoints, models or CUDA.
"""
