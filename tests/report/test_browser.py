"""The page of a job in a browser: sorted, searched, played, by keyboard, narrow, in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from w2vbert_fast.inference import Flow
from w2vbert_fast.inference.jobs.job import Job, JobOptions
from w2vbert_fast.inference.jobs.report import REPORT_FILE
from w2vbert_fast.inference.runner import Runner
from w2vbert_fast.inference.tasks import Transcribe
from w2vbert_fast.recordings.inputs import open_inputs
from w2vbert_fast.report import Column, Page, Row, write_page

SAMPLES = Path(__file__).parents[2] / "w2vbert_fast" / "demo" / "samples"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
NASTY = "<img src=x onerror='window.broken=1'><script>window.broken=1</script>"

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium")

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def page_of_a_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    bad = folder / f"{NASTY.replace('/', '')}.wav"
    bad.write_text("no audio")
    task = Transcribe("demo", timestamps="word")
    runner = Runner(task, Flow(frame_budget=1000, workers=1))
    inputs = open_inputs([str(SAMPLES), str(bad)])
    Job(runner, inputs, folder / "out", (), JobOptions()).run()
    return folder / "out" / REPORT_FILE


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        # Without a user's click nothing may make a sound; the test is no user.
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--mute-audio"]
        found = tool.chromium.launch(executable_path=BROWSER, args=flags)
        yield found
        found.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Open]:
    """Opens a file, and at the end asserts that nothing went wrong or went out."""
    troubles: list[str] = []
    contexts = []

    def show(path: Path, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith("file:") or troubles.append(request.url),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("tr.row")
        return page

    yield show
    for context in contexts:
        context.close()
    assert troubles == []


def column(page: Any, number: int) -> list[str]:
    return [str(text) for text in page.locator(f"tr.row td:nth-child({number})").all_inner_texts()]


def test_sorted_by_each_column_and_searched(page_of_a_job: Path, show: Open) -> None:
    page = show(page_of_a_job)
    shares = [float(text.split()[0]) for text in column(page, 3) if text]
    assert len(shares) == 5 and shares == sorted(shares)  # the least certain first
    assert column(page, 3)[-1] == ""  # the row that failed
    page.get_by_role("button", name="Length").click()
    lengths = [float(text.split()[0]) for text in column(page, 2) if text]
    assert lengths == sorted(lengths)
    page.get_by_role("button", name="Length").click()
    assert [float(text.split()[0]) for text in column(page, 2) if text] == lengths[::-1]
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Length")
    page.get_by_label("Search").fill("MENU star")
    until(page, "document.querySelectorAll('tr.row').length === 1")
    assert column(page, 4) == ["press star to return to the main menu"]
    assert page.locator("#count").inner_text() == "1 of 6 rows"
    page.get_by_label("Search").fill("")
    page.get_by_label("Show").select_option("failed")
    assert len(column(page, 1)) == 1
    page.get_by_label("Show").select_option("all")
    page.locator("#findings button").click()  # the kind of error
    until(page, "document.querySelectorAll('tr.row').length === 1")
    assert page.evaluate("window.broken") is None
    assert "onerror" in column(page, 1)[0]


def test_heard_and_read_by_keyboard(page_of_a_job: Path, show: Open) -> None:
    page = show(page_of_a_job)
    page.focus("#view")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    until(page, "document.querySelector('tr[aria-selected=true]')?.ariaRowIndex === '3'")
    said = column(page, 4)[1]
    page.keyboard.press("Enter")  # which waits for the row to be there
    until(page, "document.querySelector('audio').currentTime > 0.3")
    until(page, "document.querySelector('#words .now') !== null")
    assert page.locator("#words button").all_inner_texts() == said.split()
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('audio').paused")
    # A word is where it is said.
    page.locator("#words button").nth(2).click()
    until(
        page,
        "document.querySelector('#words .now') === document.querySelectorAll('#words button')[2]",
    )
    page.keyboard.press("Escape")
    assert page.locator("#chosen").is_hidden()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.focus("#view")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    until(page, "!document.querySelector('#trouble').hidden")
    assert page.locator("#trouble").inner_text().startswith("This browser cannot play")


def test_a_narrow_window_and_the_dark(page_of_a_job: Path, show: Open) -> None:
    page = show(page_of_a_job, viewport={"width": 360, "height": 640}, color_scheme="dark")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360  # only the table scrolls sideways
    page.locator("tr.row").first.click()
    page.wait_for_selector("#words button")
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert brightness(ground) < 50 < 200 < brightness(ink)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_columns_of_text_are_legible_in_a_narrow_window(tmp_path: Path, show: Open) -> None:
    numbers = [Column(name, "number") for name in ("Length", "Errors", "First", "Second")]
    columns = (Column("Name"), *numbers, *map(Column, ("Said", "Heard")))
    path = tmp_path / "page.html"
    write_page(path, Page("x", columns), [Row(("a", 1, 2, 3, 4, "what is said", "what"))])
    page = show(path, viewport={"width": 375, "height": 640})
    for name in ("Name", "Said", "Heard"):
        box = page.get_by_role("columnheader", name=name).bounding_box()
        assert box["width"] >= 100, name
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.parametrize("width, height", [(1200, 700), (375, 740)])
def test_the_chosen_row_is_in_sight(tmp_path: Path, show: Open, width: int, height: int) -> None:
    """The panel below, which shows a row, hides it neither on the way down nor on the way up."""
    path = tmp_path / "page.html"
    columns = (Column("Name"), Column("Long", small=True))
    write_page(path, Page("x", columns), (Row((f"clip {i}", "so it is " * 90)) for i in range(40)))
    page = show(path, viewport={"width": width, "height": height})
    page.locator("tr.row").nth(9).click()
    until(page, in_sight(9))
    page.focus("#view")
    down = [("ArrowDown", number) for number in range(10, 19)]
    for key, number in [*down, *(("ArrowUp", number) for number in range(17, -1, -1))]:
        page.keyboard.press(key)
        until(page, in_sight(number))


def test_words_that_are_read_from_the_right(tmp_path: Path, show: Open) -> None:
    path = tmp_path / "page.html"
    text = "مرحبا بكم هنا."
    words = [(word, i, i + 0.5, 0.9) for i, word in enumerate(text.split())]
    columns = (Column("Name"), Column("Text"), Column("Before", small=True))
    write_page(path, Page("x", columns), [Row(("a", text, text), words=words)])
    page = show(path)
    page.locator("tr.row").first.click()
    page.wait_for_selector("#words button")
    left = [word.bounding_box()["x"] for word in page.locator("#words button").all()]
    assert left == sorted(left, reverse=True)  # the first word is at the right
    for place in ("tr.row td:nth-child(2)", "#cells dd >> nth=0", "#cells dd >> nth=1"):
        found = page.locator(place).evaluate("element => getComputedStyle(element).direction")
        assert found == "rtl"


def until(page: Any, condition: str) -> None:
    """Until it holds; the page's policy lets nothing be evaluated in it but from outside."""
    for _ in range(1500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(condition)


def in_sight(number: int) -> str:
    """That this clip is the chosen one, and nothing lies on its row."""
    return f"""(() => {{
        const row = document.querySelector("tr[aria-selected=true]");
        if (row?.innerText.trim() !== "clip {number}") return false;
        const {{ left, top, bottom }} = row.getBoundingClientRect();
        const at = (y) => document.elementFromPoint(left + 9, y);
        return row.contains(at(top + 2)) && row.contains(at(bottom - 2));
    }})()"""


def brightness(colour: str) -> float:
    return sum(map(int, colour.strip("rgb()").split(","))) / 3


def test_many_rows_stay_usable(tmp_path: Path, show: Open) -> None:
    """The screen has a few of 100,000 rows; the last is reached, and one of them is found."""
    columns = (Column("Name"), Column("Length", "seconds"), Column("Text"))
    rows = (Row((f"clip {i}", i % 977 / 10, f"word{i % 5000} and more")) for i in range(100_000))
    path = tmp_path / "page.html"
    write_page(path, Page("many", columns), rows)
    page = show(path)
    assert page.locator("#count").inner_text() == "100,000 rows"
    assert page.locator("tr.row").count() < 100
    page.focus("#view")
    page.keyboard.press("End")
    page.wait_for_selector("tr[aria-rowindex='100001']")
    assert page.locator("tr[aria-selected=true]").inner_text().startswith("clip 99999")
    page.get_by_role("button", name="Length").click()
    page.get_by_role("button", name="Length").click()
    assert set(column(page, 2)) == {"1:38"}
    page.get_by_label("Search").fill("word4321")
    until(page, "document.querySelector('#count').value === '20 of 100,000 rows'")
