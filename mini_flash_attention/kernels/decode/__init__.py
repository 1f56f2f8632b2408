"""Triton kernels for few queries and long caches: attention, how keys are split, the combine."""
