"""Answers of earlier runs, which took long to find: a JSON file each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def kept(file: Path) -> dict[str, Any] | None:
    """The answer that was kept in a file, if it is there."""
    if not file.exists():
        return None
    answer: dict[str, Any] = json.loads(file.read_text())
    return answer


def keep(file: Path, answer: dict[str, Any]) -> None:
    """Keeps an answer; the folder is made when it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: another process may read it at the same time.
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(answer))
    unfinished.replace(file)
