"""The original checkpoint of w2v-BERT 2.0 (`conformer_shaw.pt`) to the reference layout and back.

The original was trained with fairseq and published for fairseq2 and Seamless Communication: a file
of `torch.save` with the tensors under "model". Both ways of naming them are read; fairseq2's is
written. The layer norm of the original's fairseq layers, the projections and so on are the same
tensors under other names; what only pre-training uses (quantiser, projections to its targets)
has no place in the reference layout.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2vbert_fast.checkpoints.files import make_folder, staged_file
from w2vbert_fast.checkpoints.repository import Repository
from w2vbert_fast.checkpoints.weights import (
    CheckpointError,
    find_checkpoint,
    listed,
    write_checkpoint,
)
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.models.model import Wav2Vec2BertModel
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor

# fairseq2's names beside the reference's, of the parts in front of the layers ...
_FRONT = {
    "encoder_frontend.post_extract_layer_norm.": "feature_projection.layer_norm.",
    "encoder_frontend.model_dim_proj.": "feature_projection.projection.",
    "masker.temporal_mask_embed": "masked_spec_embed",
}
# ... and within one of them. Each ends in a dot, so that no name is the beginning of another.
_LAYER = {
    "ffn1_layer_norm.": "ffn1_layer_norm.",
    "ffn1.inner_proj.": "ffn1.intermediate_dense.",
    "ffn1.output_proj.": "ffn1.output_dense.",
    "self_attn_layer_norm.": "self_attn_layer_norm.",
    "self_attn.q_proj.": "self_attn.linear_q.",
    "self_attn.k_proj.": "self_attn.linear_k.",
    "self_attn.v_proj.": "self_attn.linear_v.",
    "self_attn.output_proj.": "self_attn.linear_out.",
    "self_attn.sdpa.rel_k_embed.": "self_attn.distance_embedding.",
    "conv_layer_norm.": "conv_module.layer_norm.",
    "conv.pointwise_conv1.": "conv_module.pointwise_conv1.",
    "conv.depthwise_conv.": "conv_module.depthwise_conv.",
    "conv.layer_norm.": "conv_module.depthwise_layer_norm.",
    "conv.pointwise_conv2.": "conv_module.pointwise_conv2.",
    "ffn2_layer_norm.": "ffn2_layer_norm.",
    "ffn2.inner_proj.": "ffn2.intermediate_dense.",
    "ffn2.output_proj.": "ffn2.output_dense.",
    "layer_norm.": "final_layer_norm.",
}
# fairseq's names, where they are not fairseq2's.
_FAIRSEQ_FRONT = {
    "layer_norm.": "encoder_frontend.post_extract_layer_norm.",
    "post_extract_proj.": "encoder_frontend.model_dim_proj.",
    "mask_emb": "masker.temporal_mask_embed",
    "project_q.": "final_target_proj.",
    "quantizer.vars": "quantizer.entries",
    "quantizer.weight_proj.": "quantizer.entry_proj.",
}
_FAIRSEQ_LAYER = {
    "ffn1.layer_norm.": "ffn1_layer_norm.",
    "ffn1.w_1.": "ffn1.inner_proj.",
    "ffn1.w_2.": "ffn1.output_proj.",
    "ffn2.layer_norm.": "ffn2_layer_norm.",
    "ffn2.w_1.": "ffn2.inner_proj.",
    "ffn2.w_2.": "ffn2.output_proj.",
    "self_attn.out_proj.": "self_attn.output_proj.",
    "self_attn.rel_k_embedding.": "self_attn.sdpa.rel_k_embed.",
    "conv_module.layer_norm.": "conv_layer_norm.",
    "conv_module.layer_norm2.": "conv.layer_norm.",
    "conv_module.pointwise_conv1.": "conv.pointwise_conv1.",
    "conv_module.depthwise_conv.": "conv.depthwise_conv.",
    "conv_module.pointwise_conv2.": "conv.pointwise_conv2.",
    "final_layer_norm.": "layer_norm.",
}
_IN_A_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_PRETRAINING = ("quantizer.", "final_proj.", "final_target_proj.")
# In fairseq files, of the masked language model's loss and of a norm that the model never applies.
_UNUSED_IN_FAIRSEQ = ("mlm_proj.", "encoder.layer_norm.")

_PUBLISHED_POSITIONS = (64, 8)


@dataclass(frozen=True)
class Converted:
    """What a conversion has done.

    Attributes:
        files: the files written.
        num_tensors: tensors converted.
        left_out: the original's names of tensors that only pre-training uses.
    """

    files: tuple[Path, ...]
    num_tensors: int
    left_out: tuple[str, ...]


def convert_original(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    config: Wav2Vec2BertConfig | None = None,
    max_shard_size: int | str = "5GB",
) -> Converted:
    """Write the original checkpoint as a folder that `from_pretrained` loads, here and there.

    The folder gets `config.json`, the weights and `preprocessor_config.json`. Nothing is written
    unless every tensor has its place and every place its tensor, of the right shape. The file is
    read with `torch.load(weights_only=True)`: code in it does not run.

    Args:
        path: `conformer_shaw.pt`, with the names of fairseq2 or of fairseq.
        out: the folder; made when it is not there.
        config: of the model; `None`: sizes from the tensors' shapes, the rest as published. Where
            the number of relative positions is not the published 73 it must be given, since no
            shape says how many lie on either side.
        max_shard_size: most bytes in one file, as a number or such as `"5GB"`.

    Raises:
        OSError: there is no such file.
        CheckpointError: it is damaged, holds more than tensors, is no such checkpoint, or tensors
            are missing, unexpected or of another shape (all are listed). A `ValueError`.
        ValueError: `config` is needed, or an argument is impossible.
        NotADirectoryError: `out` is a file.
    """
    source = Path(path)
    tensors = _to_fairseq2_names(_read_original(source))
    left_out = tuple(name for name in tensors if name.startswith(_PRETRAINING))
    kept = {name: t for name, t in tensors.items() if name not in left_out}
    names = {name: _reference_name(name) for name in kept}
    if not any(_IN_A_LAYER.match(name) for name in kept):
        raise CheckpointError(
            f"{source} is no checkpoint of this model: it holds {listed(tensors, 5) or 'nothing'}"
        )
    if config is None:
        config = _inferred_config(kept, source)
    state_dict = {names[name]: tensor for name, tensor in kept.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    _check_names(config, shapes, {new: old for old, new in names.items()}, source)
    config.architectures = [Wav2Vec2BertModel.__name__]
    config.dtype = next(iter(state_dict.values())).dtype
    files = write_checkpoint(state_dict, out, max_shard_size=max_shard_size)
    config.save_pretrained(out)
    extractor_file = SeamlessM4TFeatureExtractor(padding_value=1.0).save_pretrained(out)
    written = (*files, Path(out) / "config.json", *map(Path, extractor_file))
    return Converted(written, len(state_dict), left_out)


def convert_to_original(
    path_or_hub_id: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pretraining: str | os.PathLike[str] | None = None,
) -> Converted:
    """Write a checkpoint of the reference layout as one file with fairseq2's names.

    The encoder is written; a head on it is left behind. Nothing is written unless every tensor of
    the encoder is there.

    Args:
        path_or_hub_id: a folder or hub id with `config.json` and weights.
        out: the file; replaced if it is there.
        pretraining: an original checkpoint to take from what only pre-training uses, without which
            the loaders of fairseq2 and Seamless Communication call the file incomplete.

    Raises:
        OSError: there is no such folder or file.
        CheckpointError: weights are missing or damaged, tensors are missing, unexpected or of
            another shape, or `pretraining` holds no such tensors. A `ValueError`.
        ValueError: the model has an adapter or other positions than "relative_key", for which the
            original has no names.
    """
    config = Wav2Vec2BertConfig.from_pretrained(path_or_hub_id)
    if config.add_adapter or config.use_intermediate_ffn_before_adapter:
        raise ValueError(
            f"{path_or_hub_id} has an adapter, for which the original layout has no names"
        )
    if config.position_embeddings_type != "relative_key":
        raise ValueError(
            f"{path_or_hub_id} has position_embeddings_type {config.position_embeddings_type!r}; "
            "the original layout has 'relative_key' only"
        )
    extra = {} if pretraining is None else _pretraining_tensors(Path(pretraining))
    checkpoint = find_checkpoint(Repository(path_or_hub_id))
    prefix = f"{Wav2Vec2BertModel.base_model_prefix}."
    has_head = any(name.startswith(prefix) for name in checkpoint.tensors)
    wanted = {
        name.removeprefix(prefix): name
        for name in checkpoint.tensors
        if name.startswith(prefix) or not has_head
    }
    state_dict = {wanted_name: None for wanted_name in wanted}
    shapes = {name: checkpoint.tensors[old].shape for name, old in wanted.items()}
    _check_names(config, shapes, dict.fromkeys(state_dict), Path(checkpoint.name))
    back = {old: name for name, old in wanted.items()}
    tensors = {_original_name(back[name]): tensor for name, tensor in checkpoint.read(list(back))}
    final = Path(out)
    make_folder(final.parent)
    with staged_file(final) as staged:
        torch.save({"model": {**tensors, **extra}}, staged.path)
        staged.commit()
    return Converted((final,), len(tensors), ())


def _pretraining_tensors(path: Path) -> dict[str, Tensor]:
    tensors = _to_fairseq2_names(_read_original(path))
    found = {name: t for name, t in tensors.items() if name.startswith(_PRETRAINING)}
    if not found:
        raise CheckpointError(f"{path} holds no tensors of pre-training")
    return found


def _read_original(path: Path) -> dict[str, Tensor]:
    """The tensors under "model", or of the file itself; nothing but tensors is unpickled."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain values, which is not loaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):
        loaded = loaded["model"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f"{path} is no checkpoint: it must map names to tensors")
    others = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path} is no checkpoint: no tensors are {listed(others)}")
    return dict(loaded)


