"""This package's functions inside other libraries; each module is imported by whoever wants it."""
