"""Optional optimized kernels, enabled by `apply_kernels`."""
