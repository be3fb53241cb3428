"""Training in fp16 with a scaled loss: what a step is, what is skipped, what a state keeps."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.reference import relative_error
from tests.helpers.training import STILL, RandomSource, config, make_model, metrics
from w2vbert_fast.training import StepReport, finetune, trainer
from w2vbert_fast.training.setup import autocast_dtype


class Stop(Exception):
    pass


def begin_with(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs scale their loss by this at first, and by twice as much after each second good step."""
    scaler = functools.partial(torch.amp.GradScaler, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(trainer, "_LOSS_SCALE", scale)


def test_steps_are_those_of_fp32_but_for_rounding(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL)
    source = RandomSource(4)
    first = load_file(model / "model.safetensors")
    moved = {}
    for precision in ("fp32", "fp16"):
        # With so large an epsilon Adam's steps are the gradients', not their signs'.
        options = config(
            model, tmp_path / precision, steps=2, precision=precision, adam_epsilon=10.0
        )
        result = finetune(options, train=source, evaluation=source)
        saved = load_file(result.last / "model.safetensors")
        moved[precision] = saved["lm_head.weight"] - first["lm_head.weight"]
    assert 1e-6 < relative_error(moved["fp16"], moved["fp32"]) < 0.01
    norms = [[row["grad_norm"] for row in metrics(tmp_path / p) if "loss" in row] for p in moved]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)
    scales = [row.get("loss_scale") for row in metrics(tmp_path / "fp16") if "loss" in row]
    assert all(scales) and "loss_scale" not in metrics(tmp_path / "fp32")[0]


def test_a_step_with_a_gradient_that_overflows_changes_nothing_but_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(2.0**17, monkeypatch)
    model = make_model(tmp_path / "model", **STILL)
    source = RandomSource(4)
    seen: list[tuple[float, torch.Tensor]] = []

    def watch(report: StepReport) -> None:
        seen.append((report.grad_norm, report.model.lm_head.weight.detach().clone()))

    options = config(model, tmp_path / "out", steps=12, precision="fp16", frame_budget=1000)
    finetune(options, train=source, evaluation=source, on_step=watch)
    rows = [row for row in metrics(tmp_path / "out") if "loss" in row]
    overflown = [not torch.isfinite(torch.tensor(norm)) for norm, _ in seen]
    assert overflown[0] and not all(overflown)
    weights = [load_file(model / "model.safetensors")["lm_head.weight"], *(w for _, w in seen)]
    scales = [2.0**17, *(row["loss_scale"] for row in rows)]
    assert scales[1] == 2.0**16
    for step, is_inf in enumerate(overflown):
        assert torch.equal(weights[step], weights[step + 1]) == is_inf
        ratio = scales[step + 1] / scales[step]
        assert ratio == 0.5 if is_inf else ratio in (1.0, 2.0)
    assert any(b > a for a, b in itertools.pairwise(scales))


def test_a_resumed_run_goes_on_with_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(2.0**10, monkeypatch)
    model = make_model(tmp_path / "model", **STILL)
    source = RandomSource(4)
    common: dict[str, Any] = {"steps": 5, "save_every": 1, "precision": "fp16"}
    common |= {"frame_budget": 1000, "evaluate_every": 5}

    def stop(report: StepReport) -> None:
        if report.step == 3:
            raise Stop

    finetune(config(model, tmp_path / "whole", **common), train=source, evaluation=source)
    parts = config(model, tmp_path / "parts", **common)
    with pytest.raises(Stop):
        finetune(parts, train=source, evaluation=source, on_step=stop)
    finetune(parts, train=source, evaluation=source)
    whole = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == whole
    # It grows after steps 2 and 4: the state knows that step 3 was half way.
    assert [row["loss_scale"] for row in whole if "loss" in row] == [
        *(2.0**10, 2.0**11, 2.0**11, 2.0**12, 2.0**12)
    ]


@pytest.mark.parametrize(
    ("precision", "kind", "has_bf16", "dtype"),
    [
        ("auto", "cpu", True, None),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, None),  # T4, V100
        ("fp16", "cuda", False, torch.float16),
        ("fp32", "cuda", True, None),
    ],
)
def test_what_runs_in_which_dtype(
    precision: str, kind: str, has_bf16: bool, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def native(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", native)
    options = config(Path("m"), Path("o"), precision=precision)
    assert autocast_dtype(options, torch.device(kind)) == dtype
