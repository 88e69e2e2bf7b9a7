"""Fast kernels in plain Numba, for any machine."""
