"""JSON files in and out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.files import write_text


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a UTF-8 JSON file that holds an object.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no JSON, or no object; the message names the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def to_json_string(content: Mapping[str, Any]) -> str:
    """The text that `write_json` writes."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes a UTF-8 JSON file; a reader finds the old content or the new, never a part of it."""
    write_text(Path(path), to_json_string(content))
