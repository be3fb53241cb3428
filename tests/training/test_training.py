"""Fine-tuning as a whole: it learns, as the reference does, and every task ends in a checkpoint
that transformers loads with the same answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import w2vbert_fast
from tests.helpers.reference import relative_error
from tests.helpers.training import (
    STILL,
    TEXTS,
    RandomSource,
    config,
    make_model,
    metrics,
    read_rows,
    write_clips,
)
from tests.report.test_page import rows_of, scripts
from w2vbert_fast.inference import load_pipeline, transcribe
from w2vbert_fast.training import FinetuneConfig, StepReport, Utterance, finetune
from w2vbert_fast.training.batches import BatchPlan

TASKS = {
    "ctc": "Wav2Vec2BertForCTC",
    "classification": "Wav2Vec2BertForSequenceClassification",
    "frames": "Wav2Vec2BertForAudioFrameClassification",
    "xvector": "Wav2Vec2BertForXVector",
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_equal_logits(folder: Path, class_name: str) -> None:
    """Ours and the reference's, of a saved checkpoint."""
    reference = getattr(transformers, class_name).from_pretrained(folder).eval()
    ours = getattr(w2vbert_fast, class_name).from_pretrained(folder)
    width = reference.config.feature_projection_input_dim
    features = torch.randn(1, 50, width, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted, got = reference(features).logits, ours(features).logits
    assert relative_error(got, wanted) < 1e-5
    weights = reference.state_dict()
    assert set(weights) == set(ours.state_dict())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.state_dict().items())


def test_it_learns_three_clips_by_heart(tmp_path: Path) -> None:
    encoder = make_model(
        tmp_path / "encoder",
        "Wav2Vec2BertModel",
        **STILL,
        feature_projection_input_dim=160,
        initializer_range=0.1,
    )
    manifest = write_clips(tmp_path / "clips")
    out = tmp_path / "out"
    # The clips are read in every epoch; there are few of these, so that the test is short.
    options = FinetuneConfig(
        encoder,
        manifest,
        manifest,
        out,
        steps=60,
        learning_rate=6e-3,
        warmup=10,
        speeds=(1.0,),
        evaluate_every=30,
        log_every=10,
        num_workers=0,
        device="cpu",
    )
    result = finetune(options)
    assert (result.score, result.best_score, result.skipped) == ("wer", 0.0, 0)

    # What was learnt is what the library then hears, through the saved processor.
    files = [str(tmp_path / "clips" / f"{i}.wav") for i in range(3)]
    heard = [row.text for row in transcribe(files, load_pipeline(str(result.best)))]
    assert heard == list(TEXTS)
    assert_equal_logits(result.last, "Wav2Vec2BertForCTC")
    tokenizer = transformers.Wav2Vec2BertProcessor.from_pretrained(result.best).tokenizer
    letters = sorted(set("".join(TEXTS)) - {" "})
    tokens = ["[PAD]", "[UNK]", "|", *letters]
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(tokens)}

    rows = metrics(out)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [row["step"] for row in rows if "loss" in row] == list(range(10, 61, 10))
    assert losses[-1] < 0.2 * losses[0]
    assert [row["step"] for row in rows if "eval_wer" in row] == [30, 60]
    predictions = read_rows(out / "predictions.jsonl")
    assert [row["hypothesis"] for row in predictions] == list(TEXTS)
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    (page,) = scripts(out / "report.html", "page")
    assert [x for x, _ in page["charts"][0]["lines"]["training"]] == list(range(10, 61, 10))
    assert page["charts"][1]["lines"]["wer"][-1] == [60, 0.0]
    shown = rows_of(out / "report.html")
    assert [row[0][2:6] for row in shown] == [[0, 0.0, t, t] for t in TEXTS]
    assert [row[2] for row in shown] == [f"../clips/{i}.wav" for i in range(3)]  # to be heard
    assert [row[0][0] for row in shown] == [str(tmp_path / "clips" / f"{i}.wav") for i in range(3)]
    assert json.loads((out / "finetune.json").read_text())["steps"] == 60

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(10, 61, 10))
    assert np.allclose([e.value for e in events.Scalars("loss")], losses)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_and_saves_what_the_reference_loads(task: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", TASKS[task], **STILL)
    source = RandomSource(6, task=task)
    steps = 48 if task == "xvector" else 24  # the margin in its loss takes longer to learn
    options = config(
        model, tmp_path / "out", task=task, steps=steps, learning_rate=1e-2, precision="bf16"
    )
    result = finetune(options, train=source, evaluation=source)
    losses = [row["loss"] for row in metrics(tmp_path / "out") if "loss" in row]
    assert all(map(math.isfinite, losses))
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])
    for folder in (result.best, result.last):
        assert_equal_logits(folder, TASKS[task])
    rows = rows_of(tmp_path / "out" / "report.html")
    assert len(rows) == 6 and {len(row[0]) for row in rows} == {8}
    if task != "ctc":
        assert all(share == 1 - wrong / of for _, _, wrong, share, of, *_ in (r[0] for r in rows))
        assert result.score == "accuracy"
        assert result.best_score > 0.5


