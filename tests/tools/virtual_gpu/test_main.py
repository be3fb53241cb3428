"""`python -m tools.virtual_gpu`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.virtual_gpu.__main__ import main

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(autouse=True)
def own_arguments_and_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_script_runs_as_python_runs_it_and_its_launches_are_recorded(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    (tmp_path / "beside_the_script.py").write_text("NAME = 'beside'\n")
    script.write_text(
        f"import sys; sys.path.append({str(SCRIPTS)!r})\n"
        "import torch, beside_the_script, vector_addition\n"
        "assert __name__ == '__main__' and beside_the_script.NAME == 'beside'\n"
        "assert sys.argv[1:] == ['--size', '70'], sys.argv\n"
        "vector_addition.add(torch.zeros(70), torch.zeros(70))\n"
    )
    out = tmp_path / "launches.jsonl"
    assert main(["--target", "sm_90", "--record", str(out), str(script), "--size", "70"]) == 0
    (launch,) = map(json.loads, out.read_text().splitlines())
    assert launch["kernel"] == "vector_addition:add_kernel"
    assert launch["target"] == "sm_90" and launch["arguments"]["n"] == 70


def test_a_wrong_command_line_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--target", "sm_75", "x.py"], "invalid choice: 'sm_75'"),
        (["x.py"], "required: --target"),
        (["--target", "sm_80", "no_such.py"], "no_such.py is not a file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert said in capsys.readouterr().err


def test_a_fault_ends_the_script_with_status_1_and_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.append({str(SCRIPTS)!r})\n"
        "import torch, vector_addition\n"
        "x = torch.zeros(64)\n"
        "vector_addition.add_kernel[(1,)](x, x.clone(), x.clone(), 65, BLOCK=128)\n"
        "print('after the launch')\n"
    )
    assert main(["--target", "sm_80", str(script)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "kernel add_kernel, block (0, 0, 0): global load outside of every tensor" in err
    assert "PTX line" in err and "vector_addition.py:" in err


def test_counts_are_those_of_the_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 elements of 4 bytes, read twice and written once, in 4 blocks of 4 warps."""
    assert main(["--target", "sm_80", "--count", str(SCRIPTS / "vector_addition.py"), "1000"]) == 0
    out = capsys.readouterr().out
    assert "add_kernel | 1 | " in out
    assert " | 8000 | 4000 |" in out
    assert "| ret | 16 |" in out


def test_a_check_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.append({str(SCRIPTS)!r})\n"
        "import torch, vector_addition\n"
        "x = torch.zeros(64)\n"
        "vector_addition.add_kernel[(1,)](x, x.clone(), x.clone(), 63, BLOCK=128)\n"
    )
    assert main(["--target", "sm_80", str(script)]) == 1
    assert (
        "1 of 64 elements of out_ptr are never written, the first [63]" in capsys.readouterr().err
    )
    assert main(["--target", "sm_80", "--without", "written_whole", str(script)]) == 0
