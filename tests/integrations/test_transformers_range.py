"""Which transformers `accelerate` works with; its own tests under others, in other processes.

The packages of `transformers_oldest.txt` and `transformers_newest.txt` are installed with pip into
folders of their own, which go in front of what is installed, and are kept in pytest's cache. Where
no package index offers them, and the folder is not there, the test is skipped with pip's reason.

Versions that nobody has seen yet are simulated: another number, and changes planted in the classes.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.reference import pair
from w2vbert_fast.integrations import transformers as integration
from w2vbert_fast.integrations.transformers import (
    accelerate,
    classes,
    probe as _probe,
    versions as _versions,
)
from w2vbert_fast.integrations.transformers.versions import NEWEST, OLDEST

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = (
    "test_integration_transformers.py",
    "test_integration_transformers_ctc.py",
    "test_integration_transformers_use.py",
    "test_transformers_range.py",
)
REFERENCE = "5.23"
"""What all other tests compare with."""
PINS = {OLDEST: "transformers_oldest.txt", NEWEST: "transformers_newest.txt"}
SKIPPED: dict[str, dict[str, int]] = {
    OLDEST: {
        "the reference rotates by the column": 1,
        "has no X-Codec-2": 1,
        "has no LoRA on nn.Conv1d": 2,
        "the pipeline of transformers 4.37.0 cannot do that": 6,
    },
    NEWEST: {"the reference rotates by the column": 1},
}
"""What a version of transformers, and the packages of its time, lack, with the number of tests."""
THIS_TEST = "test_everything_holds_with_other_versions"
UNSEEN = "7.1.0.dev0"

Install = Callable[[str], None]


def test_the_range_is_what_is_tested() -> None:
    """The reference here, the oldest and the newest in the processes below."""
    version = importlib.import_module("transformers").__version__
    tested = os.environ.get("W2VBERT_TEST_TRANSFORMERS", REFERENCE)
    assert version.split(".")[:2] == tested.split(".")
    for minor, name in PINS.items():
        assert f"transformers=={minor}." in (REPOSITORY / "tests" / name).read_text()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes transformers another version, which nothing has been checked with."""
    monkeypatch.setattr(_versions, "_passed", set())

    def give(version: str) -> None:
        monkeypatch.setattr(importlib.import_module("transformers"), "__version__", version)

    return give


def modeling(model: str = "wav2vec2_bert") -> Any:
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def build_with(monkeypatch: pytest.MonkeyPatch, kind: Any, change: Callable[[Any], None]) -> None:
    """Every instance of a class is changed when it is made."""
    original = kind.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        change(self)

    monkeypatch.setattr(kind, "__init__", init)


def answer_with(
    monkeypatch: pytest.MonkeyPatch, kind: Any, change: Callable[[Any, Any], Any]
) -> None:
    """Every instance of a class returns something else."""
    original = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(self, original(self, *args, **kwargs))

    monkeypatch.setattr(kind, "forward", forward)


def test_older_transformers_is_an_error(install: Install) -> None:
    model, _ = pair("Wav2Vec2BertForCTC")
    kinds = [type(module) for module in model.modules()]
    pickled = pickle.dumps(accelerate(copy.deepcopy(model)))
    install("4.36.2")
    expected = r"transformers 4\.36\.2 is installed; .* needs 4\.37 or later"
    with pytest.raises(ImportError, match=expected):
        accelerate(model)
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(ImportError, match=expected):
        pickle.loads(pickled)
    with pytest.raises(ImportError, match=expected):
        from w2vbert_fast.integrations.transformers import FastSeamlessM4TFeatureExtractor  # noqa


