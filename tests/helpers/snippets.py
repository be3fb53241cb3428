"""The fenced blocks of Markdown pages, run as a reader would who stands in a folder of his own.

Python runs in this process, a page's blocks one after another in one namespace; `w2vbert-fast` and
`python -m` do too, so that libraries are imported once. Whatever else a page tells the reader to do
is looked up: extras in pyproject.toml, targets in the Makefile.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tomllib

from w2vbert_fast import cli

ROOT = Path(__file__).resolve().parent.parent.parent
LANGUAGES = ("python", "console", "text", "yaml")
"""What a block may be. `text` is not run: formulas, messages, pictures."""

_FRESH = {"__name__": "__main__"}
_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: from the repository's root.
        line: of its first line in the page, from 1.
        language: behind the opening fence.
        text: between the fences.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A line behind a prompt, continuations joined, and the output that the page shows of it."""

    line: str
    output: tuple[str, ...]


def blocks(page: Path, root: Path = ROOT) -> list[Block]:
    """The blocks of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(root))
    return [
        Block(name, text.count("\n", 0, found.start()) + 2, found[1], found[2])
        for found in _FENCE.finditer(text)
    ]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a `console` block.

    Raises:
        ValueError: it begins with something else than a prompt, `$ `.
    """
    text = block.text.replace("\\\n", " ")
    first, *rest = re.split(r"^(?:\w+)?\$ +", text, flags=re.MULTILINE)
    if first.strip():
        raise ValueError(f"{block}: {first.strip()!r} has no prompt")
    for entry in rest:
        line, *output = entry.rstrip("\n").split("\n")
        yield Command(re.sub(r"\s+#.*", "", line).strip(), tuple(output))


def words(line: str) -> list[str]:
    """A command's words; patterns that are not quoted become the files that they match."""
    found: list[str] = []
    for raw in shlex.split(line, posix=False):
        (word,) = shlex.split(raw)
        matches = sorted(glob.glob(word)) if raw == word and glob.has_magic(word) else []
        found += matches or [word]
    return found


class Reader:
    """Runs the blocks of one page.

    Args:
        replaced: text -> what stands in for it, in blocks and commands.
        added: beginning of a command -> words put behind it.
        not_run: beginnings of commands that are passed over.
    """

    def __init__(
        self, replaced: dict[str, str], added: dict[str, str], not_run: Iterable[str]
    ) -> None:
        self.names: dict[str, Any] = dict(_FRESH)
        self._replaced, self._added, self._not_run = replaced, added, tuple(not_run)

    def read(self, page: Iterable[Block], *, apart: bool) -> None:
        """Runs blocks in their order.

        Args:
            page: the blocks.
            apart: no Python block sees the names of the ones before.

        Raises:
            AssertionError: a command fails, or does not print what the page shows.
            Exception: whatever a Python block raises.
        """
        for block in page:
            if apart:
                self.names = dict(_FRESH)
            if block.language == "python":
                self._python(block)
            elif block.language == "console":
                for command in commands(block):
                    if not command.line.startswith(self._not_run):
                        self._command(command)

    def _as_run(self, text: str) -> str:
        for theirs, ours in self._replaced.items():
            text = text.replace(theirs, ours)
        return text

    def _python(self, block: Block) -> None:
        # Tracebacks name the page and its line.
        source = "\n" * (block.line - 1) + self._as_run(block.text)
        exec(compile(source, block.page, "exec"), self.names)

    def _command(self, command: Command) -> None:
        line = self._as_run(command.line)
        line += "".join(f" {more}" for start, more in self._added.items() if line.startswith(start))
        program, *arguments = words(line)
        if program == "make":
            line = recipe(*arguments)
            program, *arguments = words(line)
        if program == "pip":
            assert_requirement(arguments)
            return
        assert program == "w2vbert-fast", f"no rule runs {line!r}"
        content = b""
        if "<" in arguments:
            arguments, (_, file) = arguments[:-2], arguments[-2:]
            content = Path(file).read_bytes()
        status, printed = run_cli(arguments, content)
        assert status == 0, f"{line}\nexit status {status}\n{printed}"
        missing = [row for row in command.output if _timeless(row) not in _timeless(printed)]
        assert not missing, f"{line}\ndoes not print {missing}, but\n{printed}"


def _timeless(text: str) -> str:
    return re.sub(r"(real-time factor) [\d.]+", r"\1 0", text)


class _Terminal(io.TextIOWrapper):
    """What is written to it; commands lay out their output as for a terminal."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    def getvalue(self) -> str:
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode()


def run_cli(arguments: list[str], content: bytes = b"") -> tuple[int, str]:
    """Exit status of `w2vbert-fast` with these arguments, and all that it printed.

    Args:
        arguments: the command's.
        content: what comes through standard input.
    """
    printed = _Terminal()
    with (
        mock.patch.dict(os.environ, {"TERM": "dumb"}),
        mock.patch.object(sys, "argv", ["w2vbert-fast", *arguments]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(content))),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), printed.getvalue()
    return 0, printed.getvalue()


def recipe(*arguments: str) -> str:
    """The last line of what `make` would run.

    Raises:
        subprocess.CalledProcessError: there is no such target.
    """
    made = subprocess.run(
        ["make", "-n", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    )
    lines = [line for line in made.stdout.splitlines() if not line.startswith("make")]
    return re.sub(r"^\S*/bin/", "", lines[-1])


def assert_requirement(arguments: list[str]) -> None:
    """`pip install` of this package, with extras that it has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.fullmatch(r"(?:w2vbert_fast|\.)\[([\w,]+)\]", arguments[-1])
    assert arguments[0] == "install" and found is not None, f"no rule for pip {arguments}"
    unknown = {*found[1].split(",")} - {*extras["optional-dependencies"]}
    assert not unknown, f"pyproject.toml has no extras {unknown}"
