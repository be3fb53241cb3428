"""Proves kernels free of races, from their PTX, at a small fixed launch; the verifier lane.

    python -m tools.verify --targets cuda:80,cuda:90,cuda:100 --json rows.json

asks SentryWard, a static verifier of PTX, whether in every kernel no two threads touch an address
unordered, one of them writing, and all barriers are met by the threads that they wait for. Three
answers: "proved", "refuted" and "not decided", where the verifier has no rule for an instruction
(wgmma), cannot follow control flow that depends on data, or ran out of time or memory.

A proof is about one launch (`tools.verify.small`), distinct tensors that do not overlap, and the
verifier's model of the GPU. A refutation whose witness is a store of one value by several threads
is looked at once more with one of those threads alone: see `stores` and `ALLOWED`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from csrc_triton.launch import interpreting
from tools.answers import keep, kept
from tools.compile.arguments import add_arguments, chosen, show
from tools.compile.shipped import Shipped, shipped_kernels
from tools.table import Table
from tools.verify import stores
from tools.verify.small import small_launches
from tools.verify.stores import CannotFollow, Store, duplicate_stores, keep_one_thread
from tools.virtual_gpu.requests import Uncompiled

TARGETS = ("cuda:80", "cuda:90", "cuda:100")
State = Literal["proved", "refuted", "not decided"]
TIMEOUT = 300.0
"""Seconds for a proof."""
MEMORY_MIB = 8192

_STATES: dict[str, State] = {
    "race_free": "proved",
    "potential_race": "refuted",
    "not_wellsynced": "refuted",
    "invalid_lifecycle": "refuted",
}
# The arrays whose contents steer the control flow, and are told; what a kernel computes is not.
_STEERING = frozenset(
    {
        *("cu_seqlens_ptr", "frame_cu_seqlens_ptr", "out_cu_seqlens_ptr"),
        *("seqused_k_ptr", "tile_map_ptr"),
    }
)
_BAD_QUESTIONS = frozenset({"invalid_input", "missing_input"})


@dataclass(frozen=True)
class Allowed:
    """A duplicate store that was reviewed: several threads store one value to one address.

    The name alone allows nothing: that the values are equal is proved anew each time.

    Attributes:
        kernel: name of the `Shipped` one.
        targets: where it was seen.
        reason: why the values are equal.
    """

    kernel: str
    targets: tuple[str, ...]
    reason: str


_LANES = "the four lanes of a row hold the result of one butterfly reduction"
_WARPS = "the four warps read one sum over rows from shared memory, and lay it out there anew"
ALLOWED = (
    Allowed(
        "ctc_argmax/characters",
        ("cuda:80", "cuda:89", "cuda:90", "cuda:100", "cuda:120"),
        _LANES,
    ),
    Allowed("shaw_attention_fwd/relative_key", ("cuda:80",), f"log-sum-exp: {_LANES}"),
    Allowed("shaw_attention_fwd/no_positions", ("cuda:80",), f"log-sum-exp: {_LANES}"),
    Allowed(
        "shaw_attention_bwd_prepare/no_positions",
        TARGETS,
        "delta: the lanes of a row hold the result of one butterfly reduction",
    ),
    Allowed("epilogue_bwd/linear_silu", TARGETS, _WARPS),
    Allowed("epilogue_bwd/feed_forward", TARGETS, _WARPS),
)


@dataclass(frozen=True)
class Proof:
    """What the verifier says of one kernel.

    Attributes:
        state: "proved", "refuted" or "not decided".
        reason: why it is not proved; empty when it is.
        seconds: of processor time that the verifier took, when it was asked.
        duplicates: source lines of duplicate stores of one value; with any, `state` is what the
            verifier says when one thread of each address makes them.
        timeout: seconds that it had.
    """

    state: State
    reason: str
    seconds: float
    duplicates: tuple[str, ...]
    timeout: float


@dataclass(frozen=True)
class Row:
    """One kernel on one target.

    Attributes:
        target: such as `"cuda:90"`.
        dtype: of the activations.
        kernel: name of the `Shipped` one.
        state: "proved", "refuted" or "not decided"; "refuted" also where the only witnesses are
            duplicate stores.
        reason: why it is not proved.
        seconds: of processor time that the verifier took, when it was asked.
        duplicates: source lines of duplicate stores of one value.
        allowed: the duplicate stores are all that there is, and are in `ALLOWED`.
    """

    target: str
    dtype: str
    kernel: str
    state: State
    reason: str
    seconds: float
    duplicates: tuple[str, ...]
    allowed: bool

    @property
    def failed(self) -> bool:
        """Whether the row makes the command fail: a refutation that is not allowed."""
        return self.state == "refuted" and not self.allowed


def available() -> bool:
    """Whether SentryWard is installed."""
    return importlib.util.find_spec("sentryward") is not None


@dataclass(frozen=True)
class _Question:
    """What the verifier is asked: PTX without source lines, and launch."""

    ptx: str
    source_lines: tuple[str, ...]
    config: dict[str, Any]


def _prepare(ptx: str) -> tuple[str, tuple[str, ...]]:
    """PTX without debug information, and for each of its lines the source line, `"file.py:1"`."""
    lines, sources, source = [], [], ""
    for line in ptx.splitlines():
        if line.lstrip().startswith(".section"):
            break
        if line.lstrip().startswith(".loc"):
            # Triton notes the place as a comment: innermost first, its callers after "@[".
            places = re.findall(r"([\w.]+\.py:\d+)", line.partition("//")[2])
            source = next((p for p in places if not p.startswith("standard.py")), source)
            line = ""
        lines.append("" if line.lstrip().startswith(".file") else line.split("//")[0].rstrip())
        sources.append(source)
    return "\n".join(lines) + "\n", tuple(sources)


def _parameters(ptx: str) -> list[tuple[str, str]]:
    """Name and type of the entry's parameters, in order."""
    return [
        (name, kind) for kind, name in re.findall(r"\.param\s+\.(\w+)\s[^\n]*?(\w+_param_\d+)", ptx)
    ]