@pytest.mark.parametrize("version", ["4.37.0", "5.0.0rc1", "5.23.9", "5.24.0", "5.24.1.dev0"])
def test_tested_transformers_is_not_checked(
    version: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("checked")

    monkeypatch.setattr(_probe, "check_models", fail)
    monkeypatch.setattr(_probe, "check_feature_extractor", fail)
    install(version)
    accelerate(pair("Wav2Vec2BertForCTC")[0])
    assert integration.FastSeamlessM4TFeatureExtractor is not None


@pytest.mark.parametrize("setting", ["usual", "inference", "bfloat16", "meta"])
def test_newer_transformers_that_gives_equal_answers_is_a_warning(
    setting: str,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, _ = pair("Wav2Vec2BertForCTC")
    pickled = pickle.dumps(accelerate(copy.deepcopy(model)))
    layer = modeling().Wav2Vec2BertEncoderLayer
    build_with(monkeypatch, layer, lambda self: setattr(self, "new", nn.Identity()))
    # Another model's change is nobody's trouble here.
    seamless = modeling("seamless_m4t_v2").SeamlessM4Tv2ConformerEncoderLayer
    build_with(monkeypatch, seamless, lambda self: setattr(self, "new", nn.LayerNorm(3)))
    install(UNSEEN)
    state = torch.get_rng_state()
    with contextlib.ExitStack() as stack:
        if setting == "inference":
            stack.enter_context(torch.inference_mode())
        elif setting == "meta":
            stack.enter_context(torch.device("meta"))
        elif setting == "bfloat16":
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.bfloat16)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                accelerate(copy.deepcopy(model))
                pickle.loads(pickled)
                assert integration.FastSeamlessM4TFeatureExtractor is not None
        if setting == "bfloat16":
            assert torch.get_default_dtype() == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), state)
    said = [r.getMessage() for r in caplog.records if r.name == _versions.__name__]
    assert len(said) == 2, said
    assert all(f"transformers {UNSEEN} is newer than {NEWEST}" in line for line in said)
    assert "Wav2Vec2Bert" in said[0] and "SeamlessM4TFeatureExtractor" in said[1]


def add_norm(layer: Any) -> None:
    layer.extra_layer_norm = nn.LayerNorm(layer.ffn1_layer_norm.normalized_shape)


def rename(layer: Any) -> None:
    layer.feed_forward1 = layer._modules.pop("ffn1")


def drop_bias(attention: Any) -> None:
    query = attention.linear_q
    attention.linear_q = nn.Linear(query.in_features, query.out_features, bias=False)


STRUCTURES: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "a new norm": ("EncoderLayer", add_norm, r"has besides 0\.extra_layer_norm\.bias"),
    "another name": ("EncoderLayer", rename, r"lacks 0\.ffn1\..*; has besides 0\.feed_forward1"),
    "no bias": ("SelfAttention", drop_bias, r"lacks 0\.self_attn\.linear_q\.bias"),
}
ANSWERS: dict[str, tuple[str, Callable[[Any, Any], Any], str]] = {
    "all": ("FeedForward", lambda module, y: 1.01 * y, "last_hidden_state differs by"),
    "in training": (
        "FeedForward",
        lambda module, y: 1.01 * y if module.training else y,
        "the gradient of .* differs by",
    ),
    "of adapters": ("AdapterLayer", lambda module, y: 1.01 * y, "last_hidden_state differs by"),
}


