"""How far a job is: one line for people, JSON lines for machines, a summary at the end."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, TextIO

from w2vbert_fast import __version__
from w2vbert_fast._extras import versions as versions_of
from w2vbert_fast.recordings.rows import how_many

PACKAGES = ("torch", "triton", "numpy", "soundfile", "soxr", "av", "pyarrow")

_TERMINAL_SECONDS = 0.5
_FILE_SECONDS = 30.0
_JSON_SECONDS = 5.0


class Progress:
    """Reports on a job.

    Args:
        total: rows of the input; None where nobody knows yet.
        done: rows that earlier runs have done.
        errors: errors among them.
        as_json: JSON lines instead of text.
        stream: where to; None: standard error.
    """

    def __init__(
        self,
        total: int | None,
        done: int,
        errors: int,
        *,
        as_json: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.total = total
        self.done = done
        self.errors = errors
        self.rows = 0
        self.audio_seconds = 0.0
        self.start = time.perf_counter()
        self._as_json = as_json
        self._stream = stream or sys.stderr
        self._on_terminal = not as_json and self._stream.isatty()
        self._shown = self.start if not self._on_terminal else 0.0
        self._width = 0
        self._begun = 0.0  # seconds of audio of rows that are not done

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def state(self) -> dict[str, Any]:
        """The numbers: rows, hours of audio, real-time factor, seconds to go."""
        elapsed = self.elapsed
        left = None if self.total is None else max(0, self.total - self.done)
        eta = None if left is None or self.rows == 0 else left * elapsed / self.rows
        seconds = self.audio_seconds + self._begun
        factor = elapsed / seconds if seconds > 0 else None
        return {
            "done": self.done,
            "total": self.total,
            "audio_hours": round(seconds / 3600, 4),
            "real_time_factor": None if factor is None else round(factor, 6),
            "eta_seconds": None if eta is None else round(eta, 1),
            "errors": self.errors,
            "elapsed_seconds": round(elapsed, 2),
        }

    def update(self, rows: int, errors: int, audio_seconds: float) -> None:
        """Count rows of this run, and show it if it is time to.

        Raises:
            OSError: nobody reads the stream any more.
        """
        self.done += rows
        self.rows += rows
        self.errors += errors
        self.audio_seconds += audio_seconds
        self._begun = 0.0
        self._show_in_time()

    def begin(self, audio_seconds: float) -> None:
        """Say how much audio of rows that are not done yet is; shown on a terminal.

        Raises:
            OSError: nobody reads the stream any more.
        """
        if self._on_terminal:
            self._begun = audio_seconds
            self._show_in_time()

    def _show_in_time(self) -> None:
        now = time.perf_counter()
        wait = _JSON_SECONDS if self._as_json else _FILE_SECONDS
        if now - self._shown >= (_TERMINAL_SECONDS if self._on_terminal else wait):
            self._shown = now
            self.show()

    def show(self, event: str = "progress") -> None:
        """Show the state now."""
        if self._as_json:
            self.event(event, self.state())
        elif self._on_terminal:
            line = self.line()
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
            self._stream.flush()
        else:
            self._stream.write(self.line() + "\n")
            self._stream.flush()

    def event(self, event: str, content: Mapping[str, Any]) -> None:
        """Write a JSON line, where JSON is written."""
        if self._as_json:
            self._stream.write(json.dumps({"event": event, **content}) + "\n")
            self._stream.flush()

    def line(self) -> str:
        """The state in one line."""
        state = self.state()
        total = "?" if self.total is None else str(self.total)
        factor = state["real_time_factor"]
        parts = [f"{self.done}/{total}", f"{state['audio_hours']:.2f} h of audio"]
        parts.append("RTF -" if factor is None else f"RTF {factor:.4f}")
        parts.append("ETA " + duration(state["eta_seconds"]))
        parts.append(how_many(self.errors, "error"))
        return "  ".join(parts)

    def close(self) -> None:
        """End the line on a terminal."""
        if self._on_terminal:
            self.show()
            self._stream.write("\n")
            self._stream.flush()


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results may depend on."""
    return {"w2vbert_fast": __version__, **versions_of(PACKAGES)}


def peak_memory() -> int | None:
    """The largest resident set of this process so far, in bytes; None where nobody knows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def error_counts(counts: Counter[str]) -> dict[str, int]:
    """Errors by type, the most frequent first."""
    return dict(counts.most_common())
