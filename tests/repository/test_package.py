"""The package as a whole: what importing it takes, which way its imports point, its wheel."""

from __future__ import annotations

import ast
import functools
import graphlib
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
TOOLS, BENCH = "tools", "bench"

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
    """Every module of both packages, the tools and the benchmark by its dotted name."""
    found = {}
    for package in (*PACKAGES, TOOLS, BENCH):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
# The benchmark needs what it compares with.
IMPORTABLE = sorted(name for name in MODULES if name.partition(".")[0] != BENCH)


def test_every_module_imports_with_the_core_dependencies_alone() -> None:
    code = f"""
import importlib
import w2vbert_fast
for name in w2vbert_fast.__all__:
    getattr(w2vbert_fast, name)
for name in {IMPORTABLE!r}:
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
for name in {IMPORTABLE!r}:
    importlib.import_module(name)
loaded = sorted(name for name in {NOT_CORE!r} if name in sys.modules)
assert not loaded, loaded
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_and_the_command_line_is_cheap() -> None:
    code = "from w2vbert_fast.cli import app; app.build_app(); assert 'torch' not in sys.modules"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        w2vbert_fast.no_such_name  # noqa: B018
    assert set(w2vbert_fast.__all__) <= set(dir(w2vbert_fast))


def test_an_alias_is_the_class_it_stands_for() -> None:
    assert w2vbert_fast.AutoModelForAudioXVector is w2vbert_fast.Wav2Vec2BertForXVector
    assert w2vbert_fast.AutoTokenizer is w2vbert_fast.Wav2Vec2CTCTokenizer


def imported(name: str, path: Path) -> Iterator[str]:
    """Dotted names of what a module imports anywhere, those for type checking included."""
    for base, names in import_statements(name, path):
        yield from (f"{base}.{n}" if f"{base}.{n}" in MODULES else base for n in names or ("",))


@functools.cache
def import_statements(name: str, path: Path) -> list[tuple[str, list[str]]]:
    """Modules, and the names that are taken from each."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: list[tuple[str, list[str]]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            found.append((base, [alias.name for alias in node.names]))
    return found


# Every room of the project, and the rooms that its files may import. One that is not named here has
# no arrow to it, and none from it.
ROOMS: dict[str, tuple[str, ...]] = {
    "csrc_triton": (),
    # Kernels seen from outside; what is installed never needs what is not.
    "tools": ("csrc_triton", "ops"),
    "_extras": (),
    "_lazy": (),
    "cpus": (),
    "layout": (),
    "ops": ("cpus", "csrc_triton", "layout"),
    "doctor": ("_extras", "cpus", "ops"),
    "recordings": ("_extras", "ops"),
    "checkpoints": (),
    "report": ("checkpoints",),
    "processing": ("checkpoints", "ops", "recordings"),
    "models": ("checkpoints", "layout", "ops"),
    "export": ("_extras", "checkpoints", "layout", "models", "ops", "processing"),
    "inference": (
        *("_extras", "_lazy", "checkpoints", "models", "ops", "processing", "recordings"),
        *("report",),
    ),
    "tuning": ("cpus", "csrc_triton", "doctor", "inference", "models", "ops", "processing"),
    "training": (
        *("_extras", "_lazy", "checkpoints", "models", "ops", "processing", "recordings"),
        *("report",),
    ),
    "evaluation": (
        *("_lazy", "checkpoints", "cpus", "inference", "recordings", "report", "training"),
    ),
    "integrations": (
        *("_extras", "cpus", "inference", "layout", "models", "ops", "processing"),
        *("recordings",),
    ),
    "cli": (
        *("_extras", "cpus", "doctor", "evaluation", "export", "inference", "integrations"),
        *("models", "ops", "recordings", "training", "tuning"),
    ),
    "bench": (
        *("_extras", "csrc_triton", "doctor", "inference", "integrations", "layout", "models"),
        *("ops", "processing", "recordings", "tools"),
    ),
}


def room_of(module: str) -> str:
    """The room that a module lies in; of the package itself, whose names are lazy, its own name."""
    first, *rest = module.split(".")
    return rest[0] if first == "w2vbert_fast" and rest else first


def arrows() -> dict[str, set[str]]:
    """What each module of the project imports of the project, wherever in it, and for types too."""
    return {
        name: {target for target in imported(name, path) if target in MODULES and target != name}
        for name, path in MODULES.items()
    }


