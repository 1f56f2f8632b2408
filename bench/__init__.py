"""Benchmarks: ``python -m bench SUITE`` measures this package beside its peers (see README.md)."""
