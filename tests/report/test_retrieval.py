"""Retrieval examples are shown as pictures with captions, right and wrong ones marked, models side by side."""

from __future__ import annotations

import re

import pytest
from report_run import add_examples, jpeg, make_run, report

pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")
TITLE = "Retrieval examples"


def test_answers_are_marked(tmp_path):
    """Two queries each way, two answers each; the wrong model says at which place the right answer is."""
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad")
    add_examples(good)
    add_examples(bad, right=False)
    section = report(tmp_path, good, bad).section(TITLE)
    assert section.count("<article class=query>") == 4
    assert re.findall(r'class="answer (\w+)"', section) == ["right", "wrong", "wrong", "right"] * 2
    assert re.findall(r"<li class=(\w+)>", section) == ["right", "wrong", "wrong", "right"] * 2
    assert section.count("&#10003; 0.90") == 4
    assert section.count("&#10007; 0.40") == 4
    assert "right one at place" not in section  # it is among the answers that are shown


def test_a_right_answer_that_is_not_shown_has_its_place(tmp_path):
    folder = make_run(tmp_path / "a")
    add_examples(folder, right=False)
    file = folder / "examples" / "flickr.json"
    file.write_text(file.read_text().replace('"right": true', '"right": false').replace('"place": 2', '"place": 1234'))
    assert report(tmp_path, folder).section(TITLE).count("right one at place 1,234") == 4


def test_pictures_are_shown_with_their_captions(tmp_path):
    folder = make_run(tmp_path / "a")
    add_examples(folder)
    page = report(tmp_path, folder)
    shown = {(attrs["alt"], attrs["src"]) for tag, attrs in page.tags if tag == "img"}
    source = "data:image/jpeg;base64,"
    assert shown == {("a red square", source + jpeg("red")), ("a green one", source + jpeg("green"))}
    assert [word for word in ("a red square", "a green one") if f"<h4>{word}</h4>" not in page.source] == []


def test_every_set_is_folded_but_the_first(tmp_path):
    folder = make_run(tmp_path / "a")
    for dataset in ("x", "y", "z"):
        add_examples(folder, dataset=dataset)
    section = report(tmp_path, folder).section(TITLE)
    assert re.findall(r"<(details[^>]*)><summary>(\w)<", section) == [
        ("details open", "x"),
        ("details", "y"),
        ("details", "z"),
    ]


def test_the_page_does_not_grow_with_every_run(tmp_path):
    """Pictures of four runs are shown, and it says so."""
    runs = [make_run(tmp_path / f"r{i}") for i in range(6)]
    for run in runs:
        add_examples(run)
    section = report(tmp_path, *runs).section(TITLE)
    assert "Of the first 4 runs that have examples." in section
    assert [f"</i>r{i}" in section for i in range(6)] == [True] * 4 + [False] * 2


def test_without_examples_there_is_no_section(tmp_path):
    assert TITLE not in report(tmp_path, make_run(tmp_path / "a")).source
