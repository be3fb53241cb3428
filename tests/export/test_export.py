"""`export`: the padded graph against transformers, and what other runtimes make of it.

The oracle is transformers, one utterance at a time; tracing takes seconds, so that the graph
itself is compared for every kind of model and the files for a few.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.cli.test_cli import run
from tests.helpers.reference import CLASSES, POSITIONS, padded_batch, pair, relative_error
from w2vbert_fast import SeamlessM4TFeatureExtractor, Wav2Vec2BertForCTC
from w2vbert_fast.export import ExportError, ExportGraph, export, formats, run_exported

LENGTHS = (37, 20, 9)
BLANK = 100.0
ROWS = ("last_hidden_state", "logits", "embeddings")


def with_left_padding(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The second row right-aligned, NaN in all padding."""
    mask = mask.clone()
    mask[1] = mask[1].flip(0)
    length = int(mask[1].sum())
    features = features.clone()
    features[1, -length:] = features[1, :length].clone()
    return features.masked_fill(mask[..., None] == 0, torch.nan), mask


def alone(reference: nn.Module, features: Tensor, mask: Tensor, name: str) -> list[Tensor]:
    """What transformers gives for each row's valid frames alone."""
    with torch.no_grad():
        return [
            reference(row[valid][None])[name][0]
            for row, valid in zip(features, mask.bool(), strict=True)
        ]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("class_name", CLASSES)
def test_the_graph_answers_as_the_reference(class_name: str, positions: str | None) -> None:
    reference, ours = pair(class_name, position_embeddings_type=positions)
    graph = ExportGraph(ours)
    features, mask = with_left_padding(*padded_batch(LENGTHS, 20))
    with torch.no_grad():
        outputs = dict(zip(graph.signature.outputs, graph(features, mask), strict=True))
    compared = 0
    for name in ROWS:
        if name not in outputs:
            continue
        compared += 1
        for row, expected in enumerate(alone(reference, features, mask, name)):
            got = outputs[name][row]
            if name == "embeddings" or got.dim() == 1:
                assert relative_error(got, expected) <= 1e-5
                continue
            assert outputs["lengths"][row] == len(expected)
            assert relative_error(got[mask[row].bool()], expected) <= 1e-5
            padding = got[~mask[row].bool()]
            if class_name == "Wav2Vec2BertForCTC":
                assert (padding[:, ours.config.pad_token_id] == BLANK).all()
                padding = padding[:, torch.arange(padding.shape[1]) != ours.config.pad_token_id]
            assert not padding.any()
    assert compared


@pytest.mark.parametrize("class_name", ["Wav2Vec2BertModel", "Wav2Vec2BertForCTC"])
@pytest.mark.parametrize("kernel_stride", [(3, 2), (5, 3)])
def test_the_graph_with_adapters(class_name: str, kernel_stride: tuple[int, int]) -> None:
    kernel, stride = kernel_stride
    reference, ours = pair(
        class_name,
        add_adapter=True,
        output_hidden_size=32,
        num_adapter_layers=2,
        adapter_kernel_size=kernel,
        adapter_stride=stride,
        use_intermediate_ffn_before_adapter=True,
    )
    graph = ExportGraph(ours)
    features, mask = with_left_padding(*padded_batch(LENGTHS, 20))
    with torch.no_grad():
        rows, lengths = graph(features, mask)
    for row, expected in enumerate(alone(reference, features, mask, graph.signature.outputs[0])):
        assert lengths[row] == len(expected)
        assert relative_error(rows[row, : len(expected)], expected) <= 1e-5


