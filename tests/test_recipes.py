"""docs/recipes.md: each block, as it stands there, against the pipeline's own formula.

The formulas are written out on transformers' classes, one utterance at a time, as the pipelines
publish them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from tests.reference import pair, relative_error

RECIPES = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
BLOCKS = {
    block.partition("\n")[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(.*?)```", RECIPES.read_text(), re.DOTALL)
}
# Frames of mel in turn odd and even, and a multiple of 320 samples.
SAMPLES = (16000, 15839, 22123)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small checkpoints and statistics under the names that the recipes use."""
    path = tmp_path_factory.mktemp("recipes")
    sizes: dict[str, Any] = {"feature_projection_input_dim": 160, "num_hidden_layers": 18}
    for name, kind, more in (
        ("facebook/w2v-bert-2.0", "Wav2Vec2BertModel", {}),
        (
            "pipecat-ai/smart-turn",
            "Wav2Vec2BertForSequenceClassification",
            {"num_hidden_layers": 2, "num_labels": 2},
        ),
        ("my-x-vector-model", "Wav2Vec2BertForXVector", {"num_hidden_layers": 2}),
    ):
        reference, _ = pair(kind, **{**sizes, **more})
        reference.save_pretrained(path / name)
        transformers.SeamlessM4TFeatureExtractor(padding_value=1).save_pretrained(path / name)
    torch.manual_seed(7)
    for name in ("wav2vec2bert_stats.pt", "w2vbert2_mean_var_stats_emilia.pt"):
        torch.save({"mean": torch.randn(48), "var": torch.rand(48) + 0.1}, path / name)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> tuple[Any, Any]:
    name = folder / "facebook/w2v-bert-2.0"
    return (
        transformers.SeamlessM4TFeatureExtractor.from_pretrained(name),
        transformers.Wav2Vec2BertModel.from_pretrained(name).eval(),
    )


def waveform_of(samples: int) -> Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))


def run_block(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, waveform: Tensor
) -> dict[str, Any]:
    """The names that the setup and a block leave, run in the folder of the checkpoints."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"waveform": waveform}
    for part in ("setup", name):
        exec(compile(BLOCKS[part], f"recipes.md: {part}", "exec"), names)
    return names


@torch.no_grad()
def hidden_state(
    reference: tuple[Any, Any], waveform: Tensor, layer: int, *, masked: bool
) -> Tensor:
    extractor, model = reference
    inputs = extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
    mask = inputs["attention_mask"] if masked else None
    output = model(inputs["input_features"], attention_mask=mask, output_hidden_states=True)
    state: Tensor = output.hidden_states[layer]
    # With the mask, what transformers leaves in a padded frame is nobody's feature.
    return state if mask is None else state * mask[..., None]


def test_the_page_holds_these_recipes() -> None:
    assert list(BLOCKS) == [
        "setup",
        "IndexTTS2, MaskGCT",
        "DualCodec",
        "X-Codec-2",
        "NeuCodec",
        "smart-turn",
        "speaker embeddings",
    ]


@pytest.mark.parametrize("samples", SAMPLES)
def test_indextts2_and_maskgct(
    folder: Path, reference: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    waveform = waveform_of(samples)
    names = run_block(folder, monkeypatch, "IndexTTS2, MaskGCT", waveform)
    stats = torch.load("wav2vec2bert_stats.pt")
    state = hidden_state(reference, waveform, 17, masked=True)
    expected = (state - stats["mean"]) / torch.sqrt(stats["var"])
    valid = names["inputs"].attention_mask.bool()
    assert relative_error(names["features"][valid], expected[valid]) <= 1e-5


@pytest.mark.parametrize("samples", SAMPLES)
def test_dualcodec(
    folder: Path, reference: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    waveform = waveform_of(samples)
    names = run_block(folder, monkeypatch, "DualCodec", waveform)
    stats = torch.load("w2vbert2_mean_var_stats_emilia.pt")
    mean, std = stats["mean"], torch.sqrt(stats["var"])
    state = hidden_state(reference, waveform, 17, masked=True)
    expected = F.avg_pool1d(((state - mean) / std).transpose(1, 2), 2, 2)
    whole = int(names["inputs"].attention_mask.sum()) // 2
    assert names["features"].shape == expected.shape
    assert relative_error(names["features"][..., :whole], expected[..., :whole]) <= 1e-5


@pytest.mark.parametrize("samples", SAMPLES)
def test_x_codec_2(
    folder: Path, reference: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    waveform = waveform_of(samples)
    names = run_block(folder, monkeypatch, "X-Codec-2", waveform)
    expected = hidden_state(reference, F.pad(waveform, (160, 160)), 16, masked=False)
    assert names["features"].shape == expected.shape
    assert relative_error(names["features"], expected) <= 1e-5


@pytest.mark.parametrize("samples", SAMPLES)
def test_neucodec(
    folder: Path, reference: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    waveform = waveform_of(samples)
    names = run_block(folder, monkeypatch, "NeuCodec", waveform)
    y = waveform[None, None]
    y = F.pad(y, (0, 320 - (y.shape[-1] % 320)))
    expected = hidden_state(reference, y[0, 0], 16, masked=False)
    assert names["features"].shape == expected.shape
    assert relative_error(names["features"], expected) <= 1e-5


@pytest.mark.parametrize("samples", [*SAMPLES, 140_000])
def test_smart_turn(folder: Path, monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    waveform = waveform_of(samples)
    names = run_block(folder, monkeypatch, "smart-turn", waveform)
    name = folder / "pipecat-ai/smart-turn"
    model = transformers.Wav2Vec2BertForSequenceClassification.from_pretrained(name).eval()
    processor = transformers.AutoFeatureExtractor.from_pretrained(name)
    inputs = processor(
        waveform.numpy(),
        sampling_rate=16000,
        padding="max_length",
        truncation=True,
        max_length=800,
        return_attention_mask=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    assert names["inputs"].input_features.shape == inputs["input_features"].shape == (1, 400, 160)
    assert relative_error(names["logits"], logits) <= 1e-5
    expected = F.softmax(logits, dim=1)[0, 1]
    assert float(names["complete"]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("samples", [16000, 22123])
def test_speaker_embeddings(folder: Path, monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    # Even numbers of mel frames: transformers' pooling is right where nothing is masked.
    waveform = waveform_of(samples)
    names = run_block(folder, monkeypatch, "speaker embeddings", waveform)
    model = transformers.Wav2Vec2BertForXVector.from_pretrained(folder / "my-x-vector-model").eval()
    extractor = transformers.SeamlessM4TFeatureExtractor(padding_value=1)
    inputs = extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
    assert inputs["attention_mask"].all()
    with torch.no_grad():
        expected = F.normalize(model(inputs["input_features"]).embeddings, dim=-1)
    assert relative_error(names["embedding"], expected) <= 1e-5
