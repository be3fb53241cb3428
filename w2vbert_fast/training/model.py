"""The model that is fine-tuned: what it starts from, its new head, LoRA, and how it is saved."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w2vbert_fast._extras import require
from w2vbert_fast.checkpoints.repository import Repository
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.models.initialization import initialize_weights
from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor
from w2vbert_fast.processing.processor import Wav2Vec2BertProcessor
from w2vbert_fast.processing.tokenizer import Wav2Vec2CTCTokenizer
from w2vbert_fast.processing.tokenizer_files import VOCABULARY_FILE
from w2vbert_fast.training.config import FinetuneConfig
from w2vbert_fast.training.tasks import TASKS
from w2vbert_fast.training.vocabulary import (
    Spelling,
    build_tokenizer,
    class_names,
    unknown_characters,
)

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"

_PEFT_PREFIX = "base_model.model."
_ADAPTER = "default"


@dataclass(frozen=True)
class Parts:
    """What is trained, and what goes into a checkpoint beside the weights.

    Attributes:
        core: the model with its head, in fp32, in training mode.
        model: `core`, or PEFT's model around it.
        feature_extractor: of the checkpoint that it starts from.
        tokenizer: for "ctc".
        label2id: ids of the classes, for the other tasks.
    """

    core: Wav2Vec2BertPreTrainedModel
    model: nn.Module
    feature_extractor: SeamlessM4TFeatureExtractor
    tokenizer: Wav2Vec2CTCTokenizer | None
    label2id: Mapping[str, int]


def make_parts(
    config: FinetuneConfig,
    transcripts: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
) -> Parts:
    """Load the model with a head that fits the data.

    The head of the checkpoint stays where its vocabulary or classes do; else there is a new one.

    Args:
        config: the configuration.
        transcripts: the training transcripts, for "ctc". None: the tokenizer of the checkpoint.
        labels: the training labels, for the other tasks. None: the classes of the checkpoint.

    Raises:
        OSError: the model, or a part of it, cannot be found.
        ValueError: it does not fit, or the kept tokenizer lacks characters of the transcripts.
        TypeError: `model_overrides` names no entry of the configuration.
        ImportError: LoRA is asked for and PEFT is not installed.
    """
    task, source = TASKS[config.task], config.model
    extractor = SeamlessM4TFeatureExtractor.from_pretrained(source)
    entries: dict[str, Any] = dict(config.model_overrides)
    stored = Wav2Vec2BertConfig.from_pretrained(source)
    tokenizer: Wav2Vec2CTCTokenizer | None = None
    label2id: Mapping[str, int] = {}
    if task.transcribes:
        tokenizer, is_new = _tokenizer(config, transcripts)
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of {source} has no pad_token, which is CTC's blank")
        entries |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        if is_new:
            entries |= {"bos_token_id": None, "eos_token_id": None}
        # The reduction that is trained with, for whoever goes on with the reference.
        entries.setdefault("ctc_loss_reduction", "mean")
    else:
        label2id, is_new = _classes(stored, labels)
        names = {index: name for name, index in label2id.items()}
        entries |= {"id2label": names, "label2id": dict(label2id)}
    model_config = Wav2Vec2BertConfig.from_pretrained(source, **entries)
    model = task.model_class.from_pretrained(
        source,
        config=model_config,
        dtype=torch.float32,
        use_fast_kernels=config.use_fast_kernels,
        ignore_mismatched_sizes=is_new,
    )
    if is_new:
        base = f"{model.base_model_prefix}."
        names_of_head = [name for name, _ in model.named_parameters() if not name.startswith(base)]
        initialize_weights(model, names_of_head)
    masks = model_config.apply_spec_augment and model_config.mask_time_prob > 0
    if not masks and hasattr(model.base_model, "masked_spec_embed"):
        # It would never have a gradient, and a sharded optimiser wants a state for all it holds.
        model.base_model.masked_spec_embed.requires_grad_(False)
    _freeze(model, config.freeze)
    recompute = config.gradient_checkpointing
    if recompute:
        model.gradient_checkpointing_enable(policy="layer" if recompute is True else recompute)
    model.train()
    return Parts(model, _with_lora(model, config), extractor, tokenizer, label2id)


def _freeze(model: Wav2Vec2BertPreTrainedModel, freeze: int | str) -> None:
    """Leave the feature projection and the encoder's first layers out of the training."""
    if not freeze:
        return
    base: Any = model.base_model
    layers = base.encoder.layers
    if freeze != "encoder" and int(freeze) > len(layers):
        raise ValueError(f"freeze is {freeze}, and the encoder has {len(layers)} layers")
    frozen = [base.encoder] if freeze == "encoder" else layers[: int(freeze)]
    for part in (base.feature_projection, *frozen):
        part.requires_grad_(False)
    if hasattr(base, "masked_spec_embed"):
        base.masked_spec_embed.requires_grad_(False)