@pytest.mark.parametrize("change", [*STRUCTURES, *ANSWERS])
def test_newer_transformers_that_differs_is_an_error(
    change: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair("Wav2Vec2BertForCTC")
    kinds = [type(module) for module in model.modules()]
    pickled = pickle.dumps(accelerate(copy.deepcopy(model)))
    if change in STRUCTURES:
        part, alter, expected = STRUCTURES[change]
        build_with(monkeypatch, getattr(modeling(), f"Wav2Vec2Bert{part}"), alter)
    else:
        part, instead, expected = ANSWERS[change]
        answer_with(monkeypatch, getattr(modeling(), f"Wav2Vec2Bert{part}"), instead)
    install(UNSEEN)
    expected = rf"transformers {UNSEEN} is installed, newer than {NEWEST}, .*{expected}"
    with pytest.raises(ImportError, match=expected):
        accelerate(model)
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(ImportError, match=expected):
        pickle.loads(pickled)
    assert integration.FastSeamlessM4TFeatureExtractor is not None


def test_a_class_that_is_gone_is_named(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("Wav2Vec2BertForCTC")
    monkeypatch.delattr(modeling(), "Wav2Vec2BertConvolutionModule")
    classes.fast_classes.cache_clear()
    install(UNSEEN)
    try:
        with pytest.raises(ImportError, match="no attribute 'Wav2Vec2BertConvolutionModule'"):
            accelerate(model)
    finally:
        classes.fast_classes.cache_clear()


def test_newer_seamless_is_checked(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    seamless = modeling("seamless_m4t_v2")
    install(UNSEEN)
    with torch.device("meta"):
        config = seamless.SeamlessM4Tv2Config(speech_encoder_layers=1)
        model = seamless.SeamlessM4Tv2SpeechEncoder(config)
    accelerate(copy.deepcopy(model))
    answer_with(monkeypatch, seamless.SeamlessM4Tv2ConformerFeedForward, lambda _, y: 1.01 * y)
    monkeypatch.setattr(_versions, "_passed", set())
    with pytest.raises(ImportError, match=r"SeamlessM4Tv2Conformer.* differs by"):
        accelerate(model)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda features: features * 1.02, r"input_features of noise differ by 0\.0"),
        (lambda features: features[:-1], r"input_features is torch\.float32 \["),
    ],
)
def test_newer_features_that_differ_are_an_error(
    change: Any, expected: str, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    kind = transformers.SeamlessM4TFeatureExtractor
    original = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, *args, **kwargs)
        batch["input_features"] = change(batch["input_features"])
        return batch

    monkeypatch.setattr(kind, "__call__", call)
    install(UNSEEN)
    with pytest.raises(ImportError, match=f"SeamlessM4TFeatureExtractor.*{expected}"):
        from w2vbert_fast.integrations.transformers import FastSeamlessM4TFeatureExtractor  # noqa
    accelerate(pair("Wav2Vec2BertForCTC")[0])


def packages(minor: str, request: pytest.FixtureRequest, temporary: Path) -> Path:
    """The folder with the pinned packages; another one for other pins or another Python."""
    pins = REPOSITORY / "tests" / PINS[minor]
    cache = getattr(request.config, "cache", None)
    parent = temporary if cache is None else cache.mkdir("transformers")
    key = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:16]
    folder = Path(parent) / key
    if folder.is_dir():
        return folder
    staging = tempfile.mkdtemp(dir=parent)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", staging, "--requirement", str(pins)], capture_output=True, text=True
    )
    if done.returncode != 0:
        shutil.rmtree(staging)
        if "No matching distribution found" in done.stderr:  # also pip's word for no network
            pytest.skip(f"no package index offers {pins.name}: {done.stderr.splitlines()[-1]}")
        pytest.fail(f"pip could not install {pins.name}:\n{done.stderr[-2000:]}")
    os.replace(staging, folder)
    return folder


@pytest.mark.parametrize("minor", [OLDEST, NEWEST])
def test_everything_holds_with_other_versions(
    minor: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, report = packages(minor, request, tmp_path), tmp_path / "report.xml"
    environment = {name: v for name, v in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    environment["W2VBERT_TEST_TRANSFORMERS"] = minor
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        + ["--deselect", f"{Path(__file__).relative_to(REPOSITORY)}::{THIS_TEST}"]
        + [str(Path(__file__).with_name(name)) for name in FILES],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    cases = list(ET.parse(report).iter("testcase"))
    skipped = [s.get("message", "") for case in cases for s in case.iter("skipped")]
    expected = SKIPPED[minor]
    assert {why: sum(why in text for text in skipped) for why in expected} == expected, skipped
    assert len(skipped) == sum(expected.values()) and len(cases) >= 100
