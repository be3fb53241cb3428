"""`examples/train_demo.py`: its data steps, and that it trains and resumes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
import torch
import transformers

from tests.helpers.signals import speech_like
from tests.helpers.training import metrics
from w2vbert_fast.training import UtteranceSource

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXTS = ("press one", "hold the line", "one moment", "press the key", "unheard")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with (folder / "manifest.jsonl").open("w") as file:
        for index, text in enumerate(TEXTS):
            rate = (8_000, 16_000)[index % 2]
            soundfile.write(folder / f"{index}.flac", speech_like(1.0, rate, index), rate)
            split = "test" if index >= 3 else "train"
            oov = ["unheard"] if text == "unheard" else []
            row = {"file": f"{index}.flac", "text": text, "split": split, "oov": oov}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", EXAMPLES / "train_demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module
    spec.loader.exec_module(module)
    return module


def test_utterances_are_joined_and_spliced(demo: ModuleType, data: Path, tmp_path: Path) -> None:
    processor = demo.make_processor(tmp_path)
    rows = [json.loads(line) for line in (data / "manifest.jsonl").open()]
    clips = demo.load_clips(data, rows, (1.0, 0.9), processor.feature_extractor)
    assert [len(frames) for frames in clips[0].frames] == [98, 110]
    cuts = {word: [clips[0].frames[0][:20]] for text in TEXTS[:3] for word in text.split()}
    source = demo.TrainingUtterances(
        clips[:3], clips[3:4], cuts, processor.tokenizer, count=200, epochs=2, seed=1
    )
    assert isinstance(source, UtteranceSource)
    kinds = {"spliced": 0, "joined": 0, "synthetic": 0}
    for epoch in range(2):
        for index in range(200):
            draw = source._draw(source._rng(index, epoch), epoch)
            # Half of the clips stand before another one.
            kinds["joined"] += draw.text not in TEXTS
            kinds["spliced"] += all(len(part) == 20 for part in draw.parts)
            kinds["synthetic"] += draw.text.startswith(TEXTS[3])
            assert source.num_frames(index, epoch) == draw.length // 2
    # Half, then a fifth of the draws are synthetic; of the rest two fifths are spliced.
    assert 100 < kinds["spliced"] < 160
    assert 100 < kinds["synthetic"] < 180
    assert kinds["joined"] > 50
    utterance = source.load(7, 1)
    again = source.load(7, 1)
    assert torch.equal(utterance.input_features, again.input_features)
    assert utterance.input_features.shape == (source.num_frames(7, 1), 160)
    assert processor.tokenizer.decode(utterance.labels.tolist(), group_tokens=False) == (
        utterance.text
    )
    mean = utterance.input_features.reshape(-1, 80).mean(0)
    torch.testing.assert_close(mean, torch.zeros(80), rtol=0, atol=2e-2)


def test_it_trains_and_leaves_a_model_in_half_precision(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        *(sys.executable, str(EXAMPLES / "train_demo.py"), str(data), str(out)),
        *("--epochs", "2", "--utterances", "4", "--frame-budget", "400", "--warmup", "1"),
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "3 real, 0 synthetic clips" in result.stdout
    assert "in-vocabulary clips, last step" in result.stdout
    assert metrics(out)[-1]["eval_skipped"] == 0
    model = transformers.Wav2Vec2BertForCTC.from_pretrained(out / "model")
    assert model.dtype == torch.float16
    last = transformers.Wav2Vec2BertForCTC.from_pretrained(out / "last")
    assert torch.equal(model.lm_head.weight, last.lm_head.weight.half())
    transformers.Wav2Vec2BertProcessor.from_pretrained(out / "model")
