"""What the tests of checkpoints share: small models of both libraries, and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import transformers
from torch import Tensor

from w2vbert_fast import models
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig

CLASSES = [
    "Wav2Vec2BertModel",
    "Wav2Vec2BertForCTC",
    "Wav2Vec2BertForSequenceClassification",
    "Wav2Vec2BertForAudioFrameClassification",
    "Wav2Vec2BertForXVector",
]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 11,
    "classifier_proj_size": 16,
    "tdnn_dim": [16, 16],
    "tdnn_kernel": [3, 1],
    "tdnn_dilation": [1, 2],
    "xvector_output_dim": 16,
    "num_labels": 3,
}


def ours(name: str, **fields: object) -> models.Wav2Vec2BertPreTrainedModel:
    return getattr(models, name)(Wav2Vec2BertConfig(**{**SMALL, **fields}))


def theirs(name: str, **fields: object) -> transformers.PreTrainedModel:
    return getattr(transformers, name)(transformers.Wav2Vec2BertConfig(**{**SMALL, **fields}))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder's model.safetensors."""
    tensors = safetensors.torch.load(Path(folder, "model.safetensors").read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def saved_ctc(folder: Path, **options: object) -> models.Wav2Vec2BertForCTC:
    """A small CTC model, saved in the folder."""
    model = ours("Wav2Vec2BertForCTC")
    model.save_pretrained(folder, **options)
    return model


load_ctc = models.Wav2Vec2BertForCTC.from_pretrained
load_base = models.Wav2Vec2BertModel.from_pretrained
