"""`convert`: the original checkpoint of w2v-BERT 2.0 to the reference layout and back.

The original's names and shapes are written out here as its files have them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from tests.cli.test_cli import run
from tests.helpers.reference import padded_batch, relative_error
from w2vbert_fast import SeamlessM4TFeatureExtractor, Wav2Vec2BertModel
from w2vbert_fast.checkpoints.weights import CheckpointError
from w2vbert_fast.export.original import convert_original, convert_to_original
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig

WIDTH, FFN, LAYERS, HEAD, KERNEL, FEATURES, POSITIONS = 32, 48, 2, 8, 7, 20, 73


def original(naming: str = "fairseq2", seed: int = 0) -> dict[str, Tensor]:
    """A small checkpoint with the original's names and the shapes that go with them."""
    two = naming == "fairseq2"
    norm = {"weight": (WIDTH,), "bias": (WIDTH,)}

    def linear(out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (out, into), "bias": (out,)}

    layer = {
        "self_attn_layer_norm": norm,
        "self_attn.q_proj": linear(WIDTH, WIDTH),
        "self_attn.k_proj": linear(WIDTH, WIDTH),
        "self_attn.v_proj": linear(WIDTH, WIDTH),
        "self_attn.output_proj" if two else "self_attn.out_proj": linear(WIDTH, WIDTH),
        "self_attn.sdpa.rel_k_embed" if two else "self_attn.rel_k_embedding": {
            "weight": (POSITIONS, HEAD)
        },
        "conv_layer_norm" if two else "conv_module.layer_norm": norm,
        "conv.layer_norm" if two else "conv_module.layer_norm2": norm,
        "layer_norm" if two else "final_layer_norm": norm,
    }
    conv = "conv" if two else "conv_module"
    layer[f"{conv}.pointwise_conv1"] = {"weight": (2 * WIDTH, WIDTH, 1)}
    layer[f"{conv}.depthwise_conv"] = {"weight": (WIDTH, 1, KERNEL)}
    layer[f"{conv}.pointwise_conv2"] = {"weight": (WIDTH, WIDTH, 1)}
    for ffn in ("ffn1", "ffn2"):
        layer[f"{ffn}_layer_norm" if two else f"{ffn}.layer_norm"] = norm
        layer[f"{ffn}.inner_proj" if two else f"{ffn}.w_1"] = linear(FFN, WIDTH)
        layer[f"{ffn}.output_proj" if two else f"{ffn}.w_2"] = linear(WIDTH, FFN)
    front = "encoder_frontend." if two else ""
    modules = {
        f"{front}post_extract_layer_norm" if two else "layer_norm": {
            "weight": (FEATURES,),
            "bias": (FEATURES,),
        },
        f"{front}model_dim_proj" if two else "post_extract_proj": linear(WIDTH, FEATURES),
        "quantizer.entry_proj" if two else "quantizer.weight_proj": linear(10, FEATURES),
        "final_proj": linear(6, WIDTH),
        "final_target_proj" if two else "project_q": linear(6, 6),
    }
    if not two:
        modules |= {"mlm_proj": linear(4, WIDTH), "encoder.layer_norm": norm}
    for index in range(LAYERS):
        modules |= {f"encoder.layers.{index}.{name}": shapes for name, shapes in layer.items()}
    shapes = {
        f"{m}.{name}": shape for m, params in modules.items() for name, shape in params.items()
    }
    shapes["masker.temporal_mask_embed" if two else "mask_emb"] = (WIDTH,)
    shapes["quantizer.entries" if two else "quantizer.vars"] = (1, 10, 3)
    if two:
        shapes["quantizer.num_updates"] = ()
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"model": tensors}, path)
    return path


