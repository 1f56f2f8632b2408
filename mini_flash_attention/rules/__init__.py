"""What is computed: each rule of attention once, as `@triton.jit` helpers over tiles and scalars.

A rule never makes a tile and never names a schedule, so the same rule serves every kernel, and
where it only uses operators it also runs as plain Python through `.fn()`.
"""
