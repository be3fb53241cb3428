"""Options as classes: how a command line becomes their values, and which of them were given."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from w2vbert_fast.cli.options import REQUIRED, add, argument, given, option, values


class Color(str, enum.Enum):
    red = "red"
    blue = "blue"


@dataclass(kw_only=True)
class Paths:
    source: Path = argument("What is read.", metavar="SOURCE")


@dataclass(kw_only=True)
class Sizes:
    num_rows: int = option(3, "Rows.")
    names: list[str] | None = option(None, "Names.", "--name")


@dataclass(kw_only=True)
class All(Sizes):
    color: Color | None = option(None, "Its color.")
    title: str = option(REQUIRED, "Its title.")
    quiet: bool = option(False, "Say nothing.")


def invoke(command: Callable[..., int], *arguments: str) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)  # keeps the only command a command
    add(app, command, short="Runs.", help_text="Runs it.")
    return CliRunner().invoke(app, ["test-options", *arguments])


def test_values_are_those_of_the_command_line() -> None:
    seen: list[tuple[Paths, All]] = []

    def command(paths: Paths, everything: All) -> int:
        seen.append((paths, everything))
        return 7

    line = ["a.txt", "--title", "x", "--name", "b", "--name", "c", "--color", "blue", "--quiet"]
    assert invoke(command, *line).exit_code == 7
    ((paths, everything),) = seen
    assert paths == Paths(source=Path("a.txt"))
    assert everything == All(title="x", names=["b", "c"], color=Color.blue, quiet=True)
    expected = {"num_rows": 3, "names": ["b", "c"], "color": "blue", "title": "x", "quiet": True}
    assert values(everything) == expected
    assert given(everything) == ["--name", "--color", "--title", "--quiet"]
    assert given(everything, Sizes) == ["--name"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--title", "x"], "SOURCE"),
        (["a.txt"], "--title"),
        (["a.txt", "--title", "x", "--color", "green"], "--color"),
        (["a.txt", "--title", "x", "--no-quiet"], "--no-quiet"),
        (["a.txt", "--title", "x", "--num-rows", "many"], "--num-rows"),
    ],
)
def test_wrong_usage(line: list[str], message: str) -> None:
    def command(paths: Paths, everything: All) -> int:
        raise AssertionError("it ran")

    result = invoke(command, *line)
    assert result.exit_code == 2
    assert message in result.output


def test_what_was_not_given_is_not_told() -> None:
    def command(paths: Paths, sizes: Sizes) -> int:
        assert given(paths) == ["--source"] and given(sizes) == []
        return 0

    assert invoke(command, "a.txt").exit_code == 0


def test_errors_of_the_user_are_one_line_and_others_are_not_hidden() -> None:
    def missing(sizes: Sizes) -> int:
        raise FileNotFoundError("no\nsuch file")

    def faulty(sizes: Sizes) -> int:
        raise ZeroDivisionError

    def closed(sizes: Sizes) -> int:
        raise BrokenPipeError

    result = invoke(missing)
    assert (result.exit_code, result.stderr) == (2, "w2vbert-fast: no such file\n")
    assert isinstance(invoke(faulty).exception, ZeroDivisionError)
    assert not invoke(closed).stderr