def by_hand(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """fairseq2's tensors under the reference's names, as transformers' own script renames them:
    one replacement after the other, wherever the text occurs."""
    replacements = [
        ("encoder_frontend.model_dim_proj", "feature_projection.projection"),
        ("encoder_frontend.post_extract_layer_norm", "feature_projection.layer_norm"),
        ("inner_proj", "intermediate_dense"),
        ("self_attn.output_proj", "self_attn.linear_out"),
        ("output_proj", "output_dense"),
        ("self_attn.k_proj", "self_attn.linear_k"),
        ("self_attn.v_proj", "self_attn.linear_v"),
        ("self_attn.q_proj", "self_attn.linear_q"),
        ("self_attn.sdpa.rel_k_embed", "self_attn.distance_embedding"),
        ("conv.pointwise_conv", "conv_module.pointwise_conv"),
        ("conv.depthwise_conv", "conv_module.depthwise_conv"),
        ("conv.layer_norm", "conv_module.depthwise_layer_norm"),
        ("conv_layer_norm", "conv_module.layer_norm"),
        ("masker.temporal_mask_embed", "masked_spec_embed"),
    ]
    renamed = {}
    for name, tensor in source.items():
        if name.startswith(("quantizer", "final_")):
            continue
        for old, new in replacements:
            name = name.replace(old, new)
        name = re.sub(r"(layers\.\d+)\.layer_norm", r"\1.final_layer_norm", name)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("naming", ["fairseq2", "fairseq"])
def test_transformers_and_we_load_what_was_converted(naming: str, tmp_path: Path) -> None:
    tensors = original(naming)
    converted = convert_original(save(tmp_path / "conformer_shaw.pt", tensors), tmp_path / "out")
    reference, problems = transformers.Wav2Vec2BertModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(problems.values()), problems
    ours = Wav2Vec2BertModel.from_pretrained(tmp_path / "out")
    assert ours.config.num_attention_heads == WIDTH // HEAD
    assert ours.config.conv_depthwise_kernel_size == KERNEL
    features, mask = padded_batch((23, 9), FEATURES)
    with torch.no_grad():
        expected = reference.eval()(features[:1]).last_hidden_state
        output = ours(features, mask).last_hidden_state
    assert relative_error(output[:1], expected) <= 1e-5
    assert converted.num_tensors == len(ours.state_dict())
    assert all(file.is_file() for file in converted.files)
    assert SeamlessM4TFeatureExtractor.from_pretrained(tmp_path / "out").padding_value == 1.0


def test_every_tensor_goes_where_the_reference_script_puts_it(tmp_path: Path) -> None:
    tensors = original()
    converted = convert_original(save(tmp_path / "a.pt", tensors), tmp_path / "out")
    loaded = transformers.Wav2Vec2BertModel.from_pretrained(tmp_path / "out").state_dict()
    expected = by_hand(tensors)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    left_out = {"quantizer.entries", "quantizer.num_updates"} | {
        f"{module}.{name}"
        for module in ("quantizer.entry_proj", "final_proj", "final_target_proj")
        for name in ("weight", "bias")
    }
    assert set(converted.left_out) == left_out


@pytest.mark.parametrize("naming", ["fairseq2", "fairseq"])
def test_there_and_back_gives_the_original(naming: str, tmp_path: Path) -> None:
    source = save(tmp_path / "a.pt", original(naming))
    convert_original(source, tmp_path / "out")
    back = convert_to_original(tmp_path / "out", tmp_path / "b.pt", pretraining=source)
    written = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    expected = original("fairseq2")
    if naming == "fairseq":
        del expected["quantizer.num_updates"]
        assert written.keys() == expected.keys()
        return  # the values of this file were drawn in another order
    assert back.num_tensors == len(expected) - 8
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_of_a_model_with_a_head_the_encoder_is_converted(tmp_path: Path) -> None:
    convert_original(save(tmp_path / "a.pt", original()), tmp_path / "out")
    head = transformers.Wav2Vec2BertForCTC.from_pretrained(tmp_path / "out", vocab_size=5)
    head.save_pretrained(tmp_path / "head")
    convert_to_original(tmp_path / "head", tmp_path / "b.pt")
    written = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    expected = {n: t for n, t in original().items() if not n.startswith(("quantizer", "final_"))}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_all_differences_are_listed_before_anything_is_written(tmp_path: Path) -> None:
    tensors = original()
    del tensors["encoder.layers.1.conv.layer_norm.bias"]
    tensors["encoder.adaptor_layers.0.ffn.inner_proj.weight"] = torch.zeros(2)
    tensors["encoder.layers.0.ffn2.inner_proj.bias"] = torch.zeros(3)
    source = save(tmp_path / "a.pt", tensors)
    with pytest.raises(CheckpointError) as caught:
        convert_original(source, tmp_path / "out")
    message = str(caught.value)
    assert "missing: encoder.layers.1.conv.layer_norm.bias" in message
    assert "unexpected: encoder.adaptor_layers.0.ffn.inner_proj.weight" in message
    assert "encoder.layers.0.ffn2.inner_proj.bias (3,) for (48,)" in message
    assert not (tmp_path / "out").exists()


def test_other_positions_need_a_configuration(tmp_path: Path) -> None:
    tensors = original()
    for index in range(LAYERS):
        tensors[f"encoder.layers.{index}.self_attn.sdpa.rel_k_embed.weight"] = torch.randn(9, HEAD)
    source = save(tmp_path / "a.pt", tensors)
    with pytest.raises(ValueError, match="9 relative positions; give config"):
        convert_original(source, tmp_path / "out")
    config = Wav2Vec2BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // HEAD,
        intermediate_size=FFN,
        feature_projection_input_dim=FEATURES,
        conv_depthwise_kernel_size=KERNEL,
        left_max_position_embeddings=6,
        right_max_position_embeddings=2,
    )
    convert_original(source, tmp_path / "out", config=config)
    assert (
        Wav2Vec2BertModel.from_pretrained(tmp_path / "out").config.left_max_position_embeddings == 6
    )


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("evil-was-run"),))


def test_code_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": original(), "cfg": _Evil()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        convert_original(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "evil-was-run").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no checkpoint", "damaged"),
        ({"model": {"a": torch.zeros(2)}}, "no checkpoint of this model"),
        ({"model": {"a": 3}}, "no tensors are a"),
        ([1, 2], "must map names to tensors"),
    ],
)
def test_other_files_are_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        convert_original(path, tmp_path / "out")


def test_what_the_original_has_no_names_for_is_refused(tmp_path: Path) -> None:
    for values, message in (
        ({"add_adapter": True}, "an adapter"),
        ({"position_embeddings_type": "rotary"}, "'rotary'"),
    ):
        config = Wav2Vec2BertConfig(**values).to_dict()
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            convert_to_original(tmp_path, tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()


def test_the_command_goes_both_ways(tmp_path: Path) -> None:
    source = save(tmp_path / "a.pt", original())
    result = run("convert", str(source), str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert b"8 that only pre-training uses were left out" in result.stderr
    result = run(
        "convert", str(tmp_path / "out"), str(tmp_path / "b.pt"), "--pretraining", str(source)
    )
    assert result.returncode == 0, result.stderr
    written = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    assert written.keys() == original().keys()
    assert run("convert", str(tmp_path / "no.pt"), str(tmp_path / "x")).returncode == 2
