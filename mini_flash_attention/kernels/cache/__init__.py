"""Triton kernels that write the KV cache."""
