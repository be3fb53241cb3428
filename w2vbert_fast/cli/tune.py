"""The command `w2vbert-fast tune`: what is fastest on this GPU, measured and kept."""

from __future__ import annotations

from dataclasses import dataclass

from w2vbert_fast.cli.jobs import Dtype
from w2vbert_fast.cli.messages import write_line
from w2vbert_fast.cli.options import option

SHORT = "Measure what is fastest on this GPU."
HELP = (
    "Time, on this GPU, every way to compute a model's products (Triton's tiles, PyTorch's own), "
    "up to which batch CUDA graphs pay, and how large a job's batches should be. What is found is "
    "kept in the user's cache, for this GPU, driver, PyTorch and Triton, and read by every program "
    "that runs the fast kernels. Nothing is measured without this command. `doctor` says what is "
    "tuned."
)


@dataclass(kw_only=True)
class Model:
    """The model that is measured, or compiled for."""

    model: str | None = option(
        None,
        "Folder or hub id. Default: the published encoder's shape, with random weights.",
        metavar="PATH|HUB_ID",
    )
    device: str | None = option(None, "cuda or cuda:N. Default: the first.")
    dtype: Dtype | None = option(
        None, "Default: the checkpoint's own; bfloat16 without one. int8 is for CPUs."
    )


@dataclass(kw_only=True)
class Tuning:
    minutes: float = option(2.0, "About how long; 0 measures nothing.")
    export: str | None = option(
        None,
        "Write what is known of this GPU there, as a table for csrc_triton/tuned.",
        metavar="FILE",
    )


def command(model: Model, tuning: Tuning) -> int:
    """Measure and keep; the exit status."""
    from pathlib import Path

    from w2vbert_fast.ops import tuned
    from w2vbert_fast.tuning.model import find_gpu, load

    if not tuning.minutes >= 0:
        raise ValueError(f"--minutes is {tuning.minutes}; it must be at least 0")
    device = find_gpu(model.device)
    file = tuned.user_file()
    if tuning.minutes > 0:
        from w2vbert_fast.tuning.measure import tune

        network = load(model.model, device, model.dtype and model.dtype.value)
        tune(network, 60 * tuning.minutes, lambda entries: tuned.merge(file, entries), write_line)
        write_line(f"kept in {file}")
    if tuning.export is not None:
        here = tuned.machine(device)
        entries = {key: found for key, found in tuned.read(file).items() if key[0] == here}
        Path(tuning.export).write_text(tuned.written(entries), encoding="utf-8")
        write_line(f"{len(entries)} entries of {here.gpu} written to {tuning.export}")
    return 0
