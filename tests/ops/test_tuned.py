"""What was measured to be fastest: its file, and who asks for it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from csrc_triton.gemm import measured
from csrc_triton.gemm.config import linear_candidates
from csrc_triton.gemm.measured import Product
from w2vbert_fast.ops import gemm, tuned
from w2vbert_fast.ops.tuned import PYTORCH, Case, Entries, Found, Machine

HERE = Machine("NVIDIA H100 80GB HBM3", 132, "580.95", "3.6.0", "2.11.0+cu130")
GPU = torch.device("cuda", 0)
PLAIN = Case("linear", (1024, 4096), "bfloat16", 4096)
SILU = Case("linear silu", (4096, 1024), "bfloat16", 4096)
FOUND = Found("64x128", 1e-4, "128x256", 2e-4)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's, on a machine that is `HERE`."""
    path = tmp_path / "cache" / "tuned.json"
    monkeypatch.setattr(tuned, "user_file", lambda: path)
    monkeypatch.setattr(tuned, "shipped_files", lambda: sorted(tmp_path.glob("shipped/*.json")))
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    monkeypatch.setattr(tuned, "_warned", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("csrc_triton.architectures.architecture", lambda device: "sm_90")
    tuned.forget()
    yield path
    monkeypatch.undo()
    tuned.forget()


def product(case: Case, num_tokens: int = 4096) -> Product:
    epilogue = case.operation.partition(" ")[2] or "identity"
    return Product(num_tokens, *case.shape, getattr(torch, case.dtype), epilogue)


def test_what_is_merged_is_read_again(file: Path) -> None:
    tuned.merge(file, {(HERE, PLAIN): FOUND})
    tuned.merge(file, {(HERE, SILU): FOUND})
    better = Found(PYTORCH, 5e-5, "128x256", 2e-4)
    tuned.merge(file, {(HERE, PLAIN): better})
    assert tuned.read(file) == {(HERE, PLAIN): better, (HERE, SILU): FOUND}
    assert len(file.read_text().splitlines()) == 4  # an entry a line
    assert [path.name for path in file.parent.iterdir() if path.suffix == ".json"] == [file.name]


GOOD = tuned.written({(HERE, PLAIN): FOUND, (HERE, SILU): FOUND})
DAMAGED = {
    "half written": GOOD[: len(GOOD) // 2].encode(),
    "empty": b"",
    "bytes": b"\xff\x00\xfe",
    "another schema": GOOD.replace("/v1", "/v2").encode(),
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "no entries": json.dumps({"schema": tuned.SCHEMA}).encode(),
    "a field too few": GOOD.replace('"seconds": 0.0001, ', "").encode(),
    "a number for a name": GOOD.replace(f'"{HERE.gpu}"', "3").encode(),
    "a truth for a choice": GOOD.replace('"64x128"', "true").encode(),
    "words in a shape": GOOD.replace("[1024, 4096]", '["1024"]').encode(),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning(
    kind: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_bytes(DAMAGED[kind])
    with caplog.at_level(logging.WARNING, logger=tuned.logger.name):
        for _ in range(3):
            assert tuned.read(file) == {}
        assert tuned.tile(GPU, product(SILU)) is None
    assert len(caplog.records) == 1 and str(file) in caplog.text
    tuned.merge(file, {(HERE, PLAIN): FOUND})  # which mends it
    assert tuned.read(file) == {(HERE, PLAIN): FOUND}


def test_no_file_is_no_reason_for_a_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert tuned.read(file) == {} and not caplog.records


def _add(path: Path, process: int) -> None:
    for number in range(20):
        case = Case("linear", (process, number), "float16", 64)
        tuned.merge(path, {(HERE, case): FOUND})


def test_two_processes_add_to_one_file_and_nothing_is_lost(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add, args=(file, number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(tuned.read(file)) == 40


def test_a_write_that_fails_leaves_the_file_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned.merge(file, {(HERE, PLAIN): FOUND})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        tuned.merge(file, {(HERE, SILU): FOUND})
    assert tuned.read(file) == {(HERE, PLAIN): FOUND}
    assert not [path for path in file.parent.iterdir() if path.suffix not in (".json", ".lock")]


@pytest.mark.parametrize(
    "other",
    [
        Machine("NVIDIA L40S", *tuple(vars(HERE).values())[1:]),
        Machine(**{**vars(HERE), "multiprocessors": 114}),
        Machine(**{**vars(HERE), "driver": "590.1"}),
        Machine(**{**vars(HERE), "triton": "3.7.0"}),
        Machine(**{**vars(HERE), "torch": "2.12.0"}),
    ],
)
def test_a_measurement_counts_on_its_own_machine_alone(other: Machine, file: Path) -> None:
    tuned.merge(file, {(other, SILU): FOUND})
    tuned.forget()
    assert tuned.tile(GPU, product(SILU)) is None
    tuned.merge(file, {(HERE, SILU): FOUND})
    tuned.forget()
    config = tuned.tile(GPU, product(SILU))
    assert config is not None and tuned.tile_name(config) == "64x128"
    assert config in linear_candidates(torch.bfloat16, "sm_90")


def test_a_shipped_table_counts_behind_the_users_own_and_with_any_driver(file: Path) -> None:
    shipped = file.parent.parent / "shipped" / "h100.json"
    driver = Machine(**{**vars(HERE), "driver": "1", "torch": "2.9"})
    tuned.merge(shipped, {(driver, SILU): FOUND, (driver, PLAIN): FOUND})
    tuned.merge(file, {(HERE, PLAIN): Found(PYTORCH, 1.0, "64x128", 2.0)})
    tuned.forget()
    assert tuned.choice(GPU, SILU) == "64x128" and tuned.choice(GPU, PLAIN) == PYTORCH


def test_a_tile_that_there_is_not_is_not_taken(file: Path) -> None:
    tuned.merge(file, {(HERE, SILU): Found("512x512", 1.0, "128x256", 2.0)})
    tuned.forget()
    assert tuned.choice(GPU, SILU) == "512x512" and tuned.tile(GPU, product(SILU)) is None


def test_pytorchs_product_is_taken_on_hopper_and_where_it_was_measured(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(dtype: torch.dtype, num_tokens: int = 4000) -> bool:
        x = SimpleNamespace(is_cuda=True, device=GPU, shape=(num_tokens, 4096), dtype=dtype)
        return tuned.product_by_pytorch(x, SimpleNamespace(shape=(1024, 4096)))  # type: ignore[arg-type]

    assert of(torch.bfloat16) and of(torch.float16) and not of(torch.float32)
    assert of(torch.bfloat16, 2049) and not of(torch.bfloat16, 2048)
    tuned.merge(file, {(HERE, PLAIN): FOUND})
    tuned.forget()
    assert not of(torch.bfloat16)  # of 2,049 to 4,096 tokens
    assert of(torch.bfloat16, 5000) and of(torch.float16)
    for capability in ((8, 0), (8, 9), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        tuned.forget()
        assert not of(torch.bfloat16, 5000)
    tuned.merge(file, {(HERE, PLAIN): Found(PYTORCH, 1.0, "64x64", 2.0)})
    tuned.forget()
    assert of(torch.bfloat16)
    assert not tuned.product_by_pytorch(torch.ones(2, 3).half(), torch.ones(4, 3).half())


def test_the_operation_runs_pytorchs_product_where_there_is_no_activation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight, bias = torch.randn(5, 16), torch.randn(3 * 8, 16), torch.randn(3 * 8)
    launched = []

    class Kernels:
        @staticmethod
        def linear(*args: object) -> str:
            launched.append(args)
            return "kernel"

    monkeypatch.setattr(gemm, "_kernels", lambda: Kernels)
    monkeypatch.setattr(tuned, "product_by_pytorch", lambda x, weight: True)
    exact = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(gemm._linear_on_triton(x, weight, bias), exact)
    joined = gemm._linear_stacked_on_triton(x, list(weight.chunk(3)), list(bias.chunk(3)))
    assert torch.equal(joined, exact) and not launched
    assert gemm._linear_on_triton(x, weight, bias, "silu") == "kernel"
    monkeypatch.setattr(tuned, "product_by_pytorch", lambda x, weight: False)
    assert gemm._linear_on_triton(x, weight, bias) == "kernel"


def test_what_is_asked_for_is_noted(file: Path) -> None:
    with tuned.asked() as found:
        assert measured._find is tuned.tile
        measured.measured_config(GPU, product(SILU, 3000))
    measured.measured_config(GPU, product(PLAIN))
    assert found == {SILU}


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    [(0, 64), (1, 64), (64, 64), (65, 128), (4096, 4096), (4097, 8192), (10**6, 65536)],
)
def test_buckets(tokens: int, bucket: int) -> None:
    assert tuned.bucket_of(tokens) == bucket


def test_names_of_tiles_are_their_own() -> None:
    for arch in ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942"):
        for dtype in (torch.bfloat16, torch.float32):
            names = [tuned.tile_name(config) for config in linear_candidates(dtype, arch)]
            assert len(names) == len({*names})


def test_explanations(file: Path) -> None:
    assert tuned.explain(torch.device("cpu")).startswith("nothing to tune")
    assert "PyTorch's own" in tuned.explain(GPU) and "nothing is tuned" in tuned.explain(GPU)
    entries: Entries = {(HERE, PLAIN): FOUND, (HERE, SILU): Found("128x256", 1, "128x256", 1)}
    tuned.merge(file, entries)
    tuned.forget()
    assert "2 cases are tuned, 1 of them run something else" in tuned.explain(GPU)
