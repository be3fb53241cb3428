"""What `accelerate` takes, where it looks, and what is said of what stays slow."""

from __future__ import annotations

import copy
import logging
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.reference import padded_batch, pair, relative_error
from tests.integrations.test_integration_transformers import FEATURES, classes_of, encoder_of, said
from w2vbert_fast.integrations import transformers as integration
from w2vbert_fast.integrations.transformers import accelerate, accelerated, restore
from w2vbert_fast.models import pretrained

__all__ = ["said"]


def model() -> Any:
    return pair("Wav2Vec2BertModel")[0]


def is_fast(found: Any) -> bool:
    return type(encoder_of(found)).__module__ == integration.__name__


class Speech:
    """An object that was built around models, as IndexTTS2 and DualCodec's `Inference`."""

    def __init__(self) -> None:
        self.name = "speech"
        self.semantic_model = model()
        self.settings = {"semantic_model": model(), 17: [None, (model(),)]}
        self.log = logging.getLogger("speech")  # which holds every logger there is
        self.itself = self
        self.parts = deque([SimpleNamespace(encoder=model())])
        self.call = model().forward  # a bound method

    @property
    def lazy(self) -> Any:
        raise AssertionError("a property was read")


class Slotted:
    __slots__ = ("empty", "model")

    def __init__(self) -> None:
        self.model = model()