@pytest.mark.parametrize("task", ["classification", "frames", "xvector"])
def test_classes_come_from_the_manifest(task: str, tmp_path: Path) -> None:
    model = make_model(
        tmp_path / "model", TASKS[task], **STILL, feature_projection_input_dim=160, num_labels=2
    )
    rows: list[dict[str, Any]]
    if task == "frames":
        spans = (("ann", 0.0, 0.3), ("bob", 0.4, 0.7))
        rows = [{"segments": [{"label": n, "start": a, "end": b}]} for n, a, b in spans]
        wanted = {"ann": 0, "bob": 1, "none": 2}
    else:
        rows = [{"label": "ten"}, {"label": 10}, {"label": 9}]
        wanted = {"9": 0, "10": 1, "ten": 2}
    manifest = write_clips(tmp_path / "clips", rows)
    options = config(model, tmp_path / "out", task=task, train=manifest, eval=manifest, steps=2)
    result = finetune(options)
    saved = transformers.Wav2Vec2BertConfig.from_pretrained(result.best)
    assert saved.label2id == wanted
    assert saved.id2label == {index: name for name, index in wanted.items()}
    assert_equal_logits(result.best, TASKS[task])


def reference_losses(
    model: torch.nn.Module, source: RandomSource, options: FinetuneConfig
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The plain training loop around transformers' model.

    Returns the losses, the gradients' norms, and the weights after 20 steps.
    """
    plan = BatchPlan(source, options.frame_budget, seed=options.seed)
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        betas=options.betas,
        weight_decay=options.weight_decay,
        foreach=True,
    )
    losses: list[float] = []
    norms: list[float] = []
    after_20: dict[str, torch.Tensor] = {}
    epoch = 0
    while len(losses) < options.steps:
        for (batch,) in plan.steps(epoch):
            step = len(losses)
            if step == options.steps:
                break
            warm = (step + 1) / 20
            rate = warm if step < 20 else (options.steps - step) / (options.steps - 20)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * rate
            loaded = [source.load(index, epoch) for index in batch]
            pad = torch.nn.utils.rnn.pad_sequence
            features = pad([u.input_features for u in loaded], batch_first=True)
            mask = pad([torch.ones(len(u.input_features)) for u in loaded], batch_first=True)
            labels = pad([u.labels for u in loaded], batch_first=True, padding_value=-100)
            loss = model(features, attention_mask=mask.long(), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            norms.append(norm.item())
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == 20:
                after_20 = {n: t.clone() for n, t in model.state_dict().items()}
        epoch += 1
    return losses, norms, after_20


def test_it_converges_as_transformers_does(tmp_path: Path) -> None:
    folder = make_model(
        tmp_path / "model", **STILL, hidden_size=32, intermediate_size=48, ctc_loss_reduction="mean"
    )
    source = RandomSource(8)
    options = config(
        folder, tmp_path / "out", steps=200, warmup=20, learning_rate=2e-3, precision="fp32"
    )
    losses: list[float] = []
    norms: list[float] = []
    after_20: dict[str, torch.Tensor] = {}

    def watch(report: StepReport) -> None:
        losses.append(report.loss)
        norms.append(report.grad_norm)
        if report.step == 20:
            after_20.update({n: t.clone() for n, t in report.model.state_dict().items()})

    finetune(options, train=source, evaluation=source, on_step=watch)
    reference = transformers.Wav2Vec2BertForCTC.from_pretrained(folder).train()
    wanted, wanted_norms, wanted_after_20 = reference_losses(reference, source, options)

    assert len(losses) == len(wanted) == 200
    assert wanted[-1] < 0.5 * wanted[0]
    np.testing.assert_allclose(losses[:20], wanted[:20], rtol=1e-4)
    np.testing.assert_allclose(norms[:20], wanted_norms[:20], rtol=1e-3)
    assert losses[-1] == pytest.approx(wanted[-1], rel=0.01)
    for name, tensor in wanted_after_20.items():
        # A key's bias shifts all scores of a query alike: its gradient is rounding, which Adam
        # scales up to full steps.
        if not name.endswith("linear_k.bias"):
            assert relative_error(after_20[name], tensor) < 1e-3, name


def test_speed_perturbation_and_workers_change_nothing_but_the_speed(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL, feature_projection_input_dim=160, vocab_size=29)
    manifest = write_clips(tmp_path / "clips")
    seen = []
    for number, workers in enumerate((0, 2)):
        options = config(
            model,
            tmp_path / str(number),
            train=manifest,
            eval=manifest,
            steps=4,
            speeds=(0.8, 1.0, 1.25),
            num_workers=workers,
        )
        finetune(options)
        seen.append(metrics(tmp_path / str(number)))
    assert seen[0] == seen[1]
    frames = [row["frames"] for row in seen[0] if "frames" in row]
    assert len(set(frames)) > 1


def test_a_moving_average_is_what_is_saved(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL)
    source = RandomSource(4)
    weights: list[torch.Tensor] = []
    options = config(model, tmp_path / "out", steps=3, average=0.75, frame_budget=1000)

    def watch(report: StepReport) -> None:
        weights.append(report.model.lm_head.weight.detach().clone())

    name = "lm_head.weight"
    first = transformers.Wav2Vec2BertForCTC.from_pretrained(model).state_dict()[name]
    result = finetune(options, train=source, evaluation=source, on_step=watch)
    average = first.double()
    for weight in weights:
        average = 0.75 * average + 0.25 * weight.double()
    saved = transformers.Wav2Vec2BertForCTC.from_pretrained(result.last).state_dict()[name]
    assert relative_error(saved.double(), average) < 1e-6
    assert relative_error(saved, weights[-1]) > 1e-4


def test_accumulated_batches_are_one_step_of_all_their_utterances(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL)
    source = RandomSource(6)
    found = []
    for number, (budget, accumulate) in enumerate(((1000, 1), (70, 4))):
        out = tmp_path / str(number)
        options = config(model, out, steps=1, frame_budget=budget, accumulate=accumulate)
        plan = BatchPlan(source, budget, accumulate=accumulate)
        assert len(plan.steps(0)) == 1
        assert sum(map(len, plan.steps(0)[0])) == 6
        result = finetune(options, train=source, evaluation=source)
        row = metrics(out)[0]
        weights = transformers.Wav2Vec2BertForCTC.from_pretrained(result.last).state_dict()
        found.append((row["loss"], row["grad_norm"], weights["lm_head.weight"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    assert relative_error(found[1][2], found[0][2]) < 1e-4


def broken(source: RandomSource) -> dict[str, str]:
    """Put unusable utterances into a source; what must be said about each."""
    good = source.load(0, 0)
    frames = len(good.input_features)
    replaced = {
        1: (torch.full((frames, 20), torch.nan), good.labels),
        3: (good.input_features, torch.full((frames // 2 + 1,), 4)),
        # Finite, but their variance is not.
        5: (good.input_features.sign() * 3e38, good.labels),
    }
    for index, (features, labels) in replaced.items():
        source.replaced[index] = Utterance(f"broken {index}", features, labels)
    needed = 2 * (frames // 2 + 1) - 1
    return {
        "broken 1": "its features hold NaN or infinite values",
        "broken 3": f"its {frames // 2 + 1} tokens need {needed} frames, and there are {frames}",
        "broken 5": "its loss is nan",
    }


def test_utterances_without_a_finite_loss_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(tmp_path / "model", **STILL)
    source = RandomSource(6)
    # One frame too few for the labels of utterance 3.
    source.lengths = [30] * 6
    wanted = broken(source)
    good = RandomSource(6)
    good.lengths = source.lengths
    clean = RandomSource(3)
    clean.lengths = [30] * 3
    clean.replaced = {place: good.load(index, 0) for place, index in enumerate((0, 2, 4))}
    results = []
    for name, train in (("broken", source), ("clean", clean)):
        out = tmp_path / name
        # All in one batch.
        options = config(model, out, steps=3, frame_budget=1000)
        result = finetune(options, train=train, evaluation=good)
        results.append((metrics(out)[:3], result))
    (rows, result), (clean_rows, clean_result) = results
    assert result.skipped == 9
    assert clean_result.skipped == 0
    skipped = read_rows(tmp_path / "broken" / "skipped.jsonl")
    assert [row["step"] for row in skipped] == [1] * 3 + [2] * 3 + [3] * 3
    assert {row["utterance"]: row["reason"] for row in skipped} == wanted
    assert "broken 3 is left out: its 16 tokens need 31 frames, and there are 30" in caplog.text
    for row, clean_row in zip(rows, clean_rows, strict=True):
        assert (row["utterances"], row["skipped"]) == (3, 3)
        assert row["loss"] == pytest.approx(clean_row["loss"], rel=1e-5)
    ours, theirs = (
        transformers.Wav2Vec2BertForCTC.from_pretrained(r.last).state_dict()
        for r in (result, clean_result)
    )
    for name, tensor in theirs.items():
        if not name.endswith("linear_k.bias"):
            assert relative_error(ours[name], tensor) < 1e-3, name


def test_a_run_without_any_usable_utterance_ends_with_an_error(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL)
    source, good = RandomSource(2), RandomSource(2, seed=1)
    source.replaced = {
        i: Utterance(f"empty {i}", torch.zeros(0, 20), torch.tensor([3])) for i in range(2)
    }
    options = config(model, tmp_path / "out", steps=100)
    with pytest.raises(FloatingPointError, match="25 steps in a row, up to step 25"):
        finetune(options, train=source, evaluation=good)
    rows = metrics(tmp_path / "out")
    assert [row["loss"] for row in rows] == [None] * 24
    with pytest.raises(ValueError, match="no utterance of the evaluation data can be scored: empt"):
        finetune(config(model, tmp_path / "other", steps=1), train=good, evaluation=source)


def test_broken_and_silent_recordings_are_named_and_left_out(tmp_path: Path) -> None:
    import soundfile

    model = make_model(tmp_path / "model", **STILL, feature_projection_input_dim=160, vocab_size=29)
    manifest = write_clips(tmp_path / "clips", [{"text": t} for t in (*TEXTS, "abc", "de", "x")])
    clips = tmp_path / "clips"
    (clips / "3.wav").write_bytes((clips / "3.wav").read_bytes()[:8_000])
    soundfile.write(clips / "4.wav", np.zeros(16_000), 16_000)
    soundfile.write(clips / "5.wav", np.zeros(16_000 * 3), 16_000)
    options = config(
        model,
        tmp_path / "out",
        train=manifest,
        eval=manifest,
        frame_budget=5000,
        steps=1,
        max_seconds=2.0,
        speeds=(1.0,),
    )
    result = finetune(options)
    assert result.skipped == 3
    reasons = {
        row["utterance"].split(" ")[0]: row["reason"]
        for row in read_rows(tmp_path / "out" / "skipped.jsonl")
    }
    assert reasons["manifest.jsonl:4"].startswith("truncated")
    assert reasons["manifest.jsonl:5"] == "the recording is silent and the transcript is not"
    assert reasons["manifest.jsonl:6"] == "it is 3.0 s long, and max_seconds is 2"
    assert metrics(tmp_path / "out")[0]["utterances"] == 3
    assert metrics(tmp_path / "out")[1]["eval_skipped"] == 3


def test_lora_trains_adapters_and_saves_them_merged_and_apart(tmp_path: Path) -> None:
    import peft

    folder = make_model(tmp_path / "model", **STILL)
    source = RandomSource(6)
    options = config(folder, tmp_path / "out", lora=4, lora_alpha=6.0, steps=10, learning_rate=1e-2)
    result = finetune(options, train=source, evaluation=source)
    assert_equal_logits(result.last, "Wav2Vec2BertForCTC")

    base = transformers.Wav2Vec2BertForCTC.from_pretrained(folder).eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = transformers.Wav2Vec2BertForCTC.from_pretrained(result.last).eval()
    targets = (*options.lora_targets, "lm_head")
    for name, tensor in merged.state_dict().items():
        is_target = any(f"{target}.weight" in name for target in targets) or "lm_head" in name
        assert torch.equal(tensor, before[name]) != is_target, name

    adapted = peft.PeftModel.from_pretrained(base, result.last / "adapter").eval()
    features = source.load(0, 0).input_features[None]
    with torch.no_grad():
        wanted = adapted(features).logits
        got = merged(features).logits
        untrained = transformers.Wav2Vec2BertForCTC.from_pretrained(folder).eval()(features).logits
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(got, untrained) > 1e-2
    alone = adapted.merge_and_unload().state_dict()
    assert all(relative_error(alone[n], t) < 1e-5 for n, t in merged.state_dict().items())


@pytest.mark.parametrize("task", ["classification", "frames", "xvector"])
def test_lora_trains_the_heads_of_all_tasks(task: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", TASKS[task], **STILL)
    source = RandomSource(6, task=task)
    options = config(folder, tmp_path / "out", task=task, lora=2, steps=2, learning_rate=1e-2)
    result = finetune(options, train=source, evaluation=source)
    assert_equal_logits(result.last, TASKS[task])
    before = getattr(transformers, TASKS[task]).from_pretrained(folder).state_dict()
    after = getattr(transformers, TASKS[task]).from_pretrained(result.last).state_dict()
    unchanged = [
        n
        for n, t in after.items()
        if not n.startswith("wav2vec2_bert.") and torch.equal(t, before[n])
    ]
    assert unchanged == []
