"""Optional fast paths; `apply_kernels` is the only entry."""
