"""Triton kernels of w2vbert_fast and their launchers.

This package imports torch and triton only, knows tensors and never models, and touches no device
when imported. A kernel is a folder: tiles and warps in `config`, kernels with their launchers in
`forward` and `backward`; docs/inside/kernels.md says what each computes and how it is laid out.

A launcher takes packed tensors of fp32, fp16 or bf16. Its arguments, where its own docstring does
not name them, are those of the operation of its name in `w2vbert_fast.ops`; rows may have any
stride, the last dimension is contiguous. Results go to new tensors, or to `out`. It checks what it
is given:

* `ValueError`: an argument does not fit; the message names it, what came and what is needed;
* `RuntimeError`: the tensors are on a CPU and Triton's interpreter is off.
"""

from csrc_triton import attention, conv, ctc, fbank, gemm, norm

__all__ = ["attention", "conv", "ctc", "fbank", "gemm", "norm"]