@pytest.mark.parametrize("kernel_stride", [(3, 2), (5, 3)])
def test_x_vectors_behind_an_adapter_ask_for_the_frames_that_both_take(
    kernel_stride: tuple[int, int],
) -> None:
    kernel, stride = kernel_stride
    reference, ours = pair(
        "Wav2Vec2BertForXVector",
        add_adapter=True,
        num_adapter_layers=2,
        adapter_kernel_size=kernel,
        adapter_stride=stride,
    )
    graph = ExportGraph(ours)
    fewest = graph.fewest()
    features, mask = with_left_padding(*padded_batch((fewest + 9, fewest), 20))
    with torch.no_grad():
        embeddings = graph(features, mask)[1]
        for row, expected in enumerate(alone(reference, features, mask, "embeddings")):
            assert relative_error(embeddings[row], expected) <= 1e-5
        with pytest.raises(ValueError, match=r"statistics pooling .* needs at least 8"):
            ours(torch.randn(1, fewest - 1, 20))
    if stride == 2:  # what torch.export can count with
        assert formats._program(graph)[1][0][1].min == fewest


@pytest.mark.parametrize("class_name", CLASSES[2:])
def test_the_graph_with_mixed_layers(class_name: str) -> None:
    reference, ours = pair(class_name, use_weighted_layer_sum=True)
    features, mask = with_left_padding(*padded_batch(LENGTHS, 20))
    with torch.no_grad():
        logits = ExportGraph(ours)(features, mask)[0]
    for row, expected in enumerate(alone(reference, features, mask, "logits")):
        got = logits[row] if logits.dim() == 2 else logits[row][mask[row].bool()]
        assert relative_error(got, expected) <= 1e-5


def test_rows_without_valid_frames_are_finite() -> None:
    _, ours = pair("Wav2Vec2BertModel", add_adapter=True)
    features, mask = padded_batch((20, 20), 20)
    mask[1] = 0
    with torch.no_grad():
        rows, lengths = ExportGraph(ours)(features, mask)
    assert lengths.tolist() == [10, 0]
    assert rows.isfinite().all()
    assert not rows[1].any()


