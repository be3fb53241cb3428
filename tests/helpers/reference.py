"""Small models of the reference (transformers) and ours with the same random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import w2vbert_fast
from tests.helpers.operations import let_all_matter

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "feature_projection_input_dim": 20,
    "left_max_position_embeddings": 5,
    "right_max_position_embeddings": 3,
    "conv_depthwise_kernel_size": 7,
    "vocab_size": 13,
    "num_labels": 3,
    "classifier_proj_size": 16,
    "tdnn_dim": (16, 16, 24),
    "tdnn_kernel": (3, 3, 1),
    "tdnn_dilation": (1, 2, 1),
    "xvector_output_dim": 3,
    "layerdrop": 0.0,
    "mask_time_prob": 0.05,
    "attention_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
    "final_dropout": 0.0,
}
CLASSES = (
    "Wav2Vec2BertModel",
    "Wav2Vec2BertForCTC",
    "Wav2Vec2BertForSequenceClassification",
    "Wav2Vec2BertForAudioFrameClassification",
    "Wav2Vec2BertForXVector",
)
POSITIONS = ("relative_key", "relative", "rotary", None)


def pair(class_name: str, seed: int = 0, **config: Any) -> tuple[nn.Module, nn.Module]:
    """(reference, ours) in evaluation mode with equal weights.

    Weights are larger than the reference's initial ones, so that attention, positions and biases
    all matter to the answer.
    """
    values = {**TINY, **config}
    torch.manual_seed(seed)
    reference = getattr(transformers, class_name)(transformers.Wav2Vec2BertConfig(**values))
    let_all_matter(reference)
    ours = getattr(w2vbert_fast, class_name)(w2vbert_fast.Wav2Vec2BertConfig(**values))
    ours.load_state_dict(reference.state_dict())
    return reference.eval(), ours.eval()


def padded_batch(lengths: tuple[int, ...], features: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random `input_features` `[batch, T, features]`, not zero in padding, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    frames = max(lengths)
    input_features = torch.randn(len(lengths), frames, features, generator=generator)
    mask = (torch.arange(frames)[None, :] < torch.tensor(lengths)[:, None]).long()
    return input_features, mask


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN anywhere gives NaN."""
    error = (ours - reference).norm() / reference.norm().clamp_min(1e-30)
    return float(error.detach())