def _tokenizer(
    config: FinetuneConfig, transcripts: Sequence[str] | None
) -> tuple[Wav2Vec2CTCTokenizer, bool]:
    """The tokenizer, and whether it is a new one."""
    choice = config.vocabulary
    if choice != "new":
        has_one = Repository(config.model).find(VOCABULARY_FILE) is not None
        if has_one or choice == "keep" or transcripts is None:
            tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(config.model)
            missing = unknown_characters(Spelling(tokenizer), transcripts or ())
            if missing:
                shown = ", ".join(f"{c!r} ({n} times)" for c, n in list(missing.items())[:20])
                raise ValueError(
                    f"the vocabulary of {config.model} lacks characters of the training "
                    f"transcripts: {shown}. Change the transcripts (lower_case may be what is "
                    "missing), or build a vocabulary and a head anew with vocabulary='new'"
                )
            return tokenizer, False
    if transcripts is None:
        raise ValueError("vocabulary='new' needs transcripts; data of your own has none to read")
    folder = Path(config.out) / "processor"
    return build_tokenizer(transcripts, folder, config.min_character_count), True


def _classes(
    stored: Wav2Vec2BertConfig, labels: Sequence[str] | None
) -> tuple[Mapping[str, int], bool]:
    """Ids of the classes, and whether they are new."""
    if labels is None:
        return stored.label2id, False
    wanted = class_names(labels)
    if set(wanted) <= set(stored.label2id):
        return stored.label2id, False
    return {name: index for index, name in enumerate(wanted)}, True


def _with_lora(model: Wav2Vec2BertPreTrainedModel, config: FinetuneConfig) -> nn.Module:
    if not config.lora:
        return model
    peft = require("peft", "train")
    heads: list[str] = []
    for name in model.HEAD:
        module = model.get_submodule(name)
        # PEFT copies modules, and not lists of them.
        if isinstance(module, nn.ModuleList):
            heads += [f"{name}.{index}" for index in range(len(module))]
        else:
            heads.append(name)
    base = model.base_model_prefix
    ends = tuple(f".{target}" for target in config.lora_targets)
    targets = [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{base}.") and name.endswith(ends) and isinstance(module, nn.Linear)
    ]
    absent = [end[1:] for end in ends if not any(name.endswith(end) for name in targets)]
    if absent:
        raise ValueError(f"lora_targets names no linear layer of the encoder: {', '.join(absent)}")
    adapter = peft.LoraConfig(
        r=config.lora,
        lora_alpha=_lora_alpha(config),
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        modules_to_save=heads,
    )
    wrapped: nn.Module = peft.get_peft_model(model, adapter, adapter_name=_ADAPTER)
    return wrapped


def _lora_alpha(config: FinetuneConfig) -> float:
    return 2.0 * config.lora if config.lora_alpha is None else config.lora_alpha


def merged_state_dict(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The weights of the plain model, from those of PEFT's model around it.

    Args:
        state: `state_dict()` of the PEFT model; all its adapters are those of linear layers.
        scaling: alpha / rank.

    Returns:
        Weights with the adapters added, `W + scaling * B @ A`, and the trained heads, under the
        model's own names. The tensors of `state` are not changed.
    """
    names = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in state.items()}
    merged: dict[str, Tensor] = {}
    for name, tensor in names.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain = name.replace(f".modules_to_save.{_ADAPTER}.", ".").replace(".base_layer.", ".")
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix(".base_layer.weight")
            down = names[f"{stem}.lora_A.{_ADAPTER}.weight"]
            up = names[f"{stem}.lora_B.{_ADAPTER}.weight"]
            tensor = tensor + scaling * (up @ down)
        merged[plain] = tensor
    return merged


def save_checkpoint(
    folder: str | os.PathLike[str],
    parts: Parts,
    config: FinetuneConfig,
    state: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint that transformers loads: weights, configuration, processor.

    A LoRA run's weights are merged, and its adapter lies beside them in PEFT's format.

    Args:
        folder: where to.
        parts: the model.
        config: the configuration.
        state: `state_dict()` of `parts.model`, whole and on one device.
    """
    plain = state
    if config.lora:
        plain = merged_state_dict(state, _lora_alpha(config) / config.lora)
    parts.core.save_pretrained(folder, state_dict=plain)
    if parts.tokenizer is not None:
        processor = Wav2Vec2BertProcessor(parts.feature_extractor, parts.tokenizer)
        processor.save_pretrained(folder)
    else:
        parts.feature_extractor.save_pretrained(folder)
    if config.lora:
        adapter: Any = parts.model
        adapter.save_pretrained(
            str(Path(folder) / ADAPTER_FOLDER),
            state_dict=dict(state),
            save_embedding_layers=False,
        )
