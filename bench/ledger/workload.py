"""What a cost ledger counts: shapes, dtype, depth and launch configurations of one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FRAME_SECONDS = 0.02
"""A frame of the encoder: two filterbank frames of 10 ms."""


@dataclass(frozen=True)
class Workload:
    """One pass over a batch of utterances without padding.

    Attributes:
        batch: utterances.
        frames: of each, 20 ms apart.
        dtype: of weights, gradients and activations: "bf16", "fp16" or "fp32".
        layers: of the encoder.
        overrides: what else of the config is not the default.
        arch: the architecture whose launch configurations our kernels take.
        sdpa: "efficient" or "math", the kernel behind the reference's sdpa.
        mask: give the reference the attention mask that its feature extractor returns, as every
            padded batch needs. Ours reads a mask once, on the host, and is counted without.

    Raises:
        ValueError: a number is below 1, or the dtype is unknown.
    """

    batch: int = 16
    frames: int = 1500
    dtype: str = "bf16"
    layers: int = 24
    overrides: Mapping[str, Any] = field(default_factory=dict)
    arch: str = "sm_90"
    sdpa: str = "efficient"
    mask: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "frames", "layers"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {tuple(DTYPES)}")

    @property
    def config(self) -> dict[str, Any]:
        """What of the model's config is not the default."""
        return {**self.overrides, "num_hidden_layers": self.layers}

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def inputs(self, width: int, *, reference: bool) -> dict[str, Tensor]:
        """The model's arguments, on "meta".

        Args:
            width: features of a frame.
            reference: for the reference, which may take a mask.
        """
        shape = (self.batch, self.frames)
        features = torch.empty(*shape, width, dtype=self.torch_dtype, device="meta")
        inputs = {"input_features": features}
        if self.mask and reference:
            inputs["attention_mask"] = torch.empty(shape, dtype=torch.int64, device="meta")
        return inputs

    def facts(self) -> dict[str, Any]:
        """As the JSON file has them."""
        seconds = self.batch * self.frames * FRAME_SECONDS
        own = {name: value for name, value in vars(self).items() if name != "overrides"}
        return {**own, "audio_seconds": seconds}
