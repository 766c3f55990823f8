"""Attention over block tables: the torch reference, the compiled kernels, and which of them serves a pool."""
