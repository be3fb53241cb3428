"""The argument checks that all launchers share, and the number of blocks of a packed batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from triton import knobs

from csrc_triton.architectures import cpu_architecture

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (`TRITON_INTERPRET=1` before import)."""
    return bool(knobs.runtime.interpret)


def check_device(**tensors: Tensor | None) -> None:
    """All tensors on one device that Triton can run on.

    Raises:
        ValueError: two tensors lie on different devices.
        RuntimeError: the device is a CPU and Triton's interpreter is off.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device}; it must be on {first.device} like {first_name}"
            )
    if first.device.type == "cpu" and cpu_architecture() is None:
        raise RuntimeError(
            f"{first_name} is on the CPU, where Triton kernels run in its interpreter only; "
            "set TRITON_INTERPRET=1 before triton is imported, or move the tensors to a GPU"
        )


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
) -> None:
    """Shape, dtype and a contiguous last dimension.

    Args:
        name: the argument's name, for the message.
        tensor: the argument.
        shape: size of each dimension; `None` for any.
        dtypes: the dtypes that the kernel takes.

    Raises:
        ValueError: one of them does not fit; the message says what came and what is needed.
    """
    fits = tensor.dim() == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted_shape = tuple("any" if size is None else size for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {wanted_shape}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype}; it must be {names}")
    if tensor.dim() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; its last dimension must be contiguous"
        )


def check_rows(
    like: Mapping[str, Tensor | None], vectors: Mapping[str, Tensor], **others: Tensor | None
) -> None:
    """Tensors of one shape `[rows, width]` and dtype, vectors `[width]`, all on one device.

    Args:
        like: by name; the first one says shape and dtype, the others may be `None`.
        vectors: by name.
        others: must lie on that device too.
    """
    (name, x), *rest = like.items()
    assert x is not None
    check_tensor(name, x, (None, None))
    for other, tensor in rest:
        if tensor is not None:
            check_tensor(other, tensor, x.shape, (x.dtype,))
    for other, tensor in vectors.items():
        check_tensor(other, tensor, x.shape[1:])
    check_device(**like, **vectors, **others)


def check_offsets(cu_seqlens: Tensor, seqused_k: Tensor | None) -> None:
    """`cu_seqlens` is int32 `[batch + 1]`, and `seqused_k`, where it is given, int32 `[batch]`."""
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32,))
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens has no elements; it must have batch + 1")
    if seqused_k is not None:
        check_tensor("seqused_k", seqused_k, (cu_seqlens.numel() - 1,), (torch.int32,))


def num_blocks(num_rows: int, batch: int, block: int) -> int:
    """Number of blocks of `block` rows over a packed batch of `num_rows` rows."""
    return num_rows // block + batch
