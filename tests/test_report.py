"""The report is one HTML file that shows what the runs hold, says what they lack, and trusts none of their text."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import pytest

from kd_accel.config import ReportConfig
from kd_accel.metrics import read_rows
from kd_accel.report import run, write_report
from kd_accel.schema import ConfigError

pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A parsed page: its tags with attributes, its visible text, and a proof that tags are balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.words, self.bold = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] not in ("style", "script"):
            self.words.append(data)
        if self.open and "best" in self.open[-1][1].get("class", ""):
            self.bold.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def result(step, acc1, *, dataset="digits", n=360):
    return {"model": "m", "step": step, "task": "zero_shot", "dataset": dataset, "n": n, "metrics": {"acc1": acc1}}


def make_run(folder, *, results=(), lr=1e-3, term="clip", steps=(1, 2, 3)):
    """A run directory as kd-accel train and eval write it."""
    folder.mkdir(parents=True)
    rows = [
        {"step": s, "loss": 3 / s, f"loss/{term}": 2 / s, "lr": lr, "temperature": 0.07, "grad_norm": 1.0,
         "samples_per_second": 99.0, "data_wait": 0.1}
        for s in steps
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results))
    (folder / "config.yaml").write_text(f"name: {folder.name}\noptim:\n  lr: {lr}\n  warmup_steps: 7\n")
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.9", "packages": {"torch": "2.11.0"}}))
    return folder


def report(tmp_path, *runs) -> tuple[Page, str]:
    text = write_report(list(runs), tmp_path / "report.html").read_text()
    return Page(text), text


def test_the_page_is_self_contained(tmp_path):
    """Nothing is fetched: no script, no address, no reference outside the page."""
    page, text = report(tmp_path, make_run(tmp_path / "a", results=[result(3, 0.5)]))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    attributes = [item for _, attrs in page.tags for item in attrs.items()]
    assert all(value.startswith("#") for key, value in attributes if key in ("src", "href", "xlink:href"))
    assert "http" not in text
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)


def test_every_logged_number_has_a_curve(tmp_path):
    """One panel per metric, and a line for every run that logged it."""
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", term="kl")
    page, text = report(tmp_path, first, second)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    logged = {key for path in (first, second) for row in read_rows(path / "metrics.jsonl") for key in row}
    assert sorted(captions) == sorted(logged - {"step"})
    panels = dict(zip(captions, re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL), strict=True))
    colors = re.findall(r'<i style="background:(#\w+)">', text)
    assert [color in panels["loss"] for color in colors] == [True, True]
    assert [color in panels["loss/kl"] for color in colors] == [False, True]


def test_the_newest_result_of_a_step_counts_and_the_best_is_bold(tmp_path):
    """A repeated evaluation replaces the earlier one, whatever it was; bold marks the best column only."""
    weak = make_run(tmp_path / "weak", results=[result(3, 0.99, n=10), result(3, 0.25)])
    good = make_run(tmp_path / "good", results=[result(3, 0.75)])
    page, _ = report(tmp_path, weak, good)
    assert "25.0%" in page.text
    assert "99.0%" not in page.text
    assert page.bold == ["75.0%"]


def test_every_evaluated_step_is_a_column(tmp_path):
    """Steps of a run stand side by side, in order, and a task that one of them lacks is a dash."""
    results = [result(20, 0.5), result(10, 0.25), result(20, 0.5, dataset="letters")]
    _, text = report(tmp_path, make_run(tmp_path / "a", results=results))
    assert re.findall(r"<small>step (\d+)</small>", text) == ["10", "20"]
    letters = re.search(r"letters.*?</tr>", text, flags=re.DOTALL).group()
    assert re.findall(r'<td class="number[^>]*>(.*?)</td>', letters) == ["&ndash;", "50.0%"]


def test_the_config_difference_lists_only_what_differs(tmp_path):
    """Two runs that differ in lr: the difference table names lr with both values, not the equal settings."""
    _, text = report(tmp_path, make_run(tmp_path / "a", lr=1e-3), make_run(tmp_path / "b", lr=2e-3))
    table = re.search(r"Settings that differ.*?</table>", text, flags=re.DOTALL).group()
    assert re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td></tr>", table) == [
        ("name", "a", "b"),
        ("optim.lr", "0.001", "0.002"),
    ]


def test_text_of_the_runs_is_escaped(tmp_path):
    """A caption-like string in a config, a metric's name or a result cannot add markup."""
    evil = "<script>alert(1)</script>"
    folder = make_run(tmp_path / "a", term=evil, results=[result(1, 0.5, dataset=evil)])
    (folder / "config.yaml").write_text(f"name: '{evil}'\n")
    (folder / "environment.json").write_text(json.dumps({evil: evil}))
    page, text = report(tmp_path, folder)
    assert "<script" not in text
    assert page.text.count(evil) >= 4  # curve, result, config, environment: shown as text


def test_an_empty_run_says_what_is_missing_and_what_makes_it(tmp_path):
    """Each section names the missing file and the command that writes it."""
    (tmp_path / "empty").mkdir()
    page, _ = report(tmp_path, tmp_path / "empty")
    for file in ("metrics.jsonl", "results.jsonl", "config.yaml", "environment.json"):
        assert file in page.text
    assert "kd-accel eval RUN data=FOLDER" in page.text
    assert "kd-accel train CONFIG.yaml" in page.text


def test_null_numbers_leave_a_gap(tmp_path):
    """A non-finite value, null in metrics.jsonl, does not stop the report; nor does a metric that is null for all."""
    folder = make_run(tmp_path / "a", results=[result(1, None)])
    rows = [{"step": 1, "loss": 1.0, "grad_norm": None}, {"step": 2, "loss": None, "grad_norm": None}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, _ = report(tmp_path, folder)
    assert "acc1" not in page.text


def test_runs_of_one_name_are_told_apart(tmp_path):
    """Two directories called student carry their parents' names."""
    page, _ = report(tmp_path, make_run(tmp_path / "x" / "student"), make_run(tmp_path / "y" / "student"))
    assert "x/student" in page.text
    assert "y/student" in page.text


def test_the_same_runs_give_the_same_bytes(tmp_path):
    """No date and no random id is in the page."""
    folder = make_run(tmp_path / "a", results=[result(3, 0.5)])
    assert report(tmp_path, folder)[1] == report(tmp_path, folder)[1]


def test_the_verb_writes_into_the_first_run(tmp_path, capsys):
    """Without output the page lies in the first run, and the verb says so."""
    folder = make_run(tmp_path / "a")
    assert run(ReportConfig(runs=[str(folder)])) == folder / "report.html"
    assert str(folder / "report.html") in capsys.readouterr().out


def test_a_missing_run_is_the_users_mistake(tmp_path):
    """The path that does not exist is named."""
    with pytest.raises(ConfigError, match="nowhere: no such run directory"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    """The error is the command that helps."""
    folder = make_run(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # Python's own way to make an import fail
    with pytest.raises(ConfigError, match=r"pip install 'kd_accel\[report\]'"):
        write_report([folder], tmp_path / "report.html")
