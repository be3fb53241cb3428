"""The quickstart scripts in `examples`, run as a reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers

from tests.helpers.signals import speech_like

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("clips")
    found = {}
    for seconds in (1.7, 0.4):
        path = folder / f"{seconds}.wav"
        found[path] = speech_like(seconds, 16_000, seed=5)
        soundfile.write(path, found[path], 16_000, subtype="FLOAT")
    return found


def run(script: str, *arguments: str | Path) -> str:
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_transcribe(tiny_checkpoint: Path, clips: dict[Path, np.ndarray]) -> None:
    missing = tiny_checkpoint / "missing.wav"
    lines = run("transcribe.py", *clips, missing, "--model", tiny_checkpoint).splitlines()
    processor = transformers.Wav2Vec2BertProcessor.from_pretrained(tiny_checkpoint)
    model = transformers.Wav2Vec2BertForCTC.from_pretrained(tiny_checkpoint).eval()
    wanted = []
    for path, samples in clips.items():
        features = processor(samples, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            (text,) = processor.batch_decode(model(**features).logits.argmax(-1))
        wanted.append(f"{path} ({samples.size / 16_000:.1f} s): {text}")
    assert lines == [*wanted, f"{missing}: No such file or directory"]


def test_extract_features(tiny_checkpoint: Path, clips: dict[Path, np.ndarray]) -> None:
    lines = run("extract_features.py", *clips, "--model", tiny_checkpoint, "--layer", "1")
    assert len(lines.splitlines()) == len(clips)
    extractor = transformers.SeamlessM4TFeatureExtractor.from_pretrained(tiny_checkpoint)
    model = transformers.Wav2Vec2BertModel.from_pretrained(tiny_checkpoint).eval()
    for path, samples in clips.items():
        features = extractor(samples, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            states = model(**features, output_hidden_states=True).hidden_states[1][0]
        states = states[: int(features["attention_mask"].sum())].numpy()
        got = np.load(f"{path}.npy")
        assert (got.dtype, got.shape) == (np.dtype(np.float32), states.shape)
        # The reference computes its features in float64.
        assert np.linalg.norm(got - states) <= 1e-3 * np.linalg.norm(states)
