"""A GPU for Triton kernels on a machine that has none: see README.md."""
