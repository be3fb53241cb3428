"""The state of a run on disk: complete or not there, so that a kill at any time costs only steps.

`OUT/state/step-00001000/` holds what Accelerate writes (weights, optimiser, each process's random
generators), the moving average of the weights and `trainer.json` (position, sums, configuration).
It is written under a temporary name, its bytes are forced to the disk, and then it gets its name.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2vbert_fast.checkpoints.files import read_json, to_disk, write_json

_STEP_FOLDER = re.compile(r"step-(\d+)")
_TRAINER_FILE = "trainer.json"


@dataclass
class Progress:
    """Where a run stands; all of it is saved and restored.

    Attributes:
        step: optimiser steps done.
        epoch: epoch that the next step belongs to.
        done: steps of that epoch done.
        best_score: best evaluation so far, None before the first.
        best_step: when that was.
        skipped: utterances left out so far, those of this process.
        idle_steps: steps in a row without an update, up to the last one.
        sums: what the next row of the log is made of.
    """

    step: int = 0
    epoch: int = 0
    done: int = 0
    best_score: float | None = None
    best_step: int | None = None
    skipped: int = 0
    idle_steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)


def find_state(out: Path) -> Path | None:
    """The folder of the newest complete state, None where there is none."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in (out / "state").iterdir():
            match = _STEP_FOLDER.fullmatch(path.name)
            if match and (path / _TRAINER_FILE).is_file():
                found.append((int(match[1]), path))
    return max(found)[1] if found else None


def read_trainer(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """The progress in a state, and what else `save_state` was given (`config`, `data`, ...).

    Raises:
        ValueError: the file is broken.
    """
    content = read_json(folder / _TRAINER_FILE)
    try:
        entries = content.pop("progress")
        return Progress(**{entry.name: entries[entry.name] for entry in fields(Progress)}), content
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / _TRAINER_FILE} is not the state of a run: {error}") from error


def save_state(
    out: Path,
    accelerator: Any,
    progress: Progress,
    about: dict[str, Any],
    average: Sequence[Tensor] | None,
) -> None:
    """Write the state of a run; every process calls this. Older states go.

    Args:
        out: the folder of the run.
        accelerator: Accelerate's, with the model and the optimiser prepared.
        progress: where the run stands.
        about: further entries of `trainer.json`.
        average: this process's part of the moving average of the weights.
    """
    folder = out / "state" / f"step-{progress.step:08d}"
    temporary = folder.with_name(f"{folder.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    # Not as safetensors: that refuses weights that share memory, as packed projections do.
    accelerator.save_state(str(temporary), safe_serialization=False)
    if average is not None and (is_sharded(accelerator) or accelerator.is_main_process):
        torch.save(list(average), temporary / _average_file(accelerator))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / _TRAINER_FILE, {**about, "progress": asdict(progress)})
        for path in _files(temporary):
            to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        to_disk(folder.parent)
        for path in folder.parent.iterdir():
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_state(folder: Path, accelerator: Any, average: Sequence[Tensor] | None) -> None:
    """Bring model, optimiser, random generators and the moving average to a saved state."""
    accelerator.load_state(str(folder))
    if average is not None:
        file = folder / _average_file(accelerator)
        saved = torch.load(file, weights_only=True, map_location="cpu")
        for mine, other in zip(average, saved, strict=True):
            mine.copy_(other)


def is_sharded(accelerator: Any) -> bool:
    """Whether each process holds a part of the weights only."""
    return "FSDP" in str(accelerator.distributed_type)


def _average_file(accelerator: Any) -> str:
    part = accelerator.process_index if is_sharded(accelerator) else 0
    return f"average-{part:05d}.pt"


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
