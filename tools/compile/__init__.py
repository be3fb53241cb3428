"""The compiler lane: kernels compiled for GPUs that need not be there, and what came out."""
