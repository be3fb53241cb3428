"""A training step, forward and backward: its inputs, what is right, and how far a candidate is off.

The model is the one for CTC, at real width and in training mode, with everything random switched
off (dropout, LayerDrop, SpecAugment). Losses are summed over frames, so the gradients of one padded
batch and those of its utterances one by one, added up, are the same. No optimiser runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.context import Context, exact
from bench.machine import DTYPES
from bench.measure import relative_error

MODES = {"fp32": ("",), "bf16": ("bf16 weights", "autocast")}
"""Ways to train in a dtype: bf16 with weights in bf16, and with fp32 weights under autocast."""


def weights_dtype(dtype: str, mode: str) -> str:
    """Of the parameters, "fp32" or "bf16"."""
    return "fp32" if mode == "autocast" else dtype


def config_values(context: Context) -> dict[str, Any]:
    """Of the model, with everything random off."""
    off = ("conformer_conv_dropout", "final_dropout")
    return {**context.config_values(), **dict.fromkeys(off, 0.0)}


def weights(context: Context, dtype: str) -> dict[str, Tensor]:
    """The state dict of the model with its head, in "fp32" or "bf16"; shared, made once."""
    found = {f"wav2vec2_bert.{name}": w for name, w in context.weights(dtype).items()}
    width, vocabulary = context.our_config().hidden_size, config_values(context)["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    head = torch.empty(vocabulary, width).normal_(0.0, width**-0.5, generator=generator)
    found["lm_head.weight"] = head.to(context.device, DTYPES[dtype])
    found["lm_head.bias"] = torch.zeros(vocabulary, device=context.device, dtype=DTYPES[dtype])
    return found


def labels(context: Context) -> list[Tensor]:
    """A random class for each frame of each utterance, int64 `[T]`."""
    generator = torch.Generator().manual_seed(2)
    vocabulary = config_values(context)["vocab_size"]
    return [torch.randint(0, vocabulary, (n,), generator=generator) for n in context.lengths]


def padded_labels(rows: Sequence[Tensor]) -> Tensor:
    """int64 `[batch, T]`, -100 in padding."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-100)


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over valid frames, of `[batch, T, vocab]` and `[batch, T]`.

    Not CTC's own: over 30 s that adds numbers of some thousand in float32, so its gradient is right
    to three digits only and would hide how exact the model's is. Beside the model neither takes
    time.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.transpose(1, 2), targets, ignore_index=-100, reduction="sum")


@contextlib.contextmanager
def recording() -> Any:
    """Gradients are recorded, also where the caller is in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@dataclass(frozen=True)
class Errors:
    """Relative to float64 from equally rounded weights.

    Attributes:
        outputs: of the logits of all valid frames.
        gradients: of all gradients together.
    """

    outputs: float
    gradients: float


@dataclass(frozen=True)
class Truth:
    """What is right: `[T, vocab]` of each utterance, and the gradients by name."""

    logits: list[Tensor]
    gradients: dict[str, Tensor]

    def errors(self, logits: Sequence[Tensor], model: nn.Module) -> Errors:
        """Of what a candidate returned and left in its parameters."""
        named = dict(model.named_parameters())
        if set(named) != set(self.gradients):
            raise ValueError("the model has other parameters than the reference")
        gradients = [_gradient(named[name]) for name in self.gradients]
        return Errors(
            relative_error(logits, self.logits),
            relative_error(gradients, list(self.gradients.values())),
        )


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def truth(context: Context, dtype: str) -> Truth:
    """The reference on each utterance alone, in float64, from weights and inputs in `dtype`.

    Attention runs in blocks of queries and every layer is computed again in the backward pass, or
    four layers over 30 s would take 20 GB. Kept in the context, in float32: rounding is far below
    every limit.
    """
    if dtype not in context.truths:
        with recording():
            context.truths[dtype] = _truth(context, dtype)
    found: Truth = context.truths[dtype]
    return found


def _truth(context: Context, dtype: str) -> Truth:
    model = exact(reference(context, dtype, "eager"))
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    logits = []
    for row, target in enumerate(labels(context)):
        x = context.batch([row], DTYPES[dtype])["input_features"]
        output = model(x.double()).logits
        loss(output, target[None].to(context.device)).backward()
        logits.append(output[0].detach())
    gradients = {name: _gradient(p).float().cpu() for name, p in model.named_parameters()}
    return Truth(logits, gradients)


def reference(context: Context, dtype: str, attention: str) -> nn.Module:
    """transformers' model for CTC over the shared weights, in training mode.

    Raises:
        Unavailable: transformers is not installed, or has no such attention.
    """
    return context.reference_of(
        "Wav2Vec2BertForCTC", config_values(context), weights(context, dtype), attention
    ).train()


def mode_of(configuration: str) -> str:
    """The mode in a candidate's configuration."""
    return next((mode for mode in MODES["bf16"] if mode in configuration), "")
