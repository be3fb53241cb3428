"""Which score chooses the best checkpoint, and under which name it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.training import STILL, config, make_model, metrics, write_clips
from w2vbert_fast.training import (
    FinetuneConfig,
    FinetuneResult,
    StepReport,
    evaluation,
    finetune,
    trainer,
)
from w2vbert_fast.training.tasks import TASKS
from w2vbert_fast.training.vocabulary import build_tokenizer

CHINESE = ("\u4f60\u597d", "\u4f60\u662f\u8c01", "\u597d")
# As a language without spaces learns: every utterance has an error, and ever fewer characters do.
FALLING = ((1.0, 0.9), (1.0, 0.4), (1.0, 0.6))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluations with scores that are given."""

    def install(scores: tuple[tuple[float, float], ...]) -> None:
        left = iter(scores)
        original = trainer.evaluate

        def evaluate(*args: Any) -> Any:
            outcome = original(*args)
            wer, cer = next(left)
            outcome.scores.update(wer=wer, cer=cer)
            return outcome

        monkeypatch.setattr(trainer, "evaluate", evaluate)

    return install


def run(folder: Path, texts: tuple[str, ...], **options: Any) -> FinetuneResult:
    on_step = options.pop("on_step", None)
    if not (folder / "model").exists():
        make_model(folder / "model", **STILL, feature_projection_input_dim=160)
    manifest = write_clips(folder / "clips", [{"text": text} for text in texts])
    values = {"train": manifest, "eval": manifest, "steps": 3, "evaluate_every": 1, **options}
    values.setdefault("vocabulary", "new")
    return finetune(config(folder / "model", folder / "out", **values), on_step=on_step)


@pytest.mark.parametrize(
    ("texts", "metric", "score", "best_step"),
    [
        (CHINESE, "auto", "cer", 2),
        (CHINESE, "wer", "wer", 1),
        (("one two", "three"), "auto", "wer", 1),
        (("one two", "three"), "cer", "cer", 2),
    ],
)
def test_the_best_checkpoint_is_the_one_of_the_score(
    tmp_path: Path, scripted: Any, texts: tuple[str, ...], metric: str, score: str, best_step: int
) -> None:
    scripted(FALLING)
    result = run(tmp_path, texts, metric=metric)
    assert (result.score, result.best_step) == (score, best_step)
    assert (
        result.best_score == dict(zip(("wer", "cer"), FALLING[best_step - 1], strict=True))[score]
    )
    rows = [row for row in metrics(tmp_path / "out") if "eval_cer" in row]
    assert [(row["eval_wer"], row["eval_cer"]) for row in rows] == list(FALLING)
    (state,) = (tmp_path / "out" / "state").glob("step-*/trainer.json")
    content = json.loads(state.read_text())
    assert (content["score"], content["config"]["metric"]) == (score, metric)


def test_scoring_keeps_nothing_for_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = evaluation._predictions
    seen: list[bool] = []

    def predictions(*args: Any) -> Any:
        seen.append(torch.is_grad_enabled())
        return original(*args)

    monkeypatch.setattr(evaluation, "_predictions", predictions)
    run(tmp_path, CHINESE, steps=1)
    assert seen and not any(seen)


def test_options_without_effect_are_refused() -> None:
    paths = {name: name for name in ("model", "train", "eval", "out")}
    for option in ({"lora_alpha": 2.0}, {"lora_dropout": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} needs lora"):
            FinetuneConfig(**paths, **option)  # type: ignore[arg-type]
    for name, value in (("lower_case", True), ("vocabulary", "new"), ("min_character_count", 2)):
        with pytest.raises(ValueError, match=f"{name} needs the task 'ctc'"):
            FinetuneConfig(**paths, task="frames", **{name: value})  # type: ignore[arg-type]


class _Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def on_step(report: StepReport) -> None:
        if report.step == step:
            raise _Stop

    return on_step


@pytest.mark.parametrize("is_older", [False, True])
def test_a_run_goes_on_with_the_score_that_it_was_begun_with(
    tmp_path: Path, scripted: Any, is_older: bool
) -> None:
    scripted(((0.9, 0.5), (1.0, 0.6), (1.0, 0.4), (0.8, 0.3)))
    with pytest.raises(_Stop):
        run(tmp_path, CHINESE, on_step=stop_at(1))
    (state,) = (tmp_path / "out" / "state").glob("step-*/trainer.json")
    content = json.loads(state.read_text())
    if is_older:
        # As it was before the score could be chosen; the best so far is a word error rate then.
        del content["score"], content["loss_scale"]
        for name in ("metric", "columns", "freeze"):
            del content["config"][name]
        content["progress"]["best_score"] = 0.9
        state.write_text(json.dumps(content))
    result = run(tmp_path, CHINESE)
    expected = ("wer", 0.9, 1) if is_older else ("cer", 0.4, 3)
    assert (result.score, result.best_score, result.best_step) == expected
    with pytest.raises(ValueError, match="metric: 'auto', now 'wer'"):
        run(tmp_path, CHINESE, metric="wer")


def test_what_separates_words(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["ab"], tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}))
    # The tokenizer adds a separator of its own, which no model of this vocabulary emits.
    without = type(tokenizer)(tmp_path / "vocab.json", unk_token="[UNK]", pad_token="[PAD]")
    choosing_score = TASKS["ctc"].chosen_score
    assert choosing_score("auto", tokenizer, None) == "wer"
    assert choosing_score("auto", without, None) == "cer"
    assert choosing_score("auto", without, ["a b"]) == "cer"
    assert choosing_score("auto", tokenizer, ["ab", "a b"]) == "wer"
    assert choosing_score("auto", tokenizer, ["ab", "ba"]) == "cer"
    # A foreign name in Chinese, and Chinese characters in English.
    assert choosing_score("auto", tokenizer, ["\u4f60\u597d New York", CHINESE[1] * 4]) == "cer"
    assert choosing_score("auto", tokenizer, ["a Chinese sign: \u597d"]) == "wer"
    assert TASKS["frames"].chosen_score("auto", None, None) == "accuracy"
    paths = {name: name for name in ("model", "train", "eval", "out")}
    with pytest.raises(ValueError, match="metric must be one of auto, wer, cer, got 'ter'"):
        FinetuneConfig(**paths, metric="ter")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="metric 'cer' is for the task 'ctc', got 'frames'"):
        FinetuneConfig(**paths, task="frames", metric="cer")
