"""The report is one HTML file that shows what the runs hold, says what they lack, and trusts none of their text."""

from __future__ import annotations

import json
import re
import sys

import pytest
from report_run import Page, add_examples, make_run, report, result, write_rows

from kd_accel import cli
from kd_accel.report.pictures import COLORS
from kd_accel.report.style import STYLE
from kd_accel.report.verb import write_report
from kd_accel.schema import ConfigError
from kd_accel.text_files import read_rows

pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")


def test_the_page_is_self_contained(tmp_path):
    """Nothing is fetched: no script, no address, no reference outside the page; pictures are in it."""
    folder = make_run(tmp_path / "a", results=[result(3, 0.5)], steps=(1, 2))
    add_examples(folder)
    page = report(tmp_path, folder)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    attributes = [item for _, attrs in page.tags for item in attrs.items()]
    addresses = [value for key, value in attributes if key in ("src", "href", "xlink:href")]
    assert any(value.startswith("data:image/jpeg;base64,") for value in addresses)
    assert all(value.startswith(("#", "data:image/jpeg;base64,")) for value in addresses)
    assert "http" not in page.source
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page.source)


def test_every_logged_number_has_a_curve(tmp_path):
    """One panel per metric, and a line for every run that logged it; counts are what they are drawn over."""
    first, second = make_run(tmp_path / "a", steps=(1, 2)), make_run(tmp_path / "b", term="kl", steps=(1, 2))
    page = report(tmp_path, first, second)
    panels = dict(
        reversed(pair)
        for pair in re.findall(r"(<svg.*?</svg>)</div><figcaption><code>(.*?)</code>", page.source, flags=re.DOTALL)
    )
    logged = {key for path in (first, second) for row in read_rows(path / "metrics.jsonl") for key in row}
    assert sorted(panels) == sorted(logged - {"step", "samples"})
    assert [color in panels["loss"] for color in COLORS[:3]] == [True, True, False]
    assert [color in panels["loss/kl"] for color in COLORS[:3]] == [False, True, False]


def test_results_of_evaluation_while_training_are_no_curves_of_training(tmp_path):
    """They are in results.jsonl as well, and forty tasks of six metrics would bury the others."""
    folder = make_run(tmp_path / "a")
    write_rows(folder / "metrics.jsonl", [{"step": 1, "loss": 1.0}, {"step": 1, "eval/digits/acc1": 0.5}])
    assert "eval/digits" not in report(tmp_path, folder).source


def test_the_config_difference_lists_only_what_differs(tmp_path):
    """Two runs that differ in lr: the difference table names lr with both values, not the equal settings."""
    page = report(tmp_path, make_run(tmp_path / "a", lr=1e-3), make_run(tmp_path / "b", lr=2e-3))
    table = re.search(r"Settings that differ:.*?</table>", page.source, flags=re.DOTALL).group().replace("<wbr>", "")
    assert re.findall(r"<tr><th scope=row>([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td></tr>", table) == [
        ("name", "a", "b"),
        ("optim.lr", "0.001", "0.002"),
    ]


def test_of_one_run_what_is_not_the_default_is_listed(tmp_path):
    """A whole config of train: the settings that were given are there, defaults are not."""
    folder = make_run(tmp_path / "a")
    given = "data: {shards: x, batch_size: 8}\nstudent: {arch: ViT-B-32}\nobjective: {terms: {clip: {kind: clip}}}\n"
    (folder / "config.yaml").write_text(f"name: a\nseed: 0\nprecision: fp32\n{given}optim: {{lr: 0.1, epochs: 1}}\n")
    table = re.search(r"not the default:.*?</table>", report(tmp_path, folder).section("Config"), flags=re.DOTALL)
    keys = re.findall(r"<th scope=row>([^<]*)</th>", table.group().replace("<wbr>", ""))
    assert {"precision", "data.batch_size", "student.arch", "optim.lr"} <= set(keys)
    assert "seed" not in keys


