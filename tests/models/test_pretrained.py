"""What all models share besides checkpoints: construction, copies and model-wide switches."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from w2vbert_fast import models
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel

CLASSES = [
    models.Wav2Vec2BertModel,
    models.Wav2Vec2BertForCTC,
    models.Wav2Vec2BertForSequenceClassification,
    models.Wav2Vec2BertForAudioFrameClassification,
    models.Wav2Vec2BertForXVector,
]


def small(**fields: object) -> Wav2Vec2BertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Wav2Vec2BertConfig(**{**sizes, "intermediate_size": 48, "vocab_size": 11, **fields})


class WithBuffer(Wav2Vec2BertPreTrainedModel):
    """A model with a table that no checkpoint holds."""

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    def reset_buffers(self) -> None:
        self.table = torch.arange(3.0, device=self.table.device)


class WithForgottenBuffer(WithBuffer):
    reset_buffers = None


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("config", [None, {}, transformers.Wav2Vec2BertConfig], ids=repr)
@pytest.mark.parametrize("cls", CLASSES[:2])
def test_config_of_another_type(cls: type, config: object) -> None:
    with pytest.raises(TypeError, match=r"config is .*; it must be a Wav2Vec2BertConfig"):
        cls(config)


def test_config_changed_to_impossible_values_is_refused() -> None:
    config = small()
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match=r"hidden_size is 32; it must be a multiple .*\(5\)"):
        models.Wav2Vec2BertModel(config)


@pytest.mark.parametrize("cls", CLASSES)
def test_weights_are_drawn_once_and_all(cls: type) -> None:
    torch.manual_seed(0)
    base = models.Wav2Vec2BertModel(small())
    torch.manual_seed(0)
    model = cls(small())
    assert equal(model.base_model.state_dict(), base.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        if tensor.dim() > 1:
            assert tensor.std() > 0, name


@pytest.mark.parametrize("cls", CLASSES)
def test_copies(cls: type) -> None:
    model = cls(small())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is cls
        assert equal(other.state_dict(), model.state_dict())
        assert other.config == model.config
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not equal(other.state_dict(), model.state_dict())


def test_properties() -> None:
    model = models.Wav2Vec2BertForCTC(small())
    assert model.base_model is model.wav2vec2_bert
    assert model.base_model.base_model is model.base_model
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.half().dtype == torch.float16
    assert model.to("meta").device == torch.device("meta")
    reference = transformers.Wav2Vec2BertForCTC(
        transformers.Wav2Vec2BertConfig(**model.config.to_dict())
    )
    assert model.num_parameters() == reference.num_parameters()
    model.freeze_base_model()
    assert model.num_parameters(only_trainable=True) == 32 * 11 + 11
    assert model.main_input_name == reference.main_input_name
    assert model.base_model_prefix == reference.base_model_prefix


@pytest.mark.parametrize("cls", CLASSES)
def test_gradient_checkpointing(cls: type) -> None:
    model = cls(small())
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert model.base_model.encoder.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_use_fast_kernels_reaches_every_part(tmp_path: Path) -> None:
    model = models.Wav2Vec2BertForCTC(small())
    assert not model.use_fast_kernels
    part = model.wav2vec2_bert.encoder.layers[1]
    part.use_fast_kernels = False
    for value in (True, False):
        model.use_fast_kernels = value
        assert model.use_fast_kernels is value
        assert model.wav2vec2_bert.use_fast_kernels is value
        assert part.use_fast_kernels is value
    model.save_pretrained(tmp_path)
    assert models.Wav2Vec2BertForCTC.from_pretrained(
        tmp_path, use_fast_kernels=True
    ).use_fast_kernels


def test_buffers_outside_of_checkpoints_are_computed(tmp_path: Path) -> None:
    WithBuffer(small()).save_pretrained(tmp_path)
    loaded = WithBuffer.from_pretrained(tmp_path, dtype="bfloat16")
    assert loaded.table.tolist() == [0, 1, 2]
    assert loaded.layer.weight.dtype == torch.bfloat16
    assert "table" not in loaded.state_dict()
    with pytest.raises(RuntimeError, match="nothing computes the buffers table"):
        WithForgottenBuffer.from_pretrained(tmp_path)


def test_stored_copy_of_such_a_buffer_is_ignored(tmp_path: Path) -> None:
    model = WithBuffer(small())
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), "table": torch.ones(7)})
    assert WithBuffer.from_pretrained(tmp_path).table.tolist() == [0, 1, 2]


def test_loading_on_a_thread_pool(tmp_path: Path) -> None:
    """Loading holds no global state: several threads may load at once."""
    from concurrent.futures import ThreadPoolExecutor

    model = models.Wav2Vec2BertForCTC(small())
    model.save_pretrained(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(models.Wav2Vec2BertForCTC.from_pretrained, [tmp_path] * 8))
    assert all(equal(other.state_dict(), model.state_dict()) for other in loaded)


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    models.Wav2Vec2BertForCTC(small()).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    models.Wav2Vec2BertForCTC.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_does_not_import_the_compiler(tmp_path: Path) -> None:
    """It is slow to import, takes 150 MB, and has no part in loading."""
    models.Wav2Vec2BertForXVector(small()).save_pretrained(tmp_path)
    code = (
        "import sys; from w2vbert_fast.models import Wav2Vec2BertForXVector as Model\n"
        "before = set(sys.modules)\n"
        "Model.from_pretrained(sys.argv[1])\n"
        "new = set(sys.modules) - before\n"
        "assert not [name for name in new if name.startswith(('torch._dynamo', 'sympy'))]\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
