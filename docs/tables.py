"""Writes the tables of README and docs that a command can make: `python docs/tables.py`.

A table stands below `<!-- table: NAME -->`, up to an empty line, and is what `TABLES[NAME]`
returns. `--check` writes nothing and names the tables that are not what they would be.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*/*.md")))
RESULTS = ROOT / "bench" / "results" / "cpu_2_cores"
MACHINES = {
    "Intel Xeon, AMX": "cpu_amx.json",
    "AMD EPYC, AVX512-BF16": "cpu_2_cores/all.json",
    "of the same description": "cpu_slower_gemm.json",
}
"""Runs of `make bench` on two cores by machine: that of all tables, the newest, and others."""
EXECUTED = ROOT / "docs" / "inside" / "executed.json"
"""`python -m tests.kernels --summary` writes it."""
OURS = "w2vbert_fast"

_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n)((?:.+\n)*)")
_LIBRARIES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "ctranslate2": "CTranslate2"}
_WORK = {
    "1x10s": "1 x 10 s",
    "1x30s": "1 x 30 s",
    "1x60s": "1 x 60 s",
    "1x300s": "1 x 300 s",
    "16x1-20s": "16 utterances of 1 to 19 s",
    "1x30s, adapter": "1 x 30 s, one adapter layer",
    "1x30s, layer 17": "`encode(layer=17)`, 1 x 30 s",
    "8x30s": "features, 8 x 30 s",
    "16x1-20s, demo": "waveform to text, 16 utterances, demo model",
    "train 1x30s": "1 x 30 s",
    "train 8x1-20s": "8 utterances of 1 to 19 s",
}
_IN_README = (
    ("1x10s", "fp32"),
    ("1x10s", "int8"),
    ("1x30s", "bf16"),
    ("1x30s, layer 17", "fp32"),
    ("16x1-20s", "fp32"),
    ("16x1-20s, demo", "fp32"),
)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, one line a row."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _content(file: str, folder: Path = RESULTS) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / file).read_text())
    return content


def _rows(file: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    return [row for row in _content(file, folder)["rows"] if row["seconds"] is not None]


def _peer(row: dict[str, Any]) -> str:
    library = _LIBRARIES.get(row["implementation"], row["implementation"])
    return ", ".join(filter(None, (library, row["configuration"])))


def _digits(number: float) -> str:
    """Three of them."""
    return f"{number:#.3g}".rstrip(".")


def _seconds(row: dict[str, Any]) -> str:
    return _digits(row["seconds"]["median"])


def _ratio(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return f"{theirs['seconds']['median'] / ours['seconds']['median']:.1f}"


def _median(row: dict[str, Any]) -> float:
    return float(row["seconds"]["median"])


def _ours(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Ours with its weights as stored."""
    return next(
        row
        for row in rows
        if row["implementation"] == OURS and "packed" not in row["configuration"]
    )


class _Compared(NamedTuple):
    """Ours and the fastest peer on a machine."""

    machine: str
    gemm_rate: float | None  # FLOP/s, where one was measured in this dtype
    ours: dict[str, Any]
    best: dict[str, Any] | None


def _compared(work: str, dtype: str) -> list[_Compared]:
    """What machines have measured of this, that of all tables first."""
    found = []
    for machine, file in MACHINES.items():
        content = _content(file, RESULTS.parent)
        rows = [
            row
            for row in _rows(file, RESULTS.parent)
            if (row["workload"], row["dtype"]) == (work, dtype)
        ]
        if rows:
            others = (row for row in rows if row["implementation"] != OURS)
            best = min(others, key=_median, default=None)
            found.append(_Compared(machine, content["gemm_rate"].get(dtype), _ours(rows), best))
    return found


def speed() -> str:
    """Six rows for README: the fastest peer of each."""
    table = []
    for work, dtype in _IN_README:
        (_, _, ours, best), *others = _compared(work, dtype)
        assert best is not None
        table.append(
            [
                _WORK[work],
                str(ours["layers"] or ""),
                dtype,
                _peer(best),
                _seconds(best),
                _seconds(ours),
                _ratio(best, ours),
                ", ".join(
                    _ratio(other.best, other.ours) for other in others if other.best is not None
                ),
            ]
        )
    header = ["work", "layers", "dtype", "fastest other", "seconds", "here", "ratio", "elsewhere"]
    return markdown(header, table)


def machines() -> str:
    """What several machines have measured, with their GEMM's rate."""
    table = []
    for work, dtype in dict.fromkeys((row["workload"], row["dtype"]) for row in _newest()):
        compared = _compared(work, dtype)
        for machine, rate, ours, best in compared if len(compared) > 1 else ():
            share = ours.get("share_of_gemm")  # of the rate in the same rounds
            if share is None and rate is not None and ours["flops"]:
                share = ours["flops"] / _median(ours) / rate
            table.append(
                [
                    _WORK[work],
                    dtype,
                    machine,
                    "" if rate is None else f"{rate / 1e9:,.0f}",
                    _seconds(ours),
                    "" if share is None else f"{share:.2f}",
                    "" if best is None else _peer(best),
                    "" if best is None else _seconds(best),
                    "" if best is None else _ratio(best, ours),
                ]
            )
    header = ["work", "dtype", "machine", "GEMM, GFLOP/s", "here, s", "of the GEMM's rate"]
    return markdown([*header, "fastest other", "s", "ratio"], table)


def speed_of_all() -> str:
    """Every row of the newest run: each peer's fastest configuration, and both forms of ours."""
    return _all(_newest())


def training() -> str:
    """Training steps; of one utterance in fp32 there are two runs."""
    return _all(*map(_rows, ("train_30s.json", "train_30s_fp32.json", "train_mixed.json")))


