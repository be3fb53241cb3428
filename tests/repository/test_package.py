"""The package as a whole: what importing it takes, which way its imports point, its wheel."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import w2vbert_fast

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("csrc_triton", "w2vbert_fast")
# In a checkout alone.
TOOLS = "tools"

# What an installation without extras does not have, and what tests compare with.
NOT_CORE = (
    "accelerate",
    "av",
    "hypothesis",
    "jiwer",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "peft",
    "pyarrow",
    "pytest",
    "ray",
    "rich",
    "soundfile",
    "soxr",
    "tensorboard",
    "transformers",
    "typer",
)

BLOCK_IMPORTS = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_python(code: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK_IMPORTS.format(blocked=set(blocked)) + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:w2vbert_fast"},
    )


def modules() -> dict[str, Path]:
    """Every module of both packages and of the tools by its dotted name."""
    found = {}
    for package in (*PACKAGES, TOOLS):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def test_every_module_imports_with_the_core_dependencies_alone() -> None:
    code = f"""
import importlib
import w2vbert_fast
for name in w2vbert_fast.__all__:
    getattr(w2vbert_fast, name)
for name in {sorted(MODULES)!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
present = sorted(set({NOT_CORE!r}) & set(sys.modules))
assert not present, present
print("all", len(w2vbert_fast.__all__))
"""
    result = run_python(code, blocked=NOT_CORE)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"all {len(w2vbert_fast.__all__)}\n"


def test_transformers_is_not_imported_where_it_is_installed() -> None:
    code = f"""
import importlib
for name in {sorted(MODULES)!r}:
    importlib.import_module(name)
loaded = sorted(name for name in {NOT_CORE!r} if name in sys.modules)
assert not loaded, loaded
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_and_the_command_line_is_cheap() -> None:
    result = run_python("import w2vbert_fast.cli; assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        w2vbert_fast.no_such_name  # noqa: B018
    assert set(w2vbert_fast.__all__) <= set(dir(w2vbert_fast))


def imported(name: str, path: Path) -> Iterator[str]:
    """Dotted names of what a module imports anywhere, those for type checking included."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


# The parts of the project, lowest first: a module may import from its own part and from those
# that stand before it.
LAYERS = (
    ("csrc_triton",),
    ("w2vbert_fast._extras",),
    ("w2vbert_fast.layout",),
    ("w2vbert_fast.ops",),
    ("w2vbert_fast.doctor",),
    ("w2vbert_fast.recordings",),
    ("w2vbert_fast.checkpoints",),
    ("w2vbert_fast.processing",),
    ("w2vbert_fast.models",),
    # Models in other files: of other runtimes, and of the original.
    ("w2vbert_fast.export", "w2vbert_fast.checkpoints.original"),
    ("w2vbert_fast.inference",),
    ("w2vbert_fast.training",),
    ("w2vbert_fast.integrations",),
    ("w2vbert_fast.cli",),
    # What is installed never needs what is not.
    (TOOLS,),
)


def layer_of(module: str) -> int:
    """The layer with the longest name that the module is, or lies in."""
    matches = [
        (len(part), number)
        for number, parts in enumerate(LAYERS)
        for part in parts
        if module == part or module.startswith(f"{part}.")
    ]
    return max(matches)[1]


def arrows_that_point_back() -> list[str]:
    found = []
    for name, path in MODULES.items():
        if name == "w2vbert_fast":
            # Its names are loaded when they are used, so it depends on nothing.
            continue
        for target in imported(name, path):
            ours = target.partition(".")[0] in (*PACKAGES, TOOLS) and target != "w2vbert_fast"
            if ours and layer_of(target) > layer_of(name):
                found.append(f"{name} imports {target}")
    return found


def test_imports_point_one_way() -> None:
    assert arrows_that_point_back() == []


def test_training_takes_nothing_from_inference() -> None:
    targets = {
        target
        for name, path in MODULES.items()
        if name.startswith("w2vbert_fast.training")
        for target in imported(name, path)
    }
    assert "w2vbert_fast.recordings.audio" in targets
    assert not {target for target in targets if target.startswith("w2vbert_fast.inference")}


def test_the_kernels_import_torch_and_triton_only() -> None:
    allowed = {"csrc_triton", "torch", "triton", *sys.stdlib_module_names}
    for name, path in MODULES.items():
        if name.startswith("csrc_triton"):
            others = {target.partition(".")[0] for target in imported(name, path)} - allowed
            assert not others, f"{name} imports {others}"


def test_an_arrow_that_points_back_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from ..models import layers\n    import w2vbert_fast.cli\n")
    monkeypatch.setitem(MODULES, "w2vbert_fast.ops.bad", bad)
    assert arrows_that_point_back() == [
        f"w2vbert_fast.ops.bad imports {target}"
        for target in ("w2vbert_fast.models.layers", "w2vbert_fast.cli")
    ]


def test_kernels_and_library_cannot_import_the_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from tools.compile import aot\n")
    for name in ("csrc_triton.bad", "w2vbert_fast.cli.bad"):
        with monkeypatch.context() as patch:
            patch.setitem(MODULES, name, bad)
            assert arrows_that_point_back() == [f"{name} imports tools.compile.aot"]


def test_the_environment_is_read_in_one_module_only() -> None:
    readers = [
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    ]
    assert set(readers) <= {"w2vbert_fast._env"}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("distributions")
    result = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> zipfile.ZipFile:
    (path,) = distributions.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_source_distribution_holds_what_a_checkout_does(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in (*PACKAGES, TOOLS, "tests", "bench", "examples")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert f"{TOOLS}/compile/aot.py" in wanted
    assert not wanted - names


def test_the_wheel_holds_both_packages_and_their_data(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in PACKAGES:
        wanted = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert wanted
        assert not wanted - names
    assert "w2vbert_fast/py.typed" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_holds_the_demo_checkpoint(wheel: zipfile.ZipFile) -> None:
    sizes = {
        info.filename.removeprefix("w2vbert_fast/demo/"): info.file_size
        for info in wheel.infolist()
        if info.filename.startswith("w2vbert_fast/demo/")
    }
    needed = {
        "MODEL_CARD.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "samples.jsonl",
        "tokenizer_config.json",
        "vocab.json",
    }
    assert needed <= set(sizes)
    assert sizes["model.safetensors"] <= 10_000_000
    assert 3 <= sum(name.endswith(".flac") for name in sizes) <= 5


def test_the_wheel_states_its_licence_command_and_requirements(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {w2vbert_fast.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    core = {
        line.removeprefix("Requires-Dist: ").split(";")[0].strip()
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    names = {requirement.partition(">")[0].partition("<")[0] for requirement in core}
    assert names == {"torch", "triton", "numpy", "safetensors", "huggingface-hub"}
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert "w2vbert-fast = w2vbert_fast.cli:main" in scripts


CLOCKS = {"perf_counter", "monotonic", "process_time", "thread_time", "time_ns"}


def clocks_of(path: Path) -> list[str]:
    """Where a test file reads a clock, or gives something a number of seconds to be done in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        limits = [key.value for key in node.keywords if key.arg == "timeout"]
        limits += node.args if name in ("wait", "wait_for", "acquire") else []
        numbers = [e for e in limits if isinstance(e, ast.Constant) and type(e.value) is not bool]
        if name in CLOCKS or ast.unparse(node.func) == "time.time" or numbers:
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_test_depends_on_how_fast_the_machine_is() -> None:
    """`tests/helpers/waiting.py` says what to do instead. The GPU lane has a limit and a clock."""
    files = [p for p in (ROOT / "tests").rglob("*.py") if "gpu" not in p.relative_to(ROOT).parts]
    assert len(files) > 80
    assert [line for file in files for line in clocks_of(file)] == []


@pytest.mark.parametrize(
    "line",
    [
        "assert time.perf_counter() - start < 5",
        "while monotonic() < deadline: pass",
        "subprocess.run(command, timeout=60)",
        "process.wait(5)",
        "ready.wait_for(lambda: True, 5.0)",
    ],
)
def test_a_clock_in_a_test_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(line)
    assert len(clocks_of(tmp_path / "test_x.py")) == 1
    (tmp_path / "test_y.py").write_text("ready.wait(PATIENCE); time.sleep(0.1); process.wait()")
    assert clocks_of(tmp_path / "test_y.py") == []
