"""Options of commands: declared once, in classes beside what uses them.

A command is a function of such classes, each of which holds the values of its options::

    @dataclass(kw_only=True)
    class Printing:
        as_json: bool = option(False, "Print one JSON object.", "--json")

    def command(printing: Printing) -> int: ...

Nothing here imports torch, nor typer before a command is added: `--help` answers at once.
"""

from __future__ import annotations

import enum
import inspect
import signal
import threading
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from w2vbert_fast import cpus
from w2vbert_fast.cli.messages import fail

if TYPE_CHECKING:
    import typer

REQUIRED = MISSING
COLUMNS = (
    "What columns of data sets mean, where their names do not say so: audio=path,text=sentence."
)
COLUMNS_METAVAR = "MEANING=COLUMN,..."
_HOW = "how"


@dataclass(frozen=True)
class _How:
    """How an option is written on the command line."""

    help: str
    names: tuple[str, ...]
    metavar: str | None
    is_argument: bool


def option(default: Any, help_text: str, *names: str, metavar: str | None = None) -> Any:
    """A field that is an option.

    Args:
        default: its value where it is not given; `REQUIRED`: it must be.
        help_text: what `--help` says.
        *names: such as "--json"; by default the field's name. A flag has no `--no-` form unless it
            is named here.
        metavar: stands for its value in `--help`.
    """
    return field(default=default, metadata={_HOW: _How(help_text, names, metavar, False)})


def argument(help_text: str, *, metavar: str) -> Any:
    """A field that is given by its place, and must be."""
    return field(metadata={_HOW: _How(help_text, (), metavar, True)})


@dataclass(kw_only=True)
class Cpus:
    """Options of every command."""

    threads: int | None = option(
        None, "Threads that compute on the CPU. Default: as many as this process may use CPUs."
    )

    def take(self) -> None:
        """Let PyTorch compute on no more threads than there are CPUs for it."""
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads is {self.threads}; it must be at least 1")
        torch = _import_torch()
        found = cpus.of_process()
        if self.threads is None and found.usable == found.machine:
            return
        usable = min(found.usable, torch.get_num_threads())
        torch.set_num_threads(usable if self.threads is None else self.threads)


def _import_torch() -> Any:
    """PyTorch, which is imported if it is not yet.

    While it imports NumPy, it takes an interrupt for there being no NumPy, and goes on without. So
    Ctrl-C ends the process at once here, where nothing has begun.
    """
    handler = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread()
    ends = ours and handler is signal.default_int_handler
    if ends:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import torch
    finally:
        if ends:
            signal.signal(signal.SIGINT, handler)
    return torch


def add(app: typer.Typer, command: Callable[..., int], *, short: str, help_text: str) -> None:
    """Add a command to an app. What it raises for reasons of the user's is said, and ends it.

    Args:
        app: the app.
        command: a function of classes with options, one parameter for each, to an exit status. The
            name of its module is the command's, with hyphens.
        short: its line in the list of commands.
        help_text: what its `--help` begins with.
    """
    import typer

    groups: dict[str, type[Any]] = get_type_hints(command)
    groups.pop("return")
    groups["_cpus"] = Cpus

    def run(**given: Any) -> None:
        made = {
            parameter: group(**{entry.name: given[entry.name] for entry in fields(group)})
            for parameter, group in groups.items()
        }
        try:
            made.pop("_cpus").take()
            status = command(**made)
        except BrokenPipeError:
            raise
        except (
            *(OSError, RuntimeError, ValueError, TypeError),
            *(ImportError, MemoryError, FloatingPointError),
        ) as error:
            fail(error)
        raise typer.Exit(status)

    parameters = [
        inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if entry.default is MISSING else entry.default,
            annotation=_annotation(entry, kinds[entry.name]),
        )
        for group in groups.values()
        for kinds in (get_type_hints(group),)
        for entry in fields(group)
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    name = command.__module__.rpartition(".")[2].replace("_", "-")
    app.command(name, short_help=short, help=help_text)(run)


def _annotation(entry: Field[Any], kind: Any) -> Any:
    import typer

    how: _How = entry.metadata[_HOW]
    if how.is_argument:
        return Annotated[kind, typer.Argument(metavar=how.metavar, help=how.help)]
    names = how.names or ((_flag(entry),) if kind is bool else ())
    return Annotated[kind, typer.Option(*names, help=how.help, metavar=how.metavar)]


def _flag(entry: Field[Any]) -> str:
    how: _How = entry.metadata[_HOW]
    return how.names[0] if how.names else f"--{entry.name.replace('_', '-')}"


def given(options: Any, *kinds: type[Any]) -> list[str]:
    """The options that were given, such as "--shard-rows"; of some base classes alone, if named."""
    entries = [entry for kind in kinds or (options,) for entry in fields(kind)]
    # One that can be repeated is an empty list where it is not given.
    return [_flag(e) for e in entries if getattr(options, e.name) not in (e.default, [])]


def values(*options: Any) -> dict[str, Any]:
    """Options by name; of enumerations their values."""
    found = {entry.name: getattr(one, entry.name) for one in options for entry in fields(one)}
    return {
        name: value.value if isinstance(value, enum.Enum) else value
        for name, value in found.items()
    }
