"""Parameters that lie end to end in one buffer, so that several products become one.

The parameters stay what they were to everybody else: the state dict has the same names, and an
optimiser or `load_state_dict` writes into the buffer through them. What is moved, converted, copied
or replaced lies elsewhere afterwards, which `ops.linear_stacked` sees for itself at each call;
nothing is remembered here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from w2vbert_fast.ops.linear import lie_end_to_end


def lay_end_to_end(parameters: Sequence[Tensor]) -> bool:
    """Give parameters of one shape a common buffer that each of them views a part of.

    Their values do not change, and their old memory is freed. Nothing happens to parameters that
    others hold the memory of: views of a larger buffer, shared memory, and everything in a
    distributed process, where FSDP and ZeRO refill the memory that they handed out.

    Args:
        parameters: of one shape, dtype and device.

    Returns:
        Whether they lie end to end now.
    """
    if any(type(parameter) is not nn.Parameter for parameter in parameters):
        return False
    if lie_end_to_end(parameters):
        return True
    if not _may_move(parameters):
        return False
    # Inference tensors could not be trained afterwards.
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, buffer.chunk(len(parameters)), strict=True):
            parameter.data = part
    return True


def _may_move(parameters: Sequence[Tensor]) -> bool:
    first = parameters[0]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    if first.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    # A parameter owns its memory, or is what is left of an arrangement made here.
    sizes = (first.nbytes, first.nbytes * len(parameters))
    return first.numel() > 0 and all(
        (parameter.shape, parameter.dtype, parameter.device)
        == (first.shape, first.dtype, first.device)
        and parameter.is_contiguous()
        and not parameter.is_inference()
        and not (parameter.device.type == "cpu" and parameter.untyped_storage().is_shared())
        and parameter.untyped_storage().nbytes() in sizes
        for parameter in parameters
    )