class Hidden(nn.Module):
    """Keeps a model out of its own parameters and `modules()`."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = [model()]


HOLDERS: dict[str, tuple[Any, list[str]]] = {
    "object": (
        Speech,
        [
            ".semantic_model.encoder",
            ".settings['semantic_model'].encoder",
            ".call.__self__.encoder",
            ".parts[0].encoder.encoder",
            ".settings[17][1][0].encoder",
        ],
    ),
    "slots": (Slotted, [".model.encoder"]),
    "dict": (lambda: {"a": model(), "b": {"c": model()}}, ["['a'].encoder", "['b']['c'].encoder"]),
    "list": (lambda: [model(), nn.ModuleList([model()])], ["[0].encoder", "[1][0].encoder"]),
    "module": (Hidden, [".teacher[0].encoder"]),
}


@pytest.mark.parametrize(("make", "paths"), HOLDERS.values(), ids=HOLDERS)
def test_models_are_found_wherever_they_are(
    make: Any, paths: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    holder = make()
    assert accelerated(holder) == {}
    with caplog.at_level(logging.INFO, logger=integration.__name__):
        assert accelerate(holder) is holder
    assert list(accelerated(holder)) == paths
    for path, encoder in accelerated(holder).items():
        assert eval(f"holder{path}") is encoder and isinstance(
            encoder, classes_of("Wav2Vec2BertEncoder")
        )
        assert f"model{path}" in caplog.messages[0]
    assert len(caplog.messages) == 1
    assert accelerate(holder) is holder
    assert restore(holder) is holder and accelerated(holder) == {}


@torch.no_grad()
def test_a_pipeline(tiny_checkpoint: Path) -> None:
    pipe = transformers.pipeline("automatic-speech-recognition", model=str(tiny_checkpoint))
    assert accelerate(pipe) is pipe and is_fast(pipe.model)
    assert not is_fast(restore(pipe).model)


class Deep:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


def test_no_depth_is_too_deep() -> None:
    holder: Any = model()
    for _ in range(5000):
        holder = Deep(holder)
    accelerate(holder)
    assert len(accelerated(holder)) == 1


def test_nothing_found_says_where_it_looked() -> None:
    holder = Speech()
    holder.semantic_model = nn.Sequential(nn.Linear(2, 2))  # type: ignore[assignment]
    holder.settings, holder.parts, holder.call = {}, deque(), None  # type: ignore[assignment]
    with pytest.raises(ValueError) as error:
        accelerate(holder)
    assert str(error.value) == (
        "model is Speech, which contains no Wav2Vec2BertEncoder and no "
        "SeamlessM4Tv2ConformerEncoder of transformers (looked through .semantic_model "
        "(Sequential), .itself (Speech), and what these hold: 2 modules in all)"
    )
    with pytest.raises(ValueError, match=r"model is dict, .* \(it holds nothing that could be one"):
        accelerate({})
    for nothing in ("model", 3, None, torch.zeros(2), Speech, model, logging):
        for function in (accelerate, accelerated, restore):
            with pytest.raises(TypeError, match=r"model is \w+; it must be a torch.nn.Module, or"):
                function(nothing)


def test_an_error_leaves_everything_as_it_was() -> None:
    holder = {"good": model(), "bad": model()}
    layer = encoder_of(holder["bad"]).layers[1]
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=r"behind which model\['bad'\].encoder.layers\[1\] cannot"):
        accelerate(holder)
    assert accelerated(holder) == {} and not is_fast(holder["good"])


def test_our_own_models_name_their_switch(caplog: pytest.LogCaptureFixture) -> None:
    _, ours = pair("Wav2Vec2BertForCTC")
    switch = r"model{} is w2vbert_fast's own Wav2Vec2BertForCTC, .* use_fast_kernels = True"
    with pytest.raises(ValueError, match=switch.format("")):
        accelerate(ours)
    with pytest.raises(ValueError, match=switch.format(r"\['asr'\]")):
        accelerate({"asr": ours})
    mixed = accelerate({"asr": ours, "tts": model()})
    assert is_fast(mixed["tts"])
    (line,) = caplog.messages
    assert "model['asr'] is w2vbert_fast's own" in line and "use_fast_kernels = True" in line
    ours.use_fast_kernels = True  # type: ignore[assignment]
    caplog.clear()
    assert accelerate(ours) is ours and accelerate({"asr": ours, "tts": model()})
    assert caplog.messages == []


def test_classes_that_derive_from_transformers_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher, student = model(), model()
    student.encoder.__class__ = type("MyEncoder", (type(student.encoder),), {})
    teacher.encoder.layers[1].__class__ = type("MyLayer", (type(teacher.encoder.layers[1]),), {})
    accelerate(nn.ModuleDict({"teacher": teacher, "student": student}))
    (line,) = caplog.messages
    assert "MyEncoder, MyLayer derive from transformers' classes" in line
    assert "model.student.encoder" in line and "model.teacher.encoder.layers[1]" in line
    assert is_fast(teacher) and not is_fast(student)
    with pytest.raises(ValueError, match=r"; MyEncoder derive .*: model.encoder$"):
        accelerate(student)


@torch.no_grad()
def test_layers_called_one_by_one(said: list[str]) -> None:
    fast = accelerate(copy.deepcopy(reference := model()))
    x, _ = padded_batch((20,), FEATURES)
    fast(x, output_hidden_states=True)
    fast(x, attention_mask=torch.ones(1, 20, dtype=torch.long))
    assert said == []
    with torch.enable_grad():  # nor where the encoder itself runs the original code
        fast.train().gradient_checkpointing_enable({"use_reentrant": False})
        encoder_of(fast).layers[0].ffn1.forward = encoder_of(fast).layers[0].ffn1.forward
        fast(x)[0].sum().backward()
    assert said == ["layers.0.ffn1 was replaced or is hooked"]
    del encoder_of(fast).layers[0].ffn1.forward
    h = torch.randn(1, 20, 48)
    for mine, theirs in zip(
        encoder_of(fast.eval()).layers, encoder_of(reference).layers, strict=True
    ):
        a, b = mine(h), theirs(h)
        a, b = (y[0] if isinstance(y, tuple) else y for y in (a, b))
        assert relative_error(a, b) <= 1e-6
    assert len(said) == 3 and all("called by itself" in reason for reason in said[1:])


@torch.no_grad()
def test_our_own_models_without_the_switch_say_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "_said", [])
    _, ours = pair("Wav2Vec2BertForCTC")
    kind: Any = type(ours)
    ours.save_pretrained(tmp_path)  # type: ignore[operator]
    x, mask = padded_batch((20, 12), FEATURES)
    for choice in (False, True):
        kind.from_pretrained(tmp_path, use_fast_kernels=choice)(x, attention_mask=mask)
        chosen = kind(ours.config)
        chosen.use_fast_kernels = choice
        chosen.eval()(x)
    ours.double()(x.double())  # there is nothing faster for float64
    assert caplog.messages == []
    loaded = kind.from_pretrained(tmp_path)
    assert loaded.use_fast_kernels is False
    for _ in range(2):
        loaded(x, attention_mask=mask)
        kind(ours.config).eval()(x)
    (line,) = caplog.messages
    assert "use_fast_kernels is off" in line and "model.use_fast_kernels = True" in line