def _to_fairseq2_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; fairseq's names become fairseq2's, and what fairseq leaves unused goes."""
    if not any(name.startswith("post_extract_proj.") for name in tensors):
        return dict(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(_UNUSED_IN_FAIRSEQ):
            continue
        within = _IN_A_LAYER.fullmatch(name)
        if within is None:
            renamed[_replaced(name, _FAIRSEQ_FRONT)] = tensor
        else:
            rest = _replaced(within[2], _FAIRSEQ_LAYER)
            renamed[f"encoder.layers.{within[1]}.{rest}"] = tensor
    return renamed


def _replaced(name: str, table: Mapping[str, str]) -> str:
    """The name with its beginning replaced as the table says; the name itself when it is not
    there."""
    for old, new in table.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _reference_name(name: str) -> str:
    within = _IN_A_LAYER.fullmatch(name)
    if within is None:
        return _replaced(name, _FRONT)
    return f"encoder.layers.{within[1]}.{_replaced(within[2], _LAYER)}"


def _original_name(name: str) -> str:
    within = _IN_A_LAYER.fullmatch(name)
    if within is None:
        return _replaced(name, {new: old for old, new in _FRONT.items()})
    back = {new: old for old, new in _LAYER.items()}
    return f"encoder.layers.{within[1]}.{_replaced(within[2], back)}"


def _inferred_config(tensors: Mapping[str, Tensor], source: Path) -> Wav2Vec2BertConfig:
    """The configuration that the shapes tell; names are fairseq2's."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].dim() != dims:
            found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
            raise CheckpointError(f"{source}: {name} {found}; the model's sizes are read from it")
        return tuple(tensors[name].shape)

    hidden, features = shape("encoder_frontend.model_dim_proj.weight", 2)
    intermediate, _ = shape("encoder.layers.0.ffn1.inner_proj.weight", 2)
    kernel = shape("encoder.layers.0.conv.depthwise_conv.weight", 3)[2]
    positions, head_size = shape("encoder.layers.0.self_attn.sdpa.rel_k_embed.weight", 2)
    left, right = _PUBLISHED_POSITIONS
    if positions != left + right + 1:
        raise ValueError(
            f"{source} has {positions} relative positions; give config, whose "
            "left_max_position_embeddings and right_max_position_embeddings say how many lie on "
            "either side"
        )
    if head_size == 0 or hidden % head_size:
        raise CheckpointError(
            f"{source}: heads of {head_size} channels do not divide a hidden size of {hidden}"
        )
    layers = {int(m[1]) for m in map(_IN_A_LAYER.match, tensors) if m is not None}
    return Wav2Vec2BertConfig(
        hidden_size=hidden,
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=hidden // head_size,
        intermediate_size=intermediate,
        feature_projection_input_dim=features,
        conv_depthwise_kernel_size=kernel,
        left_max_position_embeddings=left,
        right_max_position_embeddings=right,
        mask_time_prob=0.05 if "masker.temporal_mask_embed" in tensors else 0.0,
        apply_spec_augment=False,
    )


