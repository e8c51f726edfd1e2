"""Optional fast paths, switched on by `apply_kernels`."""
