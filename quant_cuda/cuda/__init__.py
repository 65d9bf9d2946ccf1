"""Matmul with packed weights and the solver's inner loops on NVIDIA GPUs: CUDA and Triton kernels.

It must not know checkpoints, models or the CPU code.
"""
