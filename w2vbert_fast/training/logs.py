"""What a run leaves to be read: JSON lines, TensorBoard events, a curve, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from w2vbert_fast._extras import require
from w2vbert_fast.checkpoints.files import staged_file, write_text

METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"
PREDICTIONS_FILE = "predictions.jsonl"
CURVE_FILE = "curve.png"
TENSORBOARD_FOLDER = "tensorboard"


def to_json_line(row: Mapping[str, Any]) -> str:
    """A row as a line of strict JSON: NaN and infinity become null."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(clean, ensure_ascii=False) + "\n"


class JsonLines:
    """A growing file of JSON lines, each with the step that it belongs to.

    Args:
        path: the file.
        step: rows of later steps are taken out: the killed run that wrote them has gone on further
            than its saved state. So is a line that was cut off.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.rows: list[dict[str, Any]] = []
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    row = json.loads(line)
                    if isinstance(row, dict) and step >= row.get("step", 0) > 0:
                        self.rows.append(row)
        write_text(path, "".join(map(to_json_line, self.rows)))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self.rows.append(dict(row))
        self._file.write(to_json_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by one with these rows."""
    write_text(path, "".join(map(to_json_line, rows)))


class RunLog:
    """The logs of the main process.

    Args:
        out: the folder of the run.
        step: step that the run starts from; see `JsonLines`.
        total: steps of the run.
        score: name of the score that the curve shows.
        tensorboard: whether to write TensorBoard events.
    """

    def __init__(self, out: Path, step: int, total: int, score: str, tensorboard: bool) -> None:
        self.out = out
        self.score = score
        self.metrics = JsonLines(out / METRICS_FILE, step)
        self._events: Any = None
        if tensorboard:
            require("tensorboard", "train")
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(
                str(out / TENSORBOARD_FOLDER), purge_step=step + 1 if step else None
            )
        self._bar = ProgressBar(step, total)

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of `metrics.jsonl`: the step and numbers."""
        self.metrics.write(row)
        self._bar.show(row)
        if self._events is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, row["step"])
            self._events.flush()

    def advance(self, step: int) -> None:
        """A step is done."""
        self._bar.advance(step)

    def draw(self) -> None:
        """Draw the curve anew."""
        draw_curve(self.metrics.rows, self.score, self.out / CURVE_FILE)

    def close(self) -> None:
        """Close all files and the bar."""
        self.metrics.close()
        self._bar.close()
        if self._events is not None:
            self._events.close()


class ProgressBar:
    """Steps done and the last numbers; lines where standard error is no terminal.

    Args:
        step: step to start from.
        total: steps of the run.
    """

    def __init__(self, step: int, total: int) -> None:
        self.total = total
        self._bar: Any = None
        if sys.stderr.isatty():
            require("rich", "train")
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("step"),
                progress.MofNCompleteColumn(),
                progress.BarColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.description}"),
                console=Console(stderr=True, highlight=False),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=step)

    def advance(self, step: int) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, row: Mapping[str, Any]) -> None:
        """Show a row of the log."""
        if self._bar is not None:
            shown = {k: v for k, v in row.items() if k == "loss" or k.startswith("eval_")}
            text = "  ".join(
                f"{name} {value:.4g}"
                for name, value in shown.items()
                if name not in ("eval_skipped", "eval_seconds")
            )
            self._bar.update(self._task, description=text)
        else:
            numbers = "  ".join(
                f"{name} {value:.4g}"
                for name, value in row.items()
                if name != "step" and isinstance(value, int | float)
            )
            with contextlib.suppress(OSError):
                print(f"step {row['step']}/{self.total}  {numbers}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


def draw_curve(rows: Sequence[Mapping[str, Any]], score: str, path: str | os.PathLike[str]) -> None:
    """Training and evaluation loss and the score over the steps, as a PNG.

    Args:
        rows: rows of `metrics.jsonl`.
        score: name of the score.
        path: the file.
    """
    require("matplotlib", "train")
    # The object interface, which leaves the plotting state of the caller alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, names in (
        (left, (("loss", "training"), ("eval_loss", "evaluation"))),
        (right, ((f"eval_{score}", score),)),
    ):
        for name, label in names:
            # A loss that could not be computed leaves a gap.
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=label, marker="." if axes is right else ""
                )
        axes.set_xlabel("step")
    left.set_ylabel("loss")
    titles = {"wer": "word error rate", "cer": "character error rate"}
    right.set_ylabel(titles.get(score, score))
    right.set_ylim(bottom=0)
    if left.lines:
        left.legend()
    # A fixed layout: to compute one takes as long as the drawing.
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.13, top=0.96)
    path = Path(path)
    with staged_file(path) as staged:
        figure.savefig(staged.path, dpi=100, format="png")
        staged.commit()
