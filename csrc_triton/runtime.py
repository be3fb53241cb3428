"""Where kernels can run, and the argument checks that all launchers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import knobs

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
    if first.device.type == "cpu" and not interpreting():
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


def architecture(device: torch.device) -> str:
    """`"sm_90"`, `"gfx942"`, ... of a device; `"interpreter"` for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
