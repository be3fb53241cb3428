"""Triton kernels of w2vbert_fast and their launchers.

This package imports torch and triton only, knows tensors and never models, and touches no device
when imported. It holds no kernels yet: every operation runs its plain PyTorch form.
"""
