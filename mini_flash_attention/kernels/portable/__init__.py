"""Triton kernels for prefill on every NVIDIA GPU from SM 80."""