def arrows_that_nobody_meant() -> list[str]:
    return [
        f"{name} imports {target}"
        for name, targets in arrows().items()
        for target in sorted(targets)
        if "w2vbert_fast" not in (name, target)
        and (room := room_of(target)) != room_of(name)
        and room not in ROOMS.get(room_of(name), ())
    ]


def test_imports_go_between_rooms_as_they_are_meant_to() -> None:
    assert arrows_that_nobody_meant() == []
    assert {room_of(name) for name in MODULES} == {*ROOMS, "w2vbert_fast"}
    taken = {(room_of(name), room_of(t)) for name, targets in arrows().items() for t in targets}
    assert {(room, other) for room, others in ROOMS.items() for other in others} <= taken


def circles() -> list[list[str]]:
    """Files that import each other in a circle, and folders: in every package, what lies in it."""
    graph = arrows()
    found = [circle_in(graph)]
    for package in ("", *(name for name, path in MODULES.items() if path.name == "__init__.py")):
        inside = f"{package}." if package else ""

        def child(name: str, inside: str = inside) -> str:
            return inside + name.removeprefix(inside).partition(".")[0]

        folders: dict[str, set[str]] = {}
        for name, targets in graph.items():
            if name.startswith(inside):
                within = {child(target) for target in targets if target.startswith(inside)}
                folders.setdefault(child(name), set()).update(within - {child(name)})
        found.append(circle_in(folders))
    return [circle for circle in found if circle]


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_nothing_imports_in_a_circle() -> None:
    assert circles() == []


def test_the_kernels_import_torch_and_triton_only() -> None:
    allowed = {"csrc_triton", "torch", "triton", *sys.stdlib_module_names}
    for name, path in MODULES.items():
        if name.startswith("csrc_triton"):
            others = {target.partition(".")[0] for target in imported(name, path)} - allowed
            assert not others, f"{name} imports {others}"


@pytest.mark.parametrize(
    ("name", "line", "wrong"),
    [
        ("w2vbert_fast.ops.bad", "from ..models import layers", "w2vbert_fast.models.layers"),
        ("w2vbert_fast.ops.bad", "import w2vbert_fast.cli", "w2vbert_fast.cli"),
        ("w2vbert_fast.training.bad", "import w2vbert_fast.inference", "w2vbert_fast.inference"),
        ("w2vbert_fast.new_room", "from w2vbert_fast import ops", "w2vbert_fast.ops"),
        ("csrc_triton.bad", "from tools.compile import aot", "tools.compile.aot"),
        ("w2vbert_fast.cli.bad", "from tools.compile import aot", "tools.compile.aot"),
        ("w2vbert_fast.export.bad", "from bench import flops", "bench.flops"),
    ],
)
def test_an_arrow_that_nobody_meant_is_found(
    name: str, line: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.py").write_text(f"def f():\n    {line}\n")
    monkeypatch.setitem(MODULES, name, tmp_path / "bad.py")
    assert arrows_that_nobody_meant() == [f"{name} imports {wrong}"]


@pytest.mark.parametrize(
    ("name", "line", "circle"),
    [
        # of files, for a type
        (
            "w2vbert_fast.recordings.rows",
            "if TYPE_CHECKING:\n    from w2vbert_fast.recordings import manifest",
            {"w2vbert_fast.recordings.rows", "w2vbert_fast.recordings.manifest"},
        ),
        # of folders, whose files are in none
        (
            "w2vbert_fast.recordings.bad",
            "from w2vbert_fast.processing import padding",
            {"w2vbert_fast.recordings", "w2vbert_fast.processing"},
        ),
        (
            "w2vbert_fast.inference.ctc.bad",
            "from w2vbert_fast.inference.jobs import job",
            {"w2vbert_fast.inference.ctc", "w2vbert_fast.inference.jobs"},
        ),
    ],
)
def test_a_circle_is_found(
    name: str, line: str, circle: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.py").write_text(line)
    monkeypatch.setitem(MODULES, name, tmp_path / "bad.py")
    assert any(circle <= set(found) for found in circles()), circles()


def test_the_environment_is_read_in_one_module_only() -> None:
    readers = [
        name
        for name, path in MODULES.items()
        if name in IMPORTABLE
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
        for folder in (*PACKAGES, TOOLS, BENCH, "tests", "examples")
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
    """`tests/helpers/waiting.py` says what to do instead. A run on a GPU has a clock."""
    with_clock = {ROOT / "tests" / "kernels" / name for name in ("__main__.py", "conftest.py")}
    files = [p for p in (ROOT / "tests").rglob("*.py") if p not in with_clock]
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
