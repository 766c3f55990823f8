"""Kernels in Triton, for pools in device memory. All modules but `tuning` import triton: whoever can do without a GPU
imports them only once there is one."""
