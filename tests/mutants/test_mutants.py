"""A few mutants of a kernel that ships, and the table that must explain those that live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from csrc_triton.launch import interpreting
from tests.helpers.operations import SMALL
from tests.mutants import cases, table
from tests.mutants.__main__ import TARGETS, key, read, run
from tests.mutants.cases import Case
from tools.virtual_gpu.mutants import SYNCHRONISATION, mutants


@pytest.mark.skipif(interpreting(), reason="Triton's interpreter compiles nothing")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_mutants_of_a_kernel(target: str) -> None:
    case = Case("layer_norm", SMALL, target)
    (ptx,) = {ran.launch.ptx for ran in case.ran}
    everything = list(mutants(ptx))
    barriers = [m for m in everything if m.operator in SYNCHRONISATION]
    assert len(barriers) >= 3
    assert {case.tried(ptx, mutant).how for mutant in barriers} == {"fault"}
    # That x - mean is taken the wrong way round shows in the result alone.
    outcomes = [case.tried(ptx, m) for m in everything if "sub.f32" in m.before][:3]
    assert [one.how for one in outcomes] == ["wrong"] * 3
    assert "largest error" in outcomes[0].said
    # Without a mutant nothing is off.
    nothing = next(m for m in everything if m.operator == "constant changed")
    same = type(nothing)(nothing.operator, nothing.line, nothing.before, nothing.before, "")
    assert case.tried(ptx, same).how == "equal"


def row(how: str, **fields: Any) -> dict[str, Any]:
    return {
        **{"target": "sm_80", "operation": "layer_norm", "kernel": "_norm", "ptx": "a", "line": 7},
        **{"operator": "constant changed", "before": "add.s32 %r1, %r2, 3", "code": "a = b + 3"},
        **{"after": "add.s32 %r1, %r2, 5", "source": "norm.py:3", "of": 5, "said": "", "how": how},
        **fields,
    }


def test_a_mutant_that_lives_must_be_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explanations, page = tmp_path / "explanations.toml", tmp_path / "page.md"
    monkeypatch.setattr(table, "EXPLANATIONS", explanations)
    rows = [row("wrong", line=n) for n in range(30)] + [row("unchanged")]
    explanations.write_text("explanation = []\n")
    (said,) = table.write(rows, page)
    assert said.startswith("unexplained: sm_80 _norm: constant changed: line 7: add.s32 %r1")
    assert "**unexplained**" in page.read_text()
    known = '[[explanation]]\nkernel = "_norm"\ncode = "b \\\\+ 3"\nwhy = "It pads."\n'
    explanations.write_text(known)
    assert table.write(rows, page) == []
    assert (
        "| sm_80 | `_norm` | constant changed | `add.s32 %, %, 3 -> add.s32 %, %, 5` | `a = b + 3` "
        "| unchanged | 1 | It pads. |"
    ) in page.read_text()
    assert "30 of 31 (96.8 %; 0 more change nothing)" in page.read_text()
    explanations.write_text(known.replace("b \\\\+", "c \\\\+"))
    assert [line.partition(":")[0] for line in table.write(rows, page)] == [
        "unexplained",
        "explains nothing",
    ]


def test_too_few_that_are_noticed_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explanations = tmp_path / "explanations.toml"
    monkeypatch.setattr(table, "EXPLANATIONS", explanations)
    explanations.write_text('[[explanation]]\nkernel = "_norm"\nwhy = "It pads."\n')
    equal = [row(how) for how in ("equal", "not reached") for _ in range(50)]
    for noticed, wrong in ((9, []), (8, ["values: only 8 of 9 are noticed"])):
        rows = [row("fault", said="x is written twice")] * noticed + [row("unchanged")] + equal
        assert table.write(rows, tmp_path / "page.md") == wrong
    assert "| written once | 0 | 8 |" in (tmp_path / "page.md").read_text()


@pytest.mark.skipif(interpreting(), reason="Triton's interpreter compiles nothing")
def test_what_has_a_row_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "NAMES", ["layer_norm"])
    path = tmp_path / "rows.jsonl"
    run(path, ["sm_80"], (None, 2), "")
    rows = read(path)
    assert len(rows) >= 5 and {r["kernel"] for r in rows} == {"_norm_fwd_kernel"}
    assert len({key(r) for r in rows}) == len(rows)
    older = [rows[0] | {"ptx": "of an older kernel", "target": target} for target in TARGETS]
    moved = rows[0] | {"line": rows[0]["line"] - 1}  # the same statements, on other lines
    path.write_text("".join(json.dumps(row) + "\n" for row in [*older, moved, *rows]))
    run(path, ["sm_80"], (None, 3), "norm")  # a part of the operations: nothing is known of others
    assert read(path)[:-1] == [*older, moved, *rows]
    new = read(path)[-1]
    assert key(new) not in {key(r) for r in rows}
    run(path, ["sm_80"], (None, 3), "")
    assert read(path) == [older[1], *rows, new]