def _check_names(
    config: Wav2Vec2BertConfig,
    shapes: Mapping[str, tuple[int, ...]],
    original: Mapping[str, str | None],
    source: Path,
) -> None:
    """Compare names and shapes with those of a model of this configuration.

    Args:
        config: of the model.
        shapes: by the reference's names.
        original: the file's own names, by the reference's, where they are others.
        source: what messages call the checkpoint.

    Raises:
        CheckpointError: they differ; all differences are listed.
    """
    with torch.device("meta"):
        expected = {n: tuple(t.shape) for n, t in Wav2Vec2BertModel(config).state_dict().items()}

    def named(name: str) -> str:
        return original.get(name) or name

    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys())
    other = sorted(n for n in expected.keys() & shapes.keys() if expected[n] != shapes[n])
    problems: list[str] = []

    def add(kind: str, items: Iterable[str]) -> None:
        if items := list(items):
            problems.append(f"{kind}: {listed(items)}")

    in_original = any(original.values())
    add("missing", (_original_name(n) if in_original else n for n in missing))
    add("unexpected", map(named, unexpected))
    add("of another shape", (f"{named(n)} {shapes[n]} for {expected[n]}" for n in other))
    if problems:
        raise CheckpointError(f"{source} does not fit the model; {'; '.join(problems)}")
