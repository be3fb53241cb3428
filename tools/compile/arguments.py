"""The options that `python -m tools.compile` and `python -m tools.verify` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from csrc_triton.specs import TRITON_TYPES

from .machine_code import Target, default_cache


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _targets(text: str) -> list[Target]:
    try:
        targets = [Target.parse(name) for name in _listed(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not targets:
        raise argparse.ArgumentTypeError("no target is named")
    return targets


def _dtypes(text: str) -> list[str]:
    dtypes = _listed(text)
    if not dtypes or not set(dtypes) <= set(TRITON_TYPES):
        raise argparse.ArgumentTypeError(f"it is {text!r}; known are {', '.join(TRITON_TYPES)}")
    return dtypes


def add_arguments(
    parser: argparse.ArgumentParser, targets: Sequence[str], default_dtypes: str
) -> None:
    """Adds `--targets`, `--dtypes` (`None` when it is not given), `--kernels`, `--json`, `--cache`.

    Args:
        parser: gets the options.
        targets: names of the default targets.
        default_dtypes: what is done without `--dtypes`, for its help.
    """
    parser.add_argument(
        "--targets",
        type=_targets,
        default=",".join(targets),
        help="default: %(default)s",
    )
    parser.add_argument("--dtypes", type=_dtypes, help=f"default: {default_dtypes}")
    parser.add_argument(
        "--kernels",
        metavar="TEXT,...",
        type=_listed,
        default=[],
        help="only kernels with one of these texts in their names",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        type=Path,
        default=default_cache(),
        help="answers of earlier runs, by kernel source, target and options (default: %(default)s)",
    )


def chosen(name: str, texts: Sequence[str]) -> bool:
    """Whether `--kernels` with these texts means a kernel of this name."""
    return not texts or any(text in name for text in texts)
