"""The command line as a user meets it: a subprocess, its output, its errors, its exit status.

Texts are compared with those of the reference (transformers) on the same samples.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from typer.testing import CliRunner, Result

import w2vbert_fast
from tests.helpers.signals import speech_like, stereo, write_container
from w2vbert_fast.cli import app as cli, messages
from w2vbert_fast.inference import Pipeline, Transcript, load_audio, load_pipeline, transcribe

DEMO = Path(w2vbert_fast.__file__).parent / "demo"
COMMAND = [sys.executable, "-m", "w2vbert_fast.cli"]
# The models are tiny: more threads would only wait for each other.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments])


def run(*arguments: str | bytes | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        **options,
    )


@pytest.fixture(scope="session")
def reference_text(tiny_checkpoint: Path) -> Callable[[np.ndarray], str]:
    """What the reference makes of samples `[num_samples]` at 16 kHz."""
    import transformers

    processor = transformers.Wav2Vec2BertProcessor.from_pretrained(tiny_checkpoint)
    model = transformers.Wav2Vec2BertForCTC.from_pretrained(tiny_checkpoint).eval()

    def recognize(samples: np.ndarray) -> str:
        features = processor(samples, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            ids = model(**features).logits.argmax(-1)
        (text,) = processor.batch_decode(ids)
        return str(text)

    return recognize


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Files that can be read, by name, and their samples at 16 kHz."""
    folder = tmp_path_factory.mktemp("recordings")
    found: dict[str, np.ndarray] = {}

    def write(name: str, signal: np.ndarray, rate: int, **options: Any) -> None:
        path = os.path.join(folder, name)
        soundfile.write(os.fsencode(path), signal, rate, **options)
        stored, _ = soundfile.read(os.fsencode(path), dtype="float32", always_2d=True)
        found[path] = soxr.resample(stored.mean(axis=1), rate, 16_000)

    write("plain.wav", speech_like(1.5, 16_000, seed=1), 16_000, format="WAV")
    write("telephone.wav", speech_like(1.1, 8_000, seed=2), 8_000, format="WAV", subtype="ULAW")
    write("stereo, 24 bit.wav", stereo(44_100), 44_100, format="WAV", subtype="PCM_24")
    write("floats.wav", stereo(48_000, 0.7), 48_000, format="WAV", subtype="FLOAT")
    write("new\nline\tand [bold]brackets.flac", speech_like(0.9, 16_000), 16_000, format="FLAC")
    latin1 = os.fsdecode(b"caf\xe9.ogg")
    write(latin1, speech_like(2, 16_000, seed=3), 16_000, format="OGG")
    for name, codec in (("phone.m4a", "aac"), ("film.mp4", "aac"), ("browser.webm", "libopus")):
        write_container(folder / name, codec, 48_000)
        found[str(folder / name)] = load_audio(folder / name).samples.numpy()
    return found


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files that cannot be transcribed, and a part of what must be said about them."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "text.wav").write_text("This is not audio.\n" * 100)
    (folder / "empty.wav").touch()
    soundfile.write(folder / "whole.wav", speech_like(1, 16_000), 16_000)
    (folder / "cut.wav").write_bytes((folder / "whole.wav").read_bytes()[:9_000])
    soundfile.write(folder / "short.wav", np.zeros(300), 16_000)
    soundfile.write(folder / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    return {
        str(folder / name): reason
        for name, reason in {
            "missing\n.wav": "No such file or directory",
            "text.wav": "cannot be read as audio",
            "empty.wav": "the file is empty",
            "cut.wav": "truncated",
            "short.wav": "too short",
            "nan.wav": "NaN or infinite",
        }.items()
    }


def test_columns(
    tiny_checkpoint: Path,
    recordings: dict[str, np.ndarray],
    reference_text: Callable[[np.ndarray], str],
) -> None:
    result = run("transcribe", *recordings, "--model", tiny_checkpoint)
    assert (result.returncode, result.stderr) == (0, b"")
    lines = result.stdout.decode().splitlines()
    assert len(lines) == len(recordings)
    for line, (path, samples) in zip(lines, recordings.items(), strict=True):
        file, text, seconds, factor = line.split("\t")
        assert file == path.replace("\n", r"\n").replace("\t", r"\t").replace("\udce9", r"\udce9")
        assert text == reference_text(samples)
        assert float(seconds) == pytest.approx(samples.size / 16_000, abs=0.006)
        assert float(factor) > 0


def test_json_with_broken_files_among_good_ones(
    tiny_checkpoint: Path,
    recordings: dict[str, np.ndarray],
    broken: dict[str, str],
    reference_text: Callable[[np.ndarray], str],
) -> None:
    files = [path for pair in zip(recordings, broken, strict=False) for path in pair]
    result = run("transcribe", "--json", "--model", tiny_checkpoint, "--device", "cpu", *files)
    assert (result.returncode, result.stderr) == (1, b"")
    rows = [json.loads(line) for line in result.stdout.decode().splitlines()]
    assert [row["file"] for row in rows] == files
    for row in rows[::2]:
        assert set(row) == {"file", "text", "seconds", "real_time_factor"}
        assert row["text"] == reference_text(recordings[row["file"]])
        assert row["seconds"] == pytest.approx(recordings[row["file"]].size / 16_000, abs=1e-3)
        assert row["real_time_factor"] > 0
    for row in rows[1::2]:
        assert set(row) == {"file", "error"}
        assert broken[row["file"]] in row["error"]


def test_broken_files_are_one_line_each_on_standard_error(
    tiny_checkpoint: Path, recordings: dict[str, np.ndarray], broken: dict[str, str]
) -> None:
    good = next(iter(recordings))
    result = run("transcribe", *broken, good, "--model", tiny_checkpoint)
    assert result.returncode == 1
    (line,) = result.stdout.decode().splitlines()
    assert line.startswith(f"{good}\t")
    errors = result.stderr.decode().splitlines()
    assert len(errors) == len(broken)
    for error, (path, reason) in zip(errors, broken.items(), strict=True):
        name = path.replace("\n", r"\n")
        assert error.startswith(f"w2vbert-fast: {name}: ")
        assert reason in error


def on_a_terminal(*arguments: str | Path, keep: str) -> tuple[str, bytes]:
    """Run with standard error, or both outputs, on a terminal: what it shows, what is piped."""
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if keep == "stdout" else terminal,
        stderr=terminal,
        env={**ENVIRONMENT, "TERM": "xterm"},
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(main)
    piped = process.stdout.read() if process.stdout is not None else b""
    assert process.wait() == 0
    return shown.decode(), piped


def test_progress_of_several_files(
    tiny_checkpoint: Path, recordings: dict[str, np.ndarray]
) -> None:
    files = list(recordings)[:3]
    shown, piped = on_a_terminal("transcribe", *files, "--model", tiny_checkpoint, keep="stdout")
    assert "3/3" in shown
    assert len(piped.decode().splitlines()) == 3
    assert "\x1b" not in piped.decode()


def test_a_terminal_shows_names_texts_and_progress(
    tiny_checkpoint: Path,
    recordings: dict[str, np.ndarray],
    reference_text: Callable[[np.ndarray], str],
) -> None:
    files = list(recordings)[:2]
    shown, _ = on_a_terminal("transcribe", *files, "--model", tiny_checkpoint, keep="nothing")
    assert "2/2" in shown
    for file in files:
        assert Path(file).name in shown
        assert reference_text(recordings[file])[:60] in shown
    assert shown.count("real-time factor") == 2


def test_one_file_has_no_progress_bar(
    tiny_checkpoint: Path, recordings: dict[str, np.ndarray]
) -> None:
    shown, piped = on_a_terminal(
        "transcribe", next(iter(recordings)), "--model", tiny_checkpoint, keep="stdout"
    )
    assert shown == ""
    assert piped.count(b"\n") == 1


def test_a_reader_that_goes_away_causes_no_traceback(
    tiny_checkpoint: Path, recordings: dict[str, np.ndarray]
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run(
        [*COMMAND, "transcribe", *recordings, "--model", tiny_checkpoint],
        stdout=write_end,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    os.close(write_end)
    assert result.returncode == 1
    assert b"Traceback" not in result.stderr


def encoder_only(folder: Path) -> str:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "wav2vec2-bert", "architectures": ["Wav2Vec2BertModel"]})
    )
    return str(folder)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda folder: str(folder / "nowhere"), "nowhere"),
        (lambda folder: str(folder), "config.json"),
        (encoder_only, "checkpoint of Wav2Vec2BertModel"),
        (lambda folder: "some/model-that-is-not-cached", "some/model-that-is-not-cached"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(
    tmp_path: Path, model: Callable[[Path], str], expected: str
) -> None:
    result = invoke("transcribe", "a.wav", "--model", model(tmp_path), "--device", "cpu")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("w2vbert-fast: ")
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("missing:\n  a.weight\n  b\x1b[31m", "missing:\n  a.weight\n  b\\x1b[31m"),
        ("404:\n\nno such\tname\n at all\n", "404: no such name at all"),
        ("", "ValueError"),
    ],
)
def test_of_an_error_only_the_entries_of_a_list_are_lines(
    capfd: pytest.CaptureFixture[str], message: str, expected: str
) -> None:
    with pytest.raises(SystemExit):
        messages.fail(ValueError(message))
    assert capfd.readouterr() == ("", f"w2vbert-fast: {expected}\n")


