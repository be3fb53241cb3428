"""What a run is made of before its first step: data, model, optimiser."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from w2vbert_fast.recordings.manifest import ColumnNames
from w2vbert_fast.training.config import FinetuneConfig
from w2vbert_fast.training.data import ManifestSource, Skipped, UtteranceSource
from w2vbert_fast.training.manifest import Manifest, Row, read_manifest
from w2vbert_fast.training.model import Parts, make_parts
from w2vbert_fast.training.tasks import TASKS


@dataclass(frozen=True)
class Prepared:
    """Data and model.

    Attributes:
        parts: the model.
        train: the training data.
        evaluation: the evaluation data.
        skipped: recordings that are left out from the start.
    """

    parts: Parts
    train: UtteranceSource
    evaluation: UtteranceSource
    skipped: list[Skipped]


def prepare(
    config: FinetuneConfig, train: UtteranceSource | None, evaluation: UtteranceSource | None
) -> Prepared:
    """Read the manifests that are needed, and load the model that fits them.

    Args:
        config: the configuration.
        train: data instead of the manifest `config.train`.
        evaluation: data instead of the manifest `config.eval`.

    Raises:
        OSError, ManifestError, ValueError, TypeError, ImportError: see `finetune`.
    """
    task = TASKS[config.task]
    # Both are checked before a model is loaded.
    columns = config.columns
    train_manifest = _manifest(config, config.train, columns) if train is None else None
    columns = columns if config.eval_columns is None else config.eval_columns
    eval_manifest = _manifest(config, config.eval, columns) if evaluation is None else None
    rows: list[Row] = []
    skipped: list[Skipped] = []
    transcripts: list[str] | None = None
    labels: list[str] | None = None
    if train_manifest is not None:
        rows, skipped = _short_enough(train_manifest.rows, config.max_seconds)
        targets = [row.target for row in rows]
        if task.transcribes:
            transcripts = targets
        else:
            labels = task.classes(targets)
    parts = make_parts(config, transcripts, labels)

    def source(manifest: Manifest, kept: list[Row], speeds: tuple[float, ...]) -> ManifestSource:
        return ManifestSource(
            kept,
            manifest.digest,
            task,
            parts.feature_extractor,
            tokenizer=parts.tokenizer,
            label2id=parts.label2id,
            speeds=speeds,
            seed=config.seed,
        )

    if train_manifest is not None:
        train = source(train_manifest, rows, config.speeds)
    if eval_manifest is not None:
        evaluation = source(eval_manifest, list(eval_manifest.rows), (1.0,))
    assert train is not None and evaluation is not None
    if len(evaluation) == 0:
        raise ValueError("there is nothing to evaluate on: the evaluation data is empty")
    return Prepared(parts, train, evaluation, skipped)


def _manifest(
    config: FinetuneConfig, path: str | os.PathLike[str], columns: Mapping[str, str]
) -> Manifest:
    return read_manifest(
        path,
        TASKS[config.task],
        lower_case=config.lower_case,
        columns=ColumnNames(columns),
        unpack=os.path.join(config.out, "recordings"),
    )


def _short_enough(rows: tuple[Row, ...], max_seconds: float) -> tuple[list[Row], list[Skipped]]:
    kept = [row for row in rows if row.seconds <= max_seconds]
    skipped = [
        Skipped(row.name, f"it is {row.seconds:.1f} s long, and max_seconds is {max_seconds:g}")
        for row in rows
        if row.seconds > max_seconds
    ]
    if not kept:
        raise ValueError(f"no training recording is at most {max_seconds:g} s long (max_seconds)")
    return kept, skipped


def autocast_dtype(config: FinetuneConfig, device: torch.device) -> torch.dtype | None:
    """What the model runs in under autocast; None: without."""
    if config.precision != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    # Where bf16 is emulated it is slower than fp32.
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else None


def make_optimizer(
    config: FinetuneConfig, module: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over the trainable parameters.

    Matrices decay, vectors (biases, norms) do not.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    # One kernel for all parameters where there is one, else one call for each operation.
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.adam_epsilon,
        fused=fused,
        foreach=not fused,
    )
