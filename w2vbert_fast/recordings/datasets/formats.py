"""The layouts of data sets, the one list of them."""

from __future__ import annotations

import os
from typing import Any

from w2vbert_fast.recordings.datasets.arrow import Parquet, SavedToDisk
from w2vbert_fast.recordings.datasets.folders import AudioFolder, CommonVoice
from w2vbert_fast.recordings.datasets.kaldi import Kaldi
from w2vbert_fast.recordings.datasets.tar import Tar
from w2vbert_fast.recordings.manifest import USUAL, ColumnNames, Csv, JsonLines, Tsv
from w2vbert_fast.recordings.rows import Part

FORMATS: tuple[Any, ...] = (
    *(Kaldi, SavedToDisk, AudioFolder, CommonVoice),
    *(Parquet, Tar, JsonLines, Csv, Tsv),
)
"""Each has `open(path, names)`: the parts of a data set of its layout, none of anything else. What
asks for more comes first: a `metadata.csv` with `file_name` is one of an AudioFolder."""


def open_dataset(path: str | os.PathLike[str], names: ColumnNames = USUAL) -> list[Part]:
    """The data set that a file or a folder is, in one part or in several; none where it is none.

    Args:
        path: the file or the folder.
        names: what its columns mean.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or holds several data sets.
        ImportError: it needs pyarrow, which is not installed.
    """
    found: list[Part] = []
    for layout in FORMATS:
        found = found or layout.open(os.fspath(path), names)
    return found
