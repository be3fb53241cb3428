"""Whole models with random weights, and the batches that they are given."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import w2vbert_fast
from tests.helpers.operations import let_all_matter
from tests.kernels.lane import DEVICE, WITHOUT_DEVICE, choose
from w2vbert_fast.ops.dispatch import force_triton

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": choose(3, 1),
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "feature_projection_input_dim": 160,
    "left_max_position_embeddings": 5,
    "right_max_position_embeddings": 3,
    "conv_depthwise_kernel_size": 7,
}
MODEL: dict[str, Any] = {"num_hidden_layers": 2}
"""The published model's sizes are the configuration's defaults; two of its 24 layers."""
SIZES = choose({"tiny": TINY, "model": MODEL}, {"tiny": TINY})
LENGTHS = choose((1500, 217, 64, 31), (18, 9))
HEADS: dict[str, Any] = {
    "vocab_size": 64,
    "num_labels": 64,
    "classifier_proj_size": 64,
    "tdnn_dim": (64, 64, 96),
    "tdnn_kernel": (3, 3, 1),
    "tdnn_dilation": (1, 2, 1),
    "xvector_output_dim": 64,
}
"""Many outputs, so that the error of an answer is not that of a few numbers."""


def import_transformers() -> Any:
    """transformers; where it cannot be imported the test is skipped, and says why."""
    try:
        import transformers
    except ImportError as error:
        pytest.skip(f"transformers cannot be imported: {error}")
    return transformers


def make(class_name: str, size: str, **options: Any) -> nn.Module:
    """A model in evaluation mode on the device, fp32, with weights that all matter."""
    torch.manual_seed(0)
    config = w2vbert_fast.Wav2Vec2BertConfig(**{**SIZES[size], **HEADS, **options})
    model: nn.Module = getattr(w2vbert_fast, class_name)(config)
    let_all_matter(model)
    return model.eval().to(DEVICE)


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Random features `[batch, T, 160]`, not zero in padding, and the attention mask."""
    frames = max(lengths)
    features = torch.randn(len(lengths), frames, 160, device=DEVICE)
    mask = torch.arange(frames)[None, :] < torch.tensor(lengths)[:, None]
    return features, mask.long().to(DEVICE)


def kernels() -> contextlib.AbstractContextManager[None]:
    """Where operations of `fast=True` run the Triton kernels: on a GPU everywhere."""
    return force_triton() if WITHOUT_DEVICE else contextlib.nullcontext()


def fast(model: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    """A model's output on the kernels."""
    model.use_fast_kernels = True  # type: ignore[assignment]
    try:
        with kernels():
            return model(*inputs, **options)
    finally:
        model.use_fast_kernels = False  # type: ignore[assignment]