def test_the_exit_status_of_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    result = run("transcribe", "a.wav", "--model", tmp_path / "nowhere")
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.decode().count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "Usage"),
        (("transcribe",), "INPUT"),
        (("transcribe", "a.wav", "--dtype", "int3"), "--dtype"),
        (("transcribe", "a.wav", "--no-such-option"), "--no-such-option"),
        (("translate", "a.wav"), "translate"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], expected: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert expected in (result.stdout + result.stderr).decode()
    assert b"Traceback" not in result.stderr


def test_an_interrupt_while_pytorch_is_imported_ends_the_process() -> None:
    # PyTorch imports NumPy where it takes an interrupt for there being none.
    code = """if True:
        import os, signal, sys

        class Interrupting:
            def find_spec(self, name, path, target=None):
                if name == "numpy.matrixlib":
                    sys.meta_path.remove(self)
                    os.kill(os.getpid(), signal.SIGINT)

        sys.meta_path.insert(0, Interrupting())
        from w2vbert_fast.cli import main
        sys.argv = ["w2vbert-fast", "doctor"]
        main()
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


def test_devices_that_are_not_there(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"'cuda:99' is not there: PyTorch sees \d+ CUDA devices"):
        load_pipeline(tiny_checkpoint, device="cuda:99")
    with pytest.raises(ValueError, match="'toaster' is unknown"):
        load_pipeline(tiny_checkpoint, device="toaster")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["transcribe", "--help"]])
def test_help_and_version_do_not_wait_for_pytorch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from w2vbert_fast.cli import main\n"
        f"sys.argv = ['w2vbert-fast', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stderr
    expected = {
        "--version": f"w2vbert-fast {w2vbert_fast.__version__}\n",
        "--help": "transcribe",
        "transcribe": "--model",
    }[arguments[0]]
    assert expected in result.stdout


MISSING = "{0} is not installed. Install it with: pip install 'w2vbert_fast[{1}]'"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_cli_extra_the_command_says_how_to_install_it(missing: str) -> None:
    code = (
        f"import sys\nsys.modules[{missing!r}] = None\nfrom w2vbert_fast.cli import main\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"w2vbert-fast: {MISSING.format(missing, 'audio,cli')}\n"


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> Pipeline:
    return load_pipeline(tiny_checkpoint)


@pytest.mark.parametrize(("missing", "file"), [("soundfile", 0), ("soxr", 1), ("av", -1)])
def test_without_the_audio_extra_the_command_says_how_to_install_it(
    tiny_checkpoint: Path,
    recordings: dict[str, np.ndarray],
    missing: str,
    file: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    result = invoke("transcribe", list(recordings)[file], "--model", tiny_checkpoint)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"w2vbert-fast: {MISSING.format(missing, 'audio')}\n"


def test_a_batch_gives_the_texts_of_its_utterances_alone(
    pipeline: Pipeline, reference_text: Callable[[np.ndarray], str]
) -> None:
    waveforms = [speech_like(seconds, 16_000, seed=7) for seconds in (1.3, 0.1, 2.9, 0.777)]
    got = pipeline.recognize([torch.from_numpy(samples) for samples in waveforms])
    assert got == [reference_text(samples) for samples in waveforms]


def test_the_padding_of_a_batch_is_not_decoded(pipeline: Pipeline) -> None:
    """Not even where the checkpoint's configuration names another blank than its tokenizer."""
    waveforms = [torch.from_numpy(speech_like(seconds, 16_000)) for seconds in (0.5, 1.5)]
    wanted = [pipeline.recognize([samples])[0] for samples in waveforms]
    config = pipeline.model.config
    blank, config.pad_token_id = config.pad_token_id, 1
    try:
        assert pipeline.recognize(waveforms) == wanted
    finally:
        config.pad_token_id = blank


