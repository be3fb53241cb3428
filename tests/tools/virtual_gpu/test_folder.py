"""The folder stands on its own, outside the wheel."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import tomllib

import tools.virtual_gpu

FOLDER = Path(tools.virtual_gpu.__file__).parent
ROOT = FOLDER.parent.parent
ALLOWED = {"numpy", "torch", "triton"}


def test_it_imports_torch_triton_and_numpy_alone() -> None:
    files = sorted(FOLDER.rglob("*.py"))
    assert len(files) > 3
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            foreign = {name.partition(".")[0] for name in names}
            foreign -= ALLOWED | set(sys.stdlib_module_names)
            assert not foreign, (file.name, foreign)


def test_it_is_in_the_source_distribution_and_not_in_the_wheel() -> None:
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert "/tools" in targets["targets"]["sdist"]["include"]
    assert "tools" not in targets["targets"]["wheel"]["packages"]
