"""Projections of one input whose weights lie end to end in one buffer, as one product.

The parameters stay what they were to everybody else: the state dict has the same names, and an
optimiser or `load_state_dict` writes into the buffer through them. They are laid so when the
kernels are switched on and when the block is moved, converted or loaded, never by a forward pass,
beside which another stream may still read them where they were. What is replaced later lies
elsewhere, which `ops.linear_stacked` sees for itself at each call; nothing is remembered here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from w2vbert_fast import ops
from w2vbert_fast.models.layers import Wav2Vec2BertSelfAttention, is_untouched
from w2vbert_fast.models.optimized.opaque import swap
from w2vbert_fast.ops.dispatch import on_triton_device, records_gradient
from w2vbert_fast.ops.gemm import joined, lie_end_to_end

if TYPE_CHECKING:
    from typing_extensions import Self


class StackedSelfAttention(Wav2Vec2BertSelfAttention):
    """Self-attention whose projections of one input are one product on the Triton kernels.

    `use_fast_kernels` puts it in place of the class that it derives from. It does as that class
    wherever the projections are no plain linear layers, differ, or are trained in part.
    """

    def lay_weights(self) -> None:
        """Lay weights end to end, and biases, of the projections that are one product."""
        layers = [self.linear_q, self.linear_k]
        if self.position_embeddings_type != "rotary":
            layers.append(self.linear_v)
        lay_layers_end_to_end(layers)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.use_fast_kernels:
            self.lay_weights()
        return self

    def _project(self, x: Tensor, *layers: nn.Module) -> list[Tensor]:
        fast = self.use_fast_kernels
        parameters = parameters_of(layers) if fast and on_triton_device(x) else None
        if parameters is None:
            return Wav2Vec2BertSelfAttention._project(self, x, *layers)
        weights, biases = parameters
        if records_gradient(x, *weights, *biases):
            weight, bias = joined(weights), joined(biases) if biases else None
            if weight is None or (biases and bias is None):
                return Wav2Vec2BertSelfAttention._project(self, x, *layers)
            outputs = ops.linear(x, weight, bias, fast=fast)
        else:
            outputs = ops.linear_stacked(x, weights, biases, fast=fast)
        return list(outputs.chunk(len(layers), dim=1))


def stack(block: Wav2Vec2BertSelfAttention) -> None:
    """Make a self-attention one that stacks its projections, and lay them end to end."""
    if type(block) is Wav2Vec2BertSelfAttention:
        swap(block, StackedSelfAttention)
        block.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]
    if isinstance(block, StackedSelfAttention):
        block.lay_weights()


def _after_loading(block: nn.Module, _: Any) -> None:
    if isinstance(block, StackedSelfAttention) and block.use_fast_kernels:
        block.lay_weights()


def lay_layers_end_to_end(layers: Sequence[nn.Module]) -> None:
    """Lay weights end to end, and biases, of layers that can be one where Triton kernels run."""
    parameters = parameters_of(layers)
    if parameters is not None and on_triton_device(parameters[0][0]):
        for tensors in parameters:
            if tensors:
                lay_end_to_end(tensors)


def parameters_of(layers: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor]] | None:
    """Weights and biases of several layers that can be one: plain linear layers, all alike.

    There is a bias for each, or none. `None` for a single layer, and for any others.
    """
    plain = [layer for layer in layers if is_untouched(layer, nn.Linear)]
    weights: list[Tensor] = [layer.weight for layer in plain]
    biases: list[Tensor] = [layer.bias for layer in plain if layer.bias is not None]
    alike = all(weight.shape == weights[0].shape for weight in weights)
    one_each = len(plain) == len(layers) > 1 and len(biases) in (0, len(plain))
    return (weights, biases) if one_each and alike else None


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
