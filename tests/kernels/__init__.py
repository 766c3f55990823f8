"""The Triton kernels: on a GPU where there is one, in Triton's interpreter elsewhere (tests/conftest.py)."""
