"""Numerical kernels. Each has a plain reference in tests/kernels to agree with."""
