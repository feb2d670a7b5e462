"""The page in a real browser, headless Chromium: nothing is broken, nothing is fetched, and it reads well."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from report_run import add_examples, make_run, result, write_rows

from kd_accel.report.verb import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
LONG = "a_run_with_a_very_long_name_" + "x" * 120

# Elements whose text is wider than their box; boxes that reach out of the page, where they do not scroll inside of it.
CUT = """() => [...document.querySelectorAll('h1, h2, h3, h4, p, li, summary, figcaption, th, td, code')]
  .filter(e => e.checkVisibility() && !e.closest('pre'))
  .filter(e => (e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll'))
    || (getComputedStyle(e).display !== 'inline' && e.scrollWidth > e.clientWidth + 1))
  .map(e => e.tagName + ': ' + e.textContent.slice(0, 60))"""
# Pairs of pieces of text in SVG pictures, or of figures, one on top of the other.
OVERLAP = """() => {
  const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1
  const found = []
  for (const group of [...document.querySelectorAll('svg')].map(svg => [...svg.querySelectorAll('text')])
      .concat([[...document.querySelectorAll('figure')]])) {
    const boxes = group.filter(e => e.checkVisibility()).map(e => [e, e.getBoundingClientRect()])
    boxes.forEach(([a, one], i) => boxes.slice(i + 1).forEach(([b, other]) => {
      if (over(one, other)) found.push(a.textContent.slice(0, 30) + ' / ' + b.textContent.slice(0, 30))
    }))
  }
  return found
}"""
BROKEN = "() => [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt)"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A page with everything in it: long names, many metrics, gaps, examples, several steps, hostile text."""
    folder = tmp_path_factory.mktemp("report")
    tasks = ["vtab/cifar100", "retrieval/flickr_1k_test_image_text_retrieval", "<b>bold</b>"]
    rows = [result(s, s / 20 + t / 10, dataset=name, mean_rank=3.0) for s in (5, 10) for t, name in enumerate(tasks)]
    teacher = make_run(folder / "teacher", results=rows[3:], steps=(1, 5, 10))
    student = make_run(folder / LONG, results=rows, steps=range(1, 11), teacher=teacher, term="w" * 90)
    other = make_run(folder / "alone", results=rows[:3], steps=(1, 2))
    write_rows(other / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}])
    long_words = ("an_endless_word_" * 20, "a caption of many words " * 12)
    add_examples(teacher, captions=long_words)
    add_examples(student, captions=long_words, right=False)
    add_examples(student, dataset="b" * 150)
    return write_report([teacher, student, other], folder / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        # --no-sandbox: tests may run as root, and the page is ours
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390], ids=["wide", "narrow"])
def page(request, browser, report) -> Iterator[Page]:
    """The report at one width, with every fold open; what it asked for and what it complained of."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.requests, page.complaints = [], []
    page.on("request", lambda asked: page.requests.append(asked.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(report.as_uri())
    page.evaluate("() => document.querySelectorAll('details').forEach(fold => { fold.open = true })")
    page.wait_for_load_state("networkidle")
    yield page
    page.close()


def test_nothing_is_broken_and_nothing_leaves_the_page(page, report):
    """One request, for the file itself; pictures are in it and whole; the console is silent."""
    asked = [url for url in page.requests if not url.startswith("data:image/jpeg;base64,")]
    assert asked == [report.as_uri()]
    assert page.complaints == []
    assert page.evaluate("() => document.images.length") > 8
    assert page.evaluate(BROKEN) == []


def test_the_page_fits_its_window(page):
    """Only tables and config files scroll sideways, inside of it; no text is cut off or lies on another."""
    assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
    assert page.evaluate(CUT) == []
    assert page.evaluate(OVERLAP) == []


def test_folds_are_closed_until_they_are_opened(browser, report):
    """All but the first set of examples; a click shows the metrics."""
    page = browser.new_page()
    page.goto(report.as_uri())
    cell = page.get_by_text("mean_rank").first
    assert not cell.is_visible()
    page.get_by_text("All metrics of all tasks").first.click()
    assert cell.is_visible()
    assert page.locator("img").first.is_visible()
    page.close()


def test_light_and_dark_follow_the_system(browser, report):
    """Grounds and inks change places."""
    colors = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(report.as_uri())
        style = "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        colors[scheme] = [sum(map(int, color.strip("rgb()").split(","))) for color in page.evaluate(style)]
        page.close()
    (light_ground, light_ink), (dark_ground, dark_ink) = colors["light"], colors["dark"]
    assert light_ground > light_ink
    assert dark_ground < dark_ink


def test_paper_is_white(browser, report):
    """Whatever the screen is."""
    page = browser.new_page(color_scheme="dark")
    page.goto(report.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.close()


@pytest.mark.parametrize(
    ("body", "check"),
    [
        ("<p style='width: 3000px'>wide</p>", CUT),
        ("<p style='width: 9px; overflow: hidden; white-space: nowrap'>cut off</p>", CUT),
        ("<svg><text y=20>one</text><text y=25>other</text></svg>", OVERLAP),
        ("<img src='data:image/jpeg;base64,AAAA' alt=damaged>", BROKEN),
    ],
)
def test_what_is_wrong_would_be_found(body, check, browser):
    """The checks above complain about a page with one fault."""
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.set_content(f"<!doctype html><body>{body}</body>")
    assert page.evaluate(check) != []
    page.close()