def _newest() -> list[dict[str, Any]]:
    return _rows(next(iter(MACHINES.values())), RESULTS.parent)


def _all(*runs: list[dict[str, Any]]) -> str:
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for number, rows in enumerate(runs):
        for row in rows:
            groups.setdefault((number, row["workload"], row["dtype"]), []).append(row)
    table = []
    for (_, work, dtype), rows in groups.items():
        ours = _ours(rows)
        fastest: dict[str, dict[str, Any]] = {}
        for row in sorted(rows, key=_median):
            name = row["implementation"]
            if name == OURS:
                name += row["configuration"]
            fastest.setdefault(name, row)
        for row in fastest.values():
            of_ours = row["implementation"] == OURS
            table.append(
                [
                    _WORK[work],
                    str(row["layers"] or ""),
                    dtype,
                    f"**{_peer(row)}**" if of_ours else _peer(row),
                    _seconds(row),
                    f"{_digits(row['seconds']['p20'])} to {_digits(row['seconds']['p80'])}",
                    str(row["seconds"]["rounds"]),
                    "" if row is ours else _ratio(row, ours),
                ]
            )
    header = ["work", "layers", "dtype", "what", "median, s", "p20 to p80", "rounds", "ratio"]
    return markdown(header, table)


def devices() -> str:
    """The implementation of an operation, by device and dtype."""
    import torch

    from w2vbert_fast.models.optimized.int8 import check_int8
    from w2vbert_fast.ops import dispatch

    names = {"triton": "Triton", "cpu": "oneDNN, blocked attention", "plain": "plain PyTorch"}

    def int8(device: str) -> str:
        try:
            check_int8(torch.device(device))
        except ValueError as error:
            return "" if "int8 needs the CPU" in str(error) else "oneDNN"
        return "oneDNN"

    table = []
    for label, device, wanted in (
        ("CUDA (capability 7.5), ROCm", "cuda", "triton"),
        ("CPU", "cpu", "cpu"),
        ("others", "mps", "plain"),
    ):
        found = [
            names[dispatch._if_possible(wanted, device, dtype)]  # type: ignore[arg-type]
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ]
        table.append([label, *found, int8(device)])
    return markdown(["device", "float32", "bfloat16", "float16", "int8"], table)


@functools.cache
def _counts() -> dict[str, Any]:
    from bench.ledger.forward import ledger

    return ledger()


def ledger() -> str:
    """A forward pass, counted."""
    from bench.ledger.forward import counts_table

    table = counts_table(_counts())
    return markdown(table.header, table.rows)


def layer() -> str:
    """What a layer of ours consists of."""
    from bench.ledger.counts import kinds_table
    from bench.ledger.forward import OURS as path

    table = kinds_table("", _counts()["paths"][path]["layer_operations"])
    return markdown(["operation", *table.header[1:]], table.rows)


def roofline() -> str:
    """Its roofline times."""
    from bench.ledger.forward import roofline_table

    table = roofline_table(_counts(), [gpu["name"] for gpu in _counts()["gpus"]])
    return markdown(table.header, table.rows)


def predicted() -> str:
    """Its times, predicted."""
    from bench.ledger.predicted import predictions, predictions_table
    from bench.ledger.workload import Workload

    table = predictions_table(predictions(Workload()))
    return markdown(table.header, table.rows)


def host() -> str:
    """Host time of launches, in multiples of a bare one, before there were launch plans and now."""
    before, now = (
        {row["name"]: row for row in json.loads((RESULTS.parent / file).read_text())["rows"]}
        for file in ("host_before.json", "host.json")
    )
    # A layer was timed by itself then.
    pairs = [(before.get(n.replace("24 layers", "encoder layer")), now[n]) for n in now]
    table = [
        (row["name"], str(row["launches"]), f"{was['multiple']:.1f}", f"{row['multiple']:.1f}")
        for was, row in pairs
        if was is not None
    ]
    header = ("what", "launches", "a launch, x bare, before plans", "now")
    return markdown(header, table)


def executed() -> str:
    """Each kernel as compiled for each target and dtype: what ran without a GPU, and its errors."""
    table = []
    for row in json.loads(EXECUTED.read_text()):
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} x"
        error = f"{row['error']:.1e}" if row["error"] > 0 else ""
        table.append(
            [
                f"`{row['kernel'].removeprefix('csrc_triton.')}`",
                row["target"],
                row["dtype"],
                *(f"{row[count]:,}" for count in ("tests", "launches", "instructions")),
                ratio or error or ("exact" if row["comparisons"] else ""),
                f"{row['comparisons']:,}",
            ]
        )
    header = ["kernel", "target", "dtype", "tests", "launches", "instructions", "worst error"]
    return markdown([*header, "comparisons"], table)


TABLES: dict[str, Callable[[], str]] = {
    "devices": devices,
    "speed": speed,
    "speed-all": speed_of_all,
    "machines": machines,
    "training": training,
    "host": host,
    "executed": executed,
    "ledger": ledger,
    "layer": layer,
    "roofline": roofline,
    "predicted": predicted,
}
SLOW = ("ledger", "layer", "roofline", "predicted")
"""Those that take more than a second; a test looks at the others."""


def current(text: str, names: Iterable[str] = TABLES) -> str:
    """A page with its tables as they would be made now.

    Args:
        text: of the page.
        names: of the tables that are made; others stay.

    Raises:
        ValueError: a table has no name of `TABLES`.
    """

    def made(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"there is no table {found[2]!r}; there are {', '.join(TABLES)}")
        return found[1] + TABLES[found[2]]() if found[2] in names else found[0]

    return _TABLE.sub(made, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    stale = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = current(text)
        if made != text:
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'not current' if options.check else 'written'}")
            if not options.check:
                page.write_text(made, encoding="utf-8")
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