def test_transcribe_is_lazy_and_in_order(
    pipeline: Pipeline, recordings: dict[str, np.ndarray]
) -> None:
    taken: list[str] = []

    def paths() -> Any:
        for path in recordings:
            taken.append(path)
            yield path

    rows = transcribe(paths(), pipeline)
    assert taken == []
    first = next(rows)
    # Read ahead by one, while one is on its way.
    assert taken[:1] == [first.file] == list(recordings)[:1]
    assert len(taken) <= 3 < len(recordings)
    assert [first.file, *(row.file for row in rows)] == list(recordings)


def test_the_real_time_factor_is_processing_time_over_audio_time() -> None:
    assert Transcript("a", "", audio_seconds=4.0, processing_seconds=1.0).real_time_factor == 0.25
    assert Transcript("a", error="is bad").real_time_factor is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
)
def test_a_file_that_does_not_fit_into_memory_is_reported_and_the_next_one_follows(
    pipeline: Pipeline,
    recordings: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail_once(self: Pipeline, waveforms: Any) -> Any:
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(Pipeline, "logits", fail_once)
    first, second = transcribe(list(recordings)[:2], pipeline)
    assert first.text is None
    assert first.error == "not enough memory for 2 seconds of audio"
    assert second.error is None


def test_other_failures_are_not_hidden(
    pipeline: Pipeline, recordings: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Pipeline, waveforms: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Pipeline, "logits", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        list(transcribe(list(recordings), pipeline))


def test_the_dtype_of_the_weights(tiny_checkpoint: Path, recordings: dict[str, np.ndarray]) -> None:
    half = load_pipeline(tiny_checkpoint, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    (row,) = transcribe(list(recordings)[:1], half)
    assert row.text
    assert {p.dtype for p in load_pipeline(tiny_checkpoint).model.parameters()} == {torch.float32}


def test_half_precision_checkpoints_run_in_float32_on_a_cpu(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    load_pipeline(tiny_checkpoint, dtype="float16").model.save_pretrained(tmp_path)
    load_pipeline(tiny_checkpoint).processor.save_pretrained(tmp_path)
    model = load_pipeline(tmp_path, device="cpu").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_tokenizer_without_a_blank_is_refused_at_once(tiny_checkpoint: Path) -> None:
    pipeline = load_pipeline(tiny_checkpoint)
    pipeline.processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad_token"):
        Pipeline(pipeline.model, pipeline.processor)


def test_demo_transcribes_its_samples() -> None:
    rows = [json.loads(line) for line in (DEMO / "samples.jsonl").read_text().splitlines()]
    assert 3 <= len(rows) <= 5
    files = [str(DEMO / row["file"]) for row in rows]
    result = run("transcribe", "--json", *files)
    assert result.stderr.decode() == (
        "w2vbert-fast: the model 'demo' knows English telephone prompts only; "
        "for open speech: --model hf-audio/wav2vec2-bert-CV16-en\n"
    )
    assert result.returncode == 0
    got = [json.loads(line) for line in result.stdout.decode().splitlines()]
    assert [row["file"] for row in got] == files
    assert [row["text"] for row in got] == [row["text"] for row in rows]
