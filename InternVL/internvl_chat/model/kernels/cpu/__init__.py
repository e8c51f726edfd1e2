"""Optimized kernels for CPUs."""
