"""Every path, name, command and link that README, CONTRIBUTING and docs mention is there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import w2vbert_fast.ops  # noqa: F401  (registers the operations)
from tests.helpers.snippets import ROOT

PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "tools" / "virtual_gpu" / "README.md",
    ROOT / "w2vbert_fast" / "demo" / "MODEL_CARD.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
WRITTEN = ("bench/results/cpu.json",)
"""What commands write."""
PACKAGES = ("w2vbert_fast", "csrc_triton", "tools", "bench", "tests")
VARIABLES = ("config", "model", "norm", "ray", "tokenizer", "transformers")
"""First parts of dotted names that are no modules of ours, though some bear the name."""
BASES = ("", "w2vbert_fast", "csrc_triton", "csrc_triton/*", "w2vbert_fast/inference/jobs")
"""Folders that a path may start from."""

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"``?([^`]+)``?")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
_ENDING = re.compile(r"\.(html|jsonl?|py|txt)$")
_DOTTED = re.compile(r"([a-z]\w*(?:\.\w+)+)(?:\(.*)?")


@cache
def files() -> frozenset[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return frozenset(line for line in listed.stdout.splitlines() if (ROOT / line).exists())


@cache
def folders() -> frozenset[str]:
    return frozenset(str(parent) for file in files() for parent in Path(file).parents)


@cache
def is_there(path: str) -> bool:
    """Whether a path, in which NAME and * stand for anything, is one of the repository."""
    pattern = re.sub(r"NAME|SCRIPT|FILE", "*", path.rstrip("/"))
    if "/" not in path and path.endswith(".py"):  # a file that the text has placed
        return pattern.startswith("*") or any(name.endswith(f"/{pattern}") for name in files())
    for base in BASES:
        full = f"{base}/{pattern}".lstrip("/")
        wanted = re.compile(re.escape(full).replace(r"\*", "[^/]*"))
        if any(wanted.fullmatch(name) for name in (*files(), *folders())):
            return True
    return False


@cache
def rooms() -> frozenset[str]:
    """First parts of paths that are meant to be of this repository."""
    top = {name.split("/")[0] for name in folders() if name != "."}
    package = {path.name for path in (ROOT / "w2vbert_fast").iterdir() if path.is_dir()}
    return frozenset((top | package) - {"__pycache__"})


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and not module.startswith(error.name):
                raise
            continue
        for part in parts[cut:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


@cache
def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def problems(code: str) -> Iterator[str]:
    """What is wrong with a piece of code in a page."""
    for module in re.findall(r"python -m ([\w.]+)", code):
        if module.split(".")[0] in PACKAGES and importlib.util.find_spec(module) is None:
            yield f"there is no module {module}"
    for target in re.findall(r"(?:^|[`$;&] *)make ([a-z][\w-]*)", code):
        if not re.search(rf"^{target}:", makefile(), re.MULTILINE):
            yield f"the Makefile has no target {target}"
    for operation in re.findall(r"w2vbert::(\w+)", code):
        if operation.strip("_") and not hasattr(torch.ops.w2vbert, operation):
            yield f"there is no operation {operation}"
    for word in re.split(r"[\s,;:()'\"]+", code):
        if _PATH.fullmatch(word) and ("/" in word or word.endswith(".py")):
            ours = word.split("/")[0] in rooms() if "/" in word else True
            if ours and word not in WRITTEN and not is_there(word):
                yield f"there is no file {word}"
    found = _DOTTED.fullmatch(code)
    if found and not _ENDING.search(found[1]):
        first, _, rest = found[1].partition(".")
        known = () if first in VARIABLES else modules(first)
        if known and not any(resolves(f"{module}.{rest}") for module in known):
            yield f"there is nothing named {found[1]}"


@cache
def modules(name: str) -> tuple[str, ...]:
    """What the first part of a dotted name may be: a package, or a module a page has placed."""
    if name in (*PACKAGES, "torch"):
        return (name,)
    ours = [Path(file) for file in files() if file.startswith(("w2vbert_fast/", "csrc_triton/"))]
    dotted = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in ours}
    return tuple(module for module in dotted if module.rpartition(".")[2] == name)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken_links(page: Path, text: str) -> Iterator[str]:
    for link in _LINK.findall(text):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        if not target.exists():
            yield f"{link} leads nowhere"
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            if anchor not in map(slug, headings):
                yield f"{link}: there is no such heading"


def wrong(page: Path, text: str) -> list[str]:
    prose = _FENCE.sub("", text)
    pieces = [*_CODE.findall(prose), *_FENCE.findall(text)]
    found = [problem for piece in pieces for problem in problems(piece)]
    return [*found, *broken_links(page, prose)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_mentions_is_there(page: Path) -> None:
    assert wrong(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "`w2vbert_fast/ops/no_such.py`",
        "`ops/no_such.py`",
        "`no_such.py`",
        "`tests/no_such/`",
        "`w2vbert_fast.no_such`",
        "`w2vbert_fast.inference.transcribe_all(audio)`",
        "`models.no_such`",
        "`subtitles.no_such(words)`",
        "`torch.no_such`",
        "`python -m bench.no_such`",
        "`make no-such`",
        "`w2vbert::no_such`",
        "[text](no_such.md)",
        "[text](README.md#no-such)",
        "```console\n$ python -m tools.no_such\n```\n",
        "```text\ncsrc_triton/no_such.py\n```\n",
    ],
)
def test_what_is_not_there_is_found(text: str) -> None:
    assert len(wrong(ROOT / "README.md", f"{text}\n")) == 1