def speech(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Noise with quiet and silent parts, `[batch, samples]`, not zero in padding; the lengths."""
    generator = torch.Generator().manual_seed(3)
    waveform = 0.1 * torch.randn(len(lengths), max(lengths), generator=generator)
    waveform[:, ::3000] = 0.5
    waveform[:, 1000:3000] *= 1e-4
    waveform[:, 4000:5000] = 0.0
    return waveform, torch.tensor(lengths)


@pytest.mark.parametrize("lengths", [(16000, 15839, 9000, 720), (12345,), (8000, 300)])
@pytest.mark.parametrize("stride", [1, 2])
def test_waveforms_become_the_references_features(lengths: tuple[int, ...], stride: int) -> None:
    reference = transformers.SeamlessM4TFeatureExtractor(padding_value=1, stride=stride)
    _, ours = pair("Wav2Vec2BertModel", feature_projection_input_dim=80 * stride)
    extractor = SeamlessM4TFeatureExtractor(padding_value=1.0, stride=stride)
    graph = ExportGraph(ours, extractor)
    waveform, num_samples = speech(lengths)
    assert graph.features is not None
    features, mask = graph.features(waveform, num_samples)
    for row, length in enumerate(lengths):
        if length < 400:
            assert not mask[row].any()
            continue
        expected = reference(
            waveform[row, :length].numpy(), sampling_rate=16000, return_tensors="pt"
        )
        valid = int(expected["attention_mask"].sum())
        if stride == 2:  # with 1, transformers' mask is empty
            assert mask[row].sum() == valid
        else:
            valid = int(mask[row].sum())
            assert valid == (length - 400) // 160 + 1
        got = features[row, :valid]
        assert (got - expected["input_features"][0, :valid]).abs().max() <= 2e-3
    ours_alone = extractor(waveform[0, : lengths[0]], sampling_rate=16000, return_tensors="pt")
    row = ours_alone["input_features"][0]
    valid = int(mask[0].sum())
    assert features.shape[1] == len(row)
    assert relative_error(features[0, :valid], row[:valid]) <= 1e-6


def test_onnx_from_waveform_to_logits(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    reference, ours = pair(
        "Wav2Vec2BertForCTC", num_hidden_layers=1, feature_projection_input_dim=160
    )
    extractor = SeamlessM4TFeatureExtractor(padding_value=1.0)
    exported = export(ours, tmp_path / "m.onnx", "onnx", feature_extractor=extractor)
    assert [file.name for file in exported.files] == ["m.onnx"]
    assert exported.error is not None
    assert exported.error <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert {i.name: i.shape for i in session.get_inputs()} == {
        "waveform": ["batch", "samples"],
        "num_samples": ["batch"],
    }
    theirs = transformers.SeamlessM4TFeatureExtractor(padding_value=1)
    for lengths in ((16000, 9000, 2000), (23456,)):
        waveform, num_samples = speech(lengths)
        inputs = {"waveform": waveform.numpy(), "num_samples": num_samples.numpy()}
        logits, frames = (torch.from_numpy(y) for y in session.run(None, inputs))
        for row, length in enumerate(lengths):
            audio = waveform[row, :length].numpy()
            features = theirs(audio, sampling_rate=16000, return_tensors="pt")
            with torch.no_grad():
                expected = reference(**features).logits[0]
            assert frames[row] == features["attention_mask"].sum()
            # The frame of half a pair is no valid one, but has logits.
            assert relative_error(logits[row, : len(expected)], expected) <= 1e-4
            assert (logits[row, len(expected) :].argmax(-1) == ours.config.pad_token_id).all()


def test_the_weights_of_a_large_onnx_model_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    monkeypatch.setattr(formats, "_LARGEST_SINGLE_FILE", 0)
    reference, ours = pair("Wav2Vec2BertModel", num_hidden_layers=1)
    exported = export(ours, tmp_path / "m.onnx", "onnx", layer=0)
    assert [file.name for file in exported.files] == ["m.onnx", "m.onnx.data"]
    assert all(file.is_file() for file in exported.files)
    features, mask = padded_batch((9, 4), 20)
    (tmp_path / "elsewhere").mkdir()
    for file in exported.files:
        file.rename(tmp_path / "elsewhere" / file.name)
    rows, _ = run_exported(tmp_path / "elsewhere" / "m.onnx", "onnx", (features, mask))
    with torch.no_grad():
        expected = reference(features[1:, :4], output_hidden_states=True).hidden_states[0]
    assert relative_error(rows[1, :4], expected[0]) <= 1e-5


def test_a_program_of_torch_export_with_layer_and_statistics(tmp_path: Path) -> None:
    reference, ours = pair("Wav2Vec2BertForCTC", add_adapter=True, num_hidden_layers=2)
    ours.use_fast_kernels = True
    stats = (torch.randn(48), torch.rand(48) + 0.1)
    path = tmp_path / "new" / "m.pt2"
    exported = export(ours, path, "torch", layer=1, stats=stats)
    assert ours.use_fast_kernels
    assert exported.outputs == ("hidden_state", "lengths")
    names = torch.export.load(path).state_dict
    assert any("layers.0" in name for name in names)
    assert not any(part in name for name in names for part in ("layers.1", "adapter", "lm_head"))
    features, mask = padded_batch((50, 3), 20)
    rows, lengths = run_exported(path, "torch", (features, mask))
    assert lengths.tolist() == [50, 3]
    for row, length in enumerate((50, 3)):
        with torch.no_grad():
            states = reference.wav2vec2_bert(
                features[row : row + 1, :length], output_hidden_states=True
            ).hidden_states
        expected = (states[1][0] - stats[0]) / torch.sqrt(stats[1])
        assert relative_error(rows[row, :length], expected) <= 1e-5
        assert not rows[row, length:].any()
    # One frame of one utterance.
    assert run_exported(path, "torch", (features[:1, :1], mask[:1, :1]))[0].shape == (1, 1, 48)


def test_an_aotinductor_package(tmp_path: Path) -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    reference, ours = pair("Wav2Vec2BertForSequenceClassification", num_hidden_layers=1)
    path = tmp_path / "m.pt2"
    exported = export(ours, path, "aoti")
    assert exported.error is not None
    assert exported.error <= 1e-5
    for lengths in ((50, 3, 20, 1), (7,)):
        features, mask = padded_batch(lengths, 20)
        (logits,) = run_exported(path, "aoti", (features, mask))
        expected = torch.stack(alone(reference, features, mask, "logits"))
        assert relative_error(logits, expected) <= 1e-5


def test_a_file_that_answers_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = pair("Wav2Vec2BertModel", num_hidden_layers=1)
    honest = formats.run_exported
    monkeypatch.setattr(
        formats, "run_exported", lambda *arguments: [1.001 * y for y in honest(*arguments)]
    )
    path = tmp_path / "m.pt2"
    path.write_text("an earlier file")
    with pytest.raises(ExportError, match=r"last_hidden_state differs .* by 1\.0e-03"):
        export(ours, path, "torch")
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    assert path.read_text() == "an earlier file"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tflite"}, "format is 'tflite'; it must be one of onnx, aoti, torch"),
        ({"path": "m.onnx"}, r"path is m\.onnx; for format torch it must end in \.pt2"),
        ({"layer": 3}, "layer is 3; a model of 2 layers has hidden states 0 to 2"),
        ({"layer": True}, "layer is True"),
        ({"stats": (torch.zeros(48), torch.ones(48))}, "stats were given without layer"),
        ({"layer": 1, "stats": (torch.zeros(48), torch.zeros(48))}, "not above 0"),
        ({"opset": 17}, "opset is 17; it must be at least 18"),
        ({"feature_extractor": SeamlessM4TFeatureExtractor()}, "gives 160 .* the model takes 20"),
    ],
)
def test_impossible_arguments_are_named(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, ours = pair("Wav2Vec2BertModel")
    with pytest.raises(ValueError, match=message):
        export(ours, **{"path": "m.pt2", "format": "torch", **arguments})
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_exported_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    reference, ours = pair("Wav2Vec2BertModel")
    with pytest.raises(TypeError, match=r"transformers\..*must be one of w2vbert_fast's models"):
        export(reference, path, "torch")
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        export(ours.train(), path, "torch")
    with pytest.raises(ValueError, match=r"torch\.bfloat16 weights; export it as float32"):
        export(ours.eval().bfloat16(), path, "torch")


def test_a_machine_without_a_compiler_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    _, ours = pair("Wav2Vec2BertModel", num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"needs a C\+\+ compiler"):
        export(ours, tmp_path / "m.pt2", "aoti")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    result = run("export", "demo", path, "--format", "torch", "--layer", "1", "--json")
    assert result.returncode == 0, result.stderr
    written = json.loads(result.stdout)
    assert written["files"] == [str(path)]
    assert written["outputs"] == ["hidden_state", "lengths"]
    assert written["error"] <= 1e-5
    demo = Path(formats.__file__).parent.parent / "demo"
    model = Wav2Vec2BertForCTC.from_pretrained(demo, dtype="float32")
    features, mask = padded_batch((30, 11), 160)
    rows, _ = run_exported(path, "torch", (features, mask))
    assert relative_error(rows, model.encode(features, mask, layer=1)) <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "m.onnx", "--format", "tflite"), b"--format is 'tflite'"),
        (("demo", "m.bin"), b"it must end in .onnx"),
        (("demo", "m.pt2", "--format", "torch", "--stats", "x.pt"), b"--stats needs --layer"),
        (("demo", "m.pt2", "--format", "torch", "--layer", "99"), b"layer is 99"),
        (("no/such/folder", "m.onnx"), b"no/such/folder"),
    ],
)
def test_the_command_names_what_is_wrong(
    arguments: tuple[str, ...], message: bytes, tmp_path: Path
) -> None:
    result = run("export", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count(b"\n") == 1
    assert not list(tmp_path.iterdir())
