"""`w2vbert-fast tune` and `warm`: what they say without a GPU, and what they do with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from w2vbert_fast.cli.app import build_app
from w2vbert_fast.ops import tuned
from w2vbert_fast.ops.tuned import Case, Entries, Found, Machine
from w2vbert_fast.tuning import measure, model as models, warm

HERE = Machine("NVIDIA H200", 132, "1", "3.6.0", "2.11.0")
OTHER = Machine("NVIDIA L40S", 142, "1", "3.6.0", "2.11.0")
ENTRIES: Entries = {
    (HERE, Case("linear", (8, 8), "float16", 64)): Found("64x64", 1.0, "pytorch", 2)
}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(build_app(), arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["tune", "warm"])
def test_without_a_gpu_it_is_said_what_is_missing(command: str) -> None:
    result = invoke(command)
    assert result.exit_code == 2
    assert "needs a CUDA or ROCm device" in result.stderr and torch.__version__ in result.stderr
    assert "was asked for 'cpu'" in invoke(command, "--device", "cpu").stderr
    assert "PyTorch sees 0 CUDA devices" in invoke(command, "--device", "cuda:3").stderr


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """As if there were one; the models that were asked for."""
    loaded: list[tuple[Any, ...]] = []

    def load(*arguments: Any) -> SimpleNamespace:
        loaded.append(arguments)
        return SimpleNamespace(config=SimpleNamespace())

    monkeypatch.setattr(models, "find_gpu", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    monkeypatch.setattr(tuned, "user_file", lambda: tmp_path / "tuned.json")
    return loaded


def test_what_is_found_is_kept_and_this_gpus_part_exported(
    gpu: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def tune(
        model: object,
        seconds: float,
        keep: Callable[[Entries], None],
        say: Callable[[str], None],
    ) -> None:
        given.append(seconds)
        keep(ENTRIES)
        say("linear (8, 8), 64 tokens: 64x64, 2.00 times pytorch")

    monkeypatch.setattr(measure, "tune", tune)
    elsewhere = {(OTHER, case): found for (_, case), found in ENTRIES.items()}
    tuned.merge(tmp_path / "tuned.json", elsewhere)
    table = tmp_path / "h200.json"
    result = invoke("tune", "--minutes", "0.5", "--dtype", "float16", "--export", str(table))
    assert result.exit_code == 0, result.stderr
    assert given == [30.0] and gpu == [(None, torch.device("cuda", 0), "float16")]
    assert "64x64, 2.00 times pytorch" in result.stdout
    assert "1 entries of NVIDIA H200 written to" in result.stdout
    assert tuned.read(tmp_path / "tuned.json") == {**elsewhere, **ENTRIES}
    assert tuned.parse(table.read_text()) == ENTRIES


def test_no_minutes_measure_nothing(gpu: list[tuple[Any, ...]], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    assert invoke("tune", "--minutes", "0", "--export", str(table)).exit_code == 0
    assert gpu == [] and tuned.parse(table.read_text()) == {}
    for minutes in ("-1", "nan"):
        result = invoke("tune", f"--minutes={minutes}")
        assert result.exit_code == 2 and "it must be at least 0" in result.stderr


def test_warm_says_how_long_a_first_call_would_have_waited(
    gpu: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "model_launches", lambda model, forward: [])
    monkeypatch.setattr(warm, "compile_all", lambda launches, device: (47, 12.34, 61.2))
    result = invoke("warm", "--model", "some/folder")
    assert gpu == [("some/folder", torch.device("cuda", 0), None)]
    assert result.stdout.startswith("47 kernels are compiled, in 12.3 s;")
    assert "61.2 s" in result.stdout