def _question(launch: Uncompiled) -> _Question:
    kernel = launch.compiled()
    ptx, sources = _prepare(kernel.asm["ptx"])
    parameters = _parameters(ptx)
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    if threads is None or len(parameters) < len(launch.arguments):
        raise ValueError(f"the PTX of {launch.name} does not fit what was launched")
    scalars, arrays = [], []
    # Behind its own parameters a kernel has those of Triton's scratch memory.
    for argument, (parameter, kind) in zip(launch.arguments, parameters, strict=False):
        if not argument.type.startswith("*"):
            scalars.append({"parameter": parameter, "type": kind, "value": argument.value})
        elif argument.type == "*i32" and argument.name in _STEERING:
            shapes = [[value] for value in argument.value.flatten().tolist()]
            arrays.append({"parameter": parameter, "element_type": "s32", "shapes": shapes})
    config = {
        "schema": "spverify.kernel-input/v1",
        "launch": {
            "grid_dim": list(launch.grid),
            "block_dim": [int(threads[1]), 1, 1],
            "dynamic_shared_bytes": kernel.metadata.shared,
        },
        "arguments": scalars,
    }
    if arrays:
        config["shape_arrays"] = arrays
    return _Question(ptx, sources, config)


def _ask(ptx: str, config: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The verifier's report."""
    from sentryward import verify

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernel.ptx").write_text(ptx)
        (folder / "input.json").write_text(json.dumps(config))
        report: dict[str, Any] = verify(
            folder / "kernel.ptx",
            input=folder / "input.json",
            timeout_seconds=timeout,
            memory_limit_mib=MEMORY_MIB,
        )
    return report


def _first_diagnostic(report: dict[str, Any], sources: tuple[str, ...]) -> str:
    for diagnostic in report.get("diagnostics", []):
        text = str(diagnostic["code"])
        if message := diagnostic.get("message", ""):
            text = f"{text}: {message}"
        details = diagnostic.get("details", {})
        line = details.get("ptx_line") or details.get("location", {}).get("line") or 0
        return f"{text} ({sources[line - 1]})" if 0 < line <= len(sources) else text
    return str(report["result"])


def _witness_lines(report: dict[str, Any]) -> Iterator[set[int]]:
    """The PTX lines of the two accesses of each race that the report shows."""
    for race in report.get("races", []):
        yield {race[side]["location"]["line"] for side in ("first", "second")}


def _child_seconds() -> float:
    """Processor time of the processes that this one has waited for; the verifier is one."""
    times = os.times()
    return times.children_user + times.children_system


def _decide(question: _Question, timeout: float) -> Proof:
    start, used = time.monotonic(), _child_seconds()
    report = _ask(question.ptx, question.config, timeout)
    duplicates: tuple[str, ...] = ()
    problem = ""
    if report["result"] == "potential_race":
        launch = question.config["launch"]
        try:
            found = duplicate_stores(
                question.ptx,
                launch["grid_dim"],
                launch["block_dim"][0],
                {a["parameter"]: a["value"] for a in question.config["arguments"]
                 if isinstance(a["value"], int)},
                {a["parameter"]: [v for (v,) in a["shapes"]]
                 for a in question.config.get("shape_arrays", [])},
            )  # fmt: skip
        except CannotFollow as stop:
            found = {}
            problem = f"; whether it stores one value was not found: {stop}"
        one_value = [store for store in found.values() if isinstance(store, Store)]
        lines = {store.line for store in one_value}
        witnesses = list(_witness_lines(report))
        if witnesses and all(len(pair) == 1 and pair <= lines for pair in witnesses):
            places = (question.source_lines[line - 1] for line in sorted(lines))
            duplicates = tuple(dict.fromkeys(places))
            left = max(timeout - (time.monotonic() - start), 1.0)
            report = _ask(keep_one_thread(question.ptx, one_value), question.config, left)
        elif witnesses:
            line = max(witnesses[0])
            why = found.get(line)
            problem += f" ({question.source_lines[line - 1]})"
            problem += f"; {why}" if isinstance(why, str) else ""
    if report["result"] in _BAD_QUESTIONS:
        why = _first_diagnostic(report, question.source_lines)
        raise ValueError(f"the verifier was asked wrongly: {why}")
    state = _STATES.get(report["result"], "not decided")
    reason = _first_diagnostic(report, question.source_lines) + problem
    reason = "" if state == "proved" else reason
    return Proof(state, reason, round(_child_seconds() - used, 1), duplicates, timeout)


@functools.cache
def _version() -> str:
    files = (Path(__file__), Path(stores.__file__))
    own = "".join(file.read_text() for file in files)
    return importlib.metadata.version("sentryward") + own


def _proof(question: _Question, timeout: float, cache: Path) -> Proof:
    """Decides, or takes the answer of last time; one that lacked time is asked for again."""
    facts = (question.ptx, question.config, _version())
    file = cache / f"proof-{hashlib.sha256(repr(facts).encode()).hexdigest()}.json"
    if (answer := kept(file)) is not None:
        proof = Proof(**{**answer, "duplicates": tuple(answer["duplicates"])})
        if proof.state != "not decided" or proof.timeout >= timeout:
            return proof
    proof = _decide(question, timeout)
    if not proof.reason.startswith("tool_failure"):
        keep(file, asdict(proof))
    return proof


def verify_kernel(
    kernel: Shipped, launch: Uncompiled | None, cache: Path, timeout: float = TIMEOUT
) -> Row:
    """Proves or refutes that a kernel is free of races and meets its barriers.

    Args:
        kernel: what ships.
        launch: of that kernel, a small one; `None` where there is none.
        cache: folder with the answers of earlier runs, by PTX, launch and verifier.
        timeout: seconds for the proof; past them it is not decided.

    Raises:
        ValueError: the verifier rejects the launch.
    """
    facts = (kernel.target.name, kernel.dtype, kernel.name)
    if kernel.target.gpu.backend != "cuda":
        return Row(*facts, "not decided", "the verifier reads PTX", 0.0, (), False)
    if launch is None:
        return Row(*facts, "not decided", "no launch is given for it", 0.0, (), False)
    proof = _proof(_question(launch), timeout, cache)
    state, reason, allowed = proof.state, proof.reason, False
    if proof.duplicates:
        places = ", ".join(proof.duplicates)
        entry = next(
            (a for a in ALLOWED if a.kernel == kernel.name and kernel.target.name in a.targets),
            None,
        )
        if state == "proved":
            state, allowed = "refuted", entry is not None
            why = entry.reason if entry else "not in ALLOWED, so look at it and add it"
            reason = f"only by threads that store one value to one address ({places}): {why}"
        else:
            reason = f"{reason}; besides threads that store one value to one address ({places})"
    return Row(*facts, state, reason, proof.seconds, proof.duplicates, allowed)


_TABLE = Table(
    (
        ("target", 9),
        ("dtype", 8),
        ("kernel", 52),
        ("state", 22),
        ("seconds", 7),
        ("why", 3),
    )
)


def table_line(row: Row) -> str:
    """A row of the table, in Markdown."""
    state = f"{row.state} (allowed)" if row.allowed else row.state
    return _TABLE.line((row.target, row.dtype, row.kernel, state, f"{row.seconds:.1f}", row.reason))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a number above 0")
    return seconds


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    for target in options.targets:
        seen: set[str] = set()
        for dtype in options.dtypes or ["bfloat16", "float32"]:
            launches = small_launches(target, dtype)
            for kernel in shipped_kernels(target, dtype):
                family = kernel.request.name
                if options.dtypes is None and dtype == "float32" and family in seen:
                    continue
                if dtype == "bfloat16":
                    seen.add(family)
                if chosen(kernel.name, options.kernels):
                    launch = launches.get(kernel.request.key)
                    yield verify_kernel(kernel, launch, options.cache, options.timeout)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify",
        description="Proves each kernel free of races and its barriers right, at a small launch. A "
        "refutation makes the exit status 1, unless threads that store one value to one address "
        "are all there is and the kernel is listed for it; 'not decided' is counted apart, is no "
        "pass, and does not make it 1.",
    )
    add_arguments(parser, TARGETS, "bfloat16, and float32 for what exists in no other")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=TIMEOUT,
        help="for one proof; past it, it is not decided (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if interpreting():
        print("error: TRITON_INTERPRET is set, so nothing can be compiled", file=sys.stderr)
        return 2
    if not available():
        print("error: this needs sentryward: pip install 'w2vbert-fast[verify]'", file=sys.stderr)
        return 2
    if not (rows := show(_rows(options), _TABLE, table_line, options)):
        return 2
    counts = Counter(row.state for row in rows)
    allowed = [row for row in rows if row.allowed]
    if allowed:
        print("\nrefuted and allowed, because threads store one value to one address:")
    for row in allowed:
        print(f"  {row.kernel}, {row.dtype}, {row.target}: {', '.join(row.duplicates)}")
    print(
        f"\n{len(rows)} questions: {counts['proved']} proved, {counts['refuted']} refuted "
        f"({len(allowed)} of them allowed), {counts['not decided']} not decided"
    )
    return 1 if any(row.failed for row in rows) else 0
