"""Operations alone: the example in `w2vbert_fast.ops`, and that nothing else is needed for them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from tests.helpers.reference import pair, relative_error
from w2vbert_fast import ops
from w2vbert_fast.layout import PackedBatch


def example() -> str:
    """The code block of the docstring of `w2vbert_fast.ops`."""
    found = re.search(r"::\n\n((?:    .*\n|\n)+)", inspect.getdoc(ops) + "\n")
    assert found is not None
    return textwrap.dedent(found[1])


@pytest.mark.parametrize("fast", [False, True])
def test_the_example_is_a_layer_of_the_model(fast: bool) -> None:
    reference, _ = pair("Wav2Vec2BertModel", num_hidden_layers=1)
    names: dict[str, object] = {}
    exec(compile(example(), "ops example", "exec"), names)
    layer = names["ConformerLayer"](48, heads=4, hidden=80, taps=7, left=5, right=3)
    layer.fast = fast
    theirs = reference.encoder.layers[0].state_dict()
    weights = layer.state_dict()
    renamed = {
        "norms.0": "ffn1_layer_norm",
        "norms.1": "self_attn_layer_norm",
        "norms.2": "conv_module.layer_norm",
        "norms.3": "ffn2_layer_norm",
        "norms.4": "final_layer_norm",
        "ffn.0.0": "ffn1.intermediate_dense",
        "ffn.0.1": "ffn1.output_dense",
        "ffn.1.0": "ffn2.intermediate_dense",
        "ffn.1.1": "ffn2.output_dense",
        "qkv.0": "self_attn.linear_q",
        "qkv.1": "self_attn.linear_k",
        "qkv.2": "self_attn.linear_v",
        "out": "self_attn.linear_out",
        "distances": "self_attn.distance_embedding",
        "glu": "conv_module.pointwise_conv1",
        "depthwise": "conv_module.depthwise_conv",
        "conv_norm": "conv_module.depthwise_layer_norm",
        "pointwise": "conv_module.pointwise_conv2",
    }
    for name, value in weights.items():
        module, _, leaf = name.rpartition(".")
        value.copy_(theirs[f"{renamed[module]}.{leaf}"].reshape(value.shape))
    lengths = (23, 1, 9)
    layout = PackedBatch.from_lengths(lengths, max(lengths), "cpu")
    x = torch.randn(sum(lengths), 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = layer(x, layout.cu_seqlens, max(lengths))
        begin = 0
        for length in lengths:
            rows = slice(begin, begin + length)
            expected = reference.encoder.layers[0](x[None, rows])[0]
            assert relative_error(y[rows], expected) <= 1e-5
            begin += length


def test_operations_need_neither_models_nor_files() -> None:
    code = """
import sys
from w2vbert_fast.ops import shaw_attention, conv_norm_act, feed_forward, linear_glu
loaded = [m for m in sys.modules if m.startswith("w2vbert_fast.")]
rooms = {m.split(".")[1] for m in loaded}
wrong = rooms - {"ops", "layout", "_lazy", "cpus"}
assert not wrong, wrong
assert "huggingface_hub" not in sys.modules and "safetensors" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_operation_states_its_shapes() -> None:
    for name in ops.__all__:
        operation = getattr(ops, name)
        if not inspect.isfunction(operation):
            continue
        documentation = inspect.getdoc(operation)
        assert documentation, name
        if name != "get_activation":
            assert re.search(r"`+\[", documentation), f"{name} states no shape"
