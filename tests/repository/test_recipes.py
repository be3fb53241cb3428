"""docs/use/recipes.md: each block, as it stands there, against what the pipeline itself computes.

The right values come from the pipelines' own code: transformers' extractor for X-Codec-2, else the
formula in the source that a test names, written out on transformers' classes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.utils import is_torchaudio_available

from tests.helpers.reference import pair, relative_error

RECIPES = Path(__file__).resolve().parents[2] / "docs" / "use" / "recipes.md"
BLOCKS = {
    block.partition("\n")[0].removeprefix("# "): block
    for block in re.findall(r"```python\n(.*?)```", RECIPES.read_text(), re.DOTALL)
}
# Where the number of mel frames (400 samples, then 160 each) or of hops of 320 changes.
RESIDUES = (0, 1, 79, 80, 81, 159, 160, 161, 239, 240, 241, 319)
SAMPLES = tuple(3200 + residue for residue in RESIDUES)


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


@pytest.fixture(scope="module")
def setup(folder: Path) -> dict[str, Any]:
    """The names that the setup block leaves, run in the folder of the checkpoints."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        exec(compile(BLOCKS["setup"], "recipes.md: setup", "exec"), names)
    return names


@pytest.fixture
def run_block(
    setup: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Runs a block in the folder of the checkpoints; gives all names that are there then."""
    monkeypatch.chdir(folder)

    def run(name: str, waveform: Tensor, **others: Any) -> dict[str, Any]:
        names = {**setup, "waveform": waveform, **others}
        exec(compile(BLOCKS[name], f"recipes.md: {name}", "exec"), names)
        return names

    return run


@torch.no_grad()
def hidden_state(
    reference: tuple[Any, Any], waveform: Tensor, layer: int, *, masked: bool
) -> Tensor:
    extractor, model = reference
    inputs = extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
    mask = inputs["attention_mask"] if masked else None
    output = model(inputs["input_features"], attention_mask=mask, output_hidden_states=True)
    state: Tensor = output.hidden_states[layer]
    return state


def assert_every_frame_equal(ours: Tensor, reference: Tensor) -> None:
    """`[1, T, C]` each. The last frame, half padding, is one that clients use."""
    assert ours.shape == reference.shape
    for mine, theirs in zip(ours[0], reference[0], strict=True):
        assert relative_error(mine, theirs) <= 1e-5


class Probe:
    """Stands in for the model of a block: hands back what it is fed."""

    def encode(self, input_features: Tensor, *, layer: int) -> Tensor:
        self.layer = layer
        return input_features


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
    run_block: Callable[..., Any], reference: tuple[Any, Any], samples: int
) -> None:
    """index-tts, `indextts/infer_v2.py`, `IndexTTS2.get_emb`; Amphion,
    `models/tts/maskgct/maskgct_utils.py`, `extract_features` and `extract_semantic_code`."""
    waveform = waveform_of(samples)
    names = run_block("IndexTTS2, MaskGCT", waveform)
    stats = torch.load("wav2vec2bert_stats.pt")
    state = hidden_state(reference, waveform, 17, masked=True)
    expected = (state - stats["mean"]) / torch.sqrt(stats["var"])
    assert_every_frame_equal(names["features"], expected)


@pytest.mark.parametrize("samples", SAMPLES)
def test_dualcodec(run_block: Callable[..., Any], reference: tuple[Any, Any], samples: int) -> None:
    """dualcodec 0.4.2, `infer/dualcodec/inference_with_semantic.py`, `Inference.encode`, where
    `semantic_downsample_factor` is 2 (25 Hz) or 4 (12.5 Hz)."""
    waveform = waveform_of(samples)
    names = run_block("DualCodec", waveform)
    stats = torch.load("w2vbert2_mean_var_stats_emilia.pt")
    mean, std = stats["mean"], torch.sqrt(stats["var"])
    state = hidden_state(reference, waveform, 17, masked=True)
    expected = F.avg_pool1d(((state - mean) / std).transpose(1, 2), 2, 2)
    assert_every_frame_equal(names["features"].mT, expected.mT)


@pytest.fixture
def xcodec2_extractor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' own extractor for X-Codec-2.

    Where torchaudio is not installed, its filterbank is that of transformers' other extractor.
    """
    name = "transformers.models.xcodec2.feature_extraction_xcodec2"
    module: Any = importlib.import_module(name)
    if not is_torchaudio_available():
        filterbank = transformers.SeamlessM4TFeatureExtractor()

        def fbank(waveform: Tensor, **options: Any) -> Tensor:
            assert options["snip_edges"] and options["frame_shift"] == 10.0
            mel = filterbank._extract_fbank_features(waveform[0].numpy() / 2**15)
            return torch.from_numpy(mel)

        stand_in = SimpleNamespace(compliance=SimpleNamespace(kaldi=SimpleNamespace(fbank=fbank)))
        monkeypatch.setattr(module, "torchaudio", stand_in, raising=False)
    return module.Xcodec2FeatureExtractor()


def test_x_codec_2_is_fed_what_transformers_extractor_makes(
    xcodec2_extractor: Any, run_block: Callable[..., Any]
) -> None:
    for samples in range(1600, 1920):
        waveform = waveform_of(samples)
        wanted = xcodec2_extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
        assert wanted["input_features_mask"].all()
        names = run_block("X-Codec-2", waveform, model=Probe())
        features = names["features"]
        assert names["model"].layer == 16 and features.shape == wanted["input_features"].shape
        assert relative_error(features, wanted["input_features"]) <= 1e-5, samples


@pytest.mark.parametrize("samples", SAMPLES)
def test_x_codec_2(run_block: Callable[..., Any], reference: tuple[Any, Any], samples: int) -> None:
    """xcodec2 0.1.5, `modeling_xcodec2.py`, `XCodec2Model.encode_code`."""
    waveform = waveform_of(samples)
    names = run_block("X-Codec-2", waveform)
    wav = waveform[None]
    wav = F.pad(wav, (0, 320 - (wav.shape[1] % 320)))
    expected = hidden_state(reference, F.pad(wav[0, :], (160, 160)), 16, masked=False)
    assert names["features"].shape == expected.shape == (1, samples // 320 + 1, 48)
    assert relative_error(names["features"], expected) <= 1e-5


def test_neucodec_is_fed_what_its_code_makes(
    run_block: Callable[..., Any], reference: tuple[Any, Any]
) -> None:
    for samples in range(1600, 1920):
        waveform = waveform_of(samples)
        wanted = reference[0](neucodec_audio(waveform).numpy(), sampling_rate=16000)
        names = run_block("NeuCodec", waveform, model=Probe())
        features, wanted = names["features"], torch.as_tensor(wanted["input_features"])
        assert names["model"].layer == 16 and features.shape == wanted.shape
        assert relative_error(features, wanted) <= 1e-5, samples


def neucodec_audio(waveform: Tensor) -> Tensor:
    """neucodec 0.0.6, `model.py`, `NeuCodec._prepare_audio`."""
    y = waveform[None, None]
    return F.pad(y, (0, 320 - (y.shape[-1] % 320)))[0, 0]


@pytest.mark.parametrize("samples", SAMPLES)
def test_neucodec(run_block: Callable[..., Any], reference: tuple[Any, Any], samples: int) -> None:
    """neucodec 0.0.6, `model.py`, `NeuCodec.encode_code`."""
    waveform = waveform_of(samples)
    names = run_block("NeuCodec", waveform)
    expected = hidden_state(reference, neucodec_audio(waveform), 16, masked=False)
    assert_every_frame_equal(names["features"], expected)


@pytest.mark.parametrize("samples", [*SAMPLES, 140_000])
def test_smart_turn(run_block: Callable[..., Any], folder: Path, samples: int) -> None:
    """smart-turn, `inference.py` of its first version, `predict_endpoint`."""
    waveform = waveform_of(samples)
    names = run_block("smart-turn", waveform)
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
def test_speaker_embeddings(run_block: Callable[..., Any], folder: Path, samples: int) -> None:
    # Even numbers of mel frames: transformers' pooling is right where nothing is masked.
    waveform = waveform_of(samples)
    names = run_block("speaker embeddings", waveform)
    model = transformers.Wav2Vec2BertForXVector.from_pretrained(folder / "my-x-vector-model").eval()
    extractor = transformers.SeamlessM4TFeatureExtractor(padding_value=1)
    inputs = extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
    assert inputs["attention_mask"].all()
    with torch.no_grad():
        expected = F.normalize(model(inputs["input_features"]).embeddings, dim=-1)
    assert relative_error(names["embedding"], expected) <= 1e-5