def test_a_value_that_all_environments_share_stands_once(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (second / "environment.json").write_text(json.dumps({"python": "3.11.9", "world_size": 8}))
    section = report(tmp_path, first, second).section("Environment").replace("<wbr>", "")
    assert "<th scope=row>python</th><td colspan=2>3.11.9</td></tr>" in section
    assert "<th scope=row>world_size</th><td>2</td><td>8</td></tr>" in section


def test_text_of_the_runs_is_escaped(tmp_path):
    """A caption-like string in a config, a metric's name, a result or an example cannot add markup."""
    evil = '<script>alert("1")</script>'
    folder = make_run(
        tmp_path / "a", term=evil, steps=(1,), results=[result(1, 0.5, dataset=evil, model=evil), result(2, 0.5)]
    )
    add_examples(folder, captions=(evil, "x"))
    (folder / "examples" / "flickr.json").rename(folder / "examples" / "odd.json")
    (folder / "environment.json").write_text(json.dumps({evil: evil, "world_size": 1}))
    page = report(tmp_path, folder)
    assert "<script" not in page.source
    assert page.text.count(evil) >= 5  # curve, result, example, config, environment: shown as text
    assert len(Page(page.source).tags) == len(page.tags)


def test_an_empty_run_says_what_is_missing_and_what_makes_it(tmp_path):
    """Each section names the missing file and the command that writes it."""
    (tmp_path / "empty").mkdir()
    page = report(tmp_path, tmp_path / "empty")
    for file in ("metrics.jsonl", "results.jsonl", "config.yaml", "environment.json"):
        assert file in page.text
    assert "kd-accel eval RUN data=FOLDER" in page.text
    assert "kd-accel train CONFIG.yaml" in page.text


def test_null_numbers_and_a_torn_last_line_do_not_stop_it(tmp_path):
    """A non-finite value, null in metrics.jsonl, is a gap that the summary counts; null results are left out."""
    folder = make_run(tmp_path / "a", results=[result(1, None)])
    rows = [{"step": 1, "loss": 1.0, "grad_norm": None}, {"step": 2, "loss": None, "grad_norm": None, "skipped": 1}]
    write_rows(folder / "metrics.jsonl", rows)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    page = report(tmp_path, folder)
    assert "acc1" not in page.text
    assert "Note: skipped steps: 1; logged steps whose loss is not finite: 1 of 2." in page.text


@pytest.mark.parametrize("file", ["environment.json", "aggregate.json", "examples/digits.json"])
def test_a_damaged_file_is_named(file, tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text('"half')
    with pytest.raises(ConfigError, match=f"{file}: not what kd-accel writes"):
        report(tmp_path, folder)


def test_runs_of_one_name_are_told_apart(tmp_path):
    """Two directories called student carry their parents' names."""
    page = report(tmp_path, make_run(tmp_path / "x" / "student"), make_run(tmp_path / "y" / "student"))
    assert "x/student" in page.text
    assert "y/student" in page.text


def test_the_same_runs_give_the_same_bytes(tmp_path):
    """No date and no random id is in the page."""
    folder = make_run(tmp_path / "a", results=[result(1, 0.5), result(2, 0.5)])
    assert report(tmp_path, folder).source == report(tmp_path, folder).source


def test_headings_descend_one_level_at_a_time(tmp_path):
    """So that a screen reader can walk them; every table has column heads and every picture words."""
    results = [result(step, 0.5, dataset=name) for step in (1, 2) for name in ("x", "y")]
    folder = make_run(tmp_path / "a", results=results)
    add_examples(folder)
    page = report(tmp_path, folder)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert {3, 4} <= set(levels)
    assert all(below <= above + 1 for above, below in zip(levels, levels[1:], strict=False))
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("aria-label") for _, attrs in page.tags if attrs.get("role") == "img")


def luminance(color: str) -> float:
    """Relative, of sRGB (WCAG 2.2)."""
    digits = color.lstrip("#") if len(color) == 7 else "".join(2 * digit for digit in color.lstrip("#"))
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_everything_stands_out_from_its_ground(scheme):
    """WCAG 2.2: 4.5 for text, 3 for lines of pictures, on the page and on its panels."""
    blocks = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)]
    theme = blocks[scheme]
    for ground in (theme["page"], theme["panel"]):
        texts = {name: contrast(theme[name], ground) for name in ("text", "quiet", "right", "wrong")}
        lines = {color: contrast(color, ground) for color in COLORS}
        assert {name: ratio for name, ratio in texts.items() if ratio < 4.5} == {}
        assert {color: ratio for color, ratio in lines.items() if ratio < 3} == {}


def test_the_verb_writes_into_the_first_run(tmp_path, capsys):
    """Without output the page lies in the first run, and the verb says so, with the exit code 0."""
    folder = make_run(tmp_path / "a")
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()
    assert str(folder / "report.html") in capsys.readouterr().out


def test_a_missing_run_is_the_users_mistake(tmp_path):
    """The path that does not exist is named."""
    with pytest.raises(ConfigError, match="nowhere: no such run directory"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    """The error is the command that helps."""
    folder = make_run(tmp_path / "a", steps=(1,))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # Python's own way to make an import fail
    with pytest.raises(ConfigError, match=r"pip install 'kd_accel\[report\]'"):
        write_report([folder], tmp_path / "report.html")
