"""README and docs: every block runs, every table is current."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.helpers.snippets import LANGUAGES, ROOT, Reader, blocks, commands
from tests.helpers.stand_ins import ADDED, NOT_RUN, REPLACED, fill

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "use").glob("*.md")))
ELSEWHERE = {
    "docs/use/recipes.md": "tests/repository/test_recipes.py",
    "docs/use/scaling.md": "tests/integrations/test_integration_ray.py",
}
"""Pages whose blocks another test runs: against the pipelines themselves, on a cluster."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


HERE = [page for page in PAGES if name(page) not in ELSEWHERE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader")
    fill(path)
    return path


@pytest.mark.parametrize("page", HERE, ids=name)
def test_blocks_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder for all pages, where a command that is given again goes on."""
    monkeypatch.chdir(folder)
    # README's blocks stand alone; a page's go on from each other.
    Reader(REPLACED, ADDED, NOT_RUN).read(blocks(page), apart=name(page) == "README.md")


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items())
def test_other_pages_are_run_by_another_test(page: str, test: str) -> None:
    assert page.rpartition("/")[2] in (ROOT / test).read_text()


def test_blocks_are_of_a_language_that_is_known() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert not [str(block) for block in found if block.language not in LANGUAGES]
    for block in found:
        if block.language == "yaml":
            assert yaml.safe_load(block.text)


def test_what_is_not_run_is_there() -> None:
    lines = [
        command.line
        for page in PAGES
        for block in blocks(page)
        if block.language == "console"
        for command in commands(block)
    ]
    assert not [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)]
    text = "".join(page.read_text() for page in PAGES)
    assert not [theirs for theirs in REPLACED if theirs not in text]


def test_a_wrong_block_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"

    def read(text: str) -> None:
        page.write_text(text)
        Reader({}, {}, {}).read(blocks(page, tmp_path), apart=False)

    read("```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n")
    with pytest.raises(NameError, match="nowhere"):
        read("```python\nnowhere\n```\n")
    with pytest.raises(AssertionError, match="exit status 2"):
        read("```console\n$ w2vbert-fast transcribe --no-such-option\n```\n")
    with pytest.raises(AssertionError, match="does not print"):
        read("```console\n$ w2vbert-fast --version\nw2vbert-fast 99\n```\n")
    with pytest.raises(AssertionError, match="no extras"):
        read("```console\n$ pip install 'w2vbert_fast[none]'\n```\n")
    with pytest.raises(AssertionError, match="no rule"):
        read("```console\n$ rm file\n```\n")


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_tables_are_current() -> None:
    """`python docs/tables.py` writes them."""
    made = tables()
    quick = [name for name in made.TABLES if name not in made.SLOW]
    for page in made.PAGES:
        text = page.read_text()
        assert made.current(text, quick) == text, f"{page} is not current: python docs/tables.py"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
