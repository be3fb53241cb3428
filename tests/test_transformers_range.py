"""Which transformers `accelerate` works with; its own tests under the oldest, in another process.

The packages of `transformers_oldest.txt` are installed with pip into a folder of their own, which
goes in front of what is installed, and is kept in pytest's cache. Where no package index offers
them, and that folder is not there, the test is skipped with pip's reason.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from w2vbert_fast.integrations.transformers import NEWEST, OLDEST, accelerate

from .reference import pair

PINS = Path(__file__).with_name("transformers_oldest.txt")
REPOSITORY = Path(__file__).resolve().parent.parent
FILES = (
    "test_integration_transformers.py",
    "test_integration_transformers_use.py",
    "test_transformers_range.py",
)
SKIPPED = {
    "the reference rotates by the column": 1,
    "has no X-Codec-2": 1,
    "has no LoRA on nn.Conv1d": 2,
    "the pipeline of transformers 4.37.0 cannot do that": 6,
}
"""What the oldest transformers and PEFT lack, with the number of tests."""
THIS_TEST = "test_everything_holds_with_the_oldest_transformers"


def test_the_range_is_what_is_tested() -> None:
    """The newest here and the oldest in the process below; with others say so."""
    version = importlib.import_module("transformers").__version__
    tested = os.environ.get("W2VBERT_TEST_TRANSFORMERS", NEWEST)
    assert version.split(".")[:2] == tested.split(".")


@pytest.mark.parametrize("version", ["4.36.2", "5.24.0", "6.0.0.dev0"])
def test_other_versions_of_transformers_are_an_error(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair("Wav2Vec2BertForCTC")
    kinds = [type(module) for module in model.modules()]
    pickled = pickle.dumps(accelerate(copy.deepcopy(model)))
    monkeypatch.setattr(importlib.import_module("transformers"), "__version__", version)
    expected = rf"transformers {version} is installed; .* for 4\.37 to 5\.23\."
    with pytest.raises(ImportError, match=expected):
        accelerate(model)
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(ImportError, match=expected):
        pickle.loads(pickled)
    with pytest.raises(ImportError, match=expected):
        from w2vbert_fast.integrations.transformers import FastSeamlessM4TFeatureExtractor  # noqa
    for known in ("4.37.0", "5.23.9", "5.0.0rc1"):
        monkeypatch.setattr(importlib.import_module("transformers"), "__version__", known)
        accelerate(copy.deepcopy(model))


@pytest.fixture(scope="module")
def oldest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the pinned packages; another one for other pins or another Python."""
    cache = getattr(request.config, "cache", None)
    parent = tmp_path_factory.mktemp("oldest") if cache is None else cache.mkdir("oldest")
    key = hashlib.sha256(PINS.read_bytes() + sys.version.encode()).hexdigest()[:16]
    folder = Path(parent) / key
    if folder.is_dir():
        return folder
    staging = tempfile.mkdtemp(dir=parent)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", staging, "--requirement", str(PINS)], capture_output=True, text=True
    )
    if done.returncode != 0:
        shutil.rmtree(staging)
        if "No matching distribution found" in done.stderr:  # also pip's word for no network
            pytest.skip(f"no package index offers {PINS.name}: {done.stderr.splitlines()[-1]}")
        pytest.fail(f"pip could not install {PINS.name}:\n{done.stderr[-2000:]}")
    os.replace(staging, folder)
    return folder


def test_everything_holds_with_the_oldest_transformers(oldest: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    environment = {name: v for name, v in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(oldest), environment.get("PYTHONPATH", "")])
    environment["W2VBERT_TEST_TRANSFORMERS"] = OLDEST
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        + ["--deselect", f"{Path(__file__).relative_to(REPOSITORY)}::{THIS_TEST}"]
        + [str(Path(__file__).with_name(name)) for name in FILES],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    cases = list(ET.parse(report).iter("testcase"))
    skipped = [s.get("message", "") for case in cases for s in case.iter("skipped")]
    assert {why: sum(why in text for text in skipped) for why in SKIPPED} == SKIPPED, skipped
    assert len(skipped) == sum(SKIPPED.values()) and len(cases) >= 100
