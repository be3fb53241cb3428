"""Which of the files in a folder or in a tar file are recordings.

What is read when it is named is read in a folder too: names that recordings usually have are
believed, and of other files the content decides. What is passed over is counted, by reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from w2vbert_fast.recordings.audio import holds_audio
from w2vbert_fast.recordings.audio_files import HEAD, is_text
from w2vbert_fast.recordings.compressed import name_inside

AUDIO_SUFFIXES = frozenset(
    (
        *("3g2", "3ga", "3gp", "aac", "ac3", "aif", "aifc", "aiff", "amr", "ape", "asf", "au"),
        *("avi", "awb", "bwf", "caf", "dts", "eac3", "f4v", "flac", "flv", "gsm", "m2ts", "m4a"),
        *("m4b", "m4r", "m4v", "mka", "mkv", "mov", "mp2", "mp3", "mp4", "mpc", "mpeg", "mpg"),
        *("mpga", "mxf", "oga", "ogg", "ogv", "opus", "qcp", "ra", "rf64", "rm", "rmvb", "snd"),
        *("sph", "spx", "tak", "tta", "voc", "vob", "w64", "wav", "weba", "webm", "wma", "wmv"),
        *("wtv", "wv"),
    )
)
"""Endings of names, in small letters, that are taken for recordings without a look into them."""

# A look into these would take long in large corpora, and is never worth it.
_OTHER_SUFFIXES = frozenset(
    (
        *("7z", "arrow", "bmp", "bz2", "ckpt", "gif", "gz", "h5", "hdf5", "jpeg", "jpg", "npy"),
        *("npz", "onnx", "pdf", "pickle", "pkl", "png", "pt", "pth", "pyc", "rar", "safetensors"),
        *("sqlite", "tif", "tiff", "webp", "xz", "zip", "zst"),
    )
)
_MANIFEST_SUFFIXES = frozenset(("jsonl", "ndjson", "csv", "tsv", "parquet"))
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

NO_AUDIO = "hold no audio"
EMPTY = "are empty"
MANIFEST = "are manifests, which are read when they are named"
TAR = "are tar files, which are read when they are named"
NO_FILE = "are no files"
UNKNOWN = "have no ending of a recording's name, and are not fetched for a look into them"
TWICE = "are links to what is read under another name"

_EXAMPLES = 3


@dataclass
class PassedOver:
    """What of an input was not read.

    Attributes:
        counts: how many files, by reason.
        examples: names of a few of them, by reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count a file, or several of which one is named."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        some = self.examples.setdefault(reason, [])
        if len(some) < _EXAMPLES:
            # A name that is not UTF-8 with its bytes as escapes.
            some.append(name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))

    def update(self, other: PassedOver) -> None:
        """Count what another one has counted."""
        for reason, count in other.counts.items():
            names = other.examples[reason]
            self.add(reason, names[0], count)
            for name in names[1 : 1 + _EXAMPLES - len(self.examples[reason])]:
                self.examples[reason].append(name)

    def as_json(self) -> dict[str, Any]:
        """Counts and examples by reason."""
        return {
            reason: {"files": count, "examples": self.examples[reason]}
            for reason, count in self.counts.items()
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PassedOver:
        """What `as_json` has made."""
        return cls(
            {reason: found["files"] for reason, found in content.items()},
            {reason: list(found["examples"]) for reason, found in content.items()},
        )

    def __str__(self) -> str:
        """In one line; empty where nothing was passed over."""
        parts = []
        for reason, count in self.counts.items():
            names = [os.path.basename(name.rstrip(os.sep)) for name in self.examples[reason]]
            more = ["..."] if count > len(names) else []
            parts.append(f"{count} {reason} ({', '.join([*names, *more])})")
        return "; ".join(parts)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: `.name`, `._name`, `__MACOSX`."""
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def ending(name: str) -> str:
    """What stands behind the last full stop of a name, in small letters."""
    return os.path.splitext(name)[1][1:].lower()


def why_not_by_name(name: str) -> str | None:
    """Why a file is no recording, "" where it is one, by its name; None: it has to be looked at."""
    suffix = ending(name)
    if suffix in AUDIO_SUFFIXES:
        return ""
    if name.lower().endswith(TAR_SUFFIXES):
        return TAR
    if ending(name_inside(name)) in _MANIFEST_SUFFIXES:
        return MANIFEST
    return NO_AUDIO if suffix in _OTHER_SUFFIXES else None


def why_not(path_or_content: str | bytes) -> str:
    """Why a file, or content, is no recording, by what is in it; "" where it is one.

    A file that cannot be opened counts as a recording, so that its row says what is wrong.

    Raises:
        ImportError: soundfile or PyAV is needed and not installed.
    """
    try:
        if isinstance(path_or_content, bytes):
            head = path_or_content[:HEAD]
        else:
            if not os.path.isfile(path_or_content):
                return NO_FILE
            with open(path_or_content, "rb") as file:
                head = file.read(HEAD)
        if not head:
            return EMPTY
        if is_text(head):
            return NO_AUDIO
        return "" if holds_audio(path_or_content) else NO_AUDIO
    except OSError:
        return ""
