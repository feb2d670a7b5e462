"""The report is one HTML file that shows what the runs hold, says what they lack, and trusts none of their text."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from safetensors import torch as torch_file
from safetensors.numpy import save_file

from kd_accel.config import ObjectiveConfig, ReportConfig
from kd_accel.memory_files import NAME, memory_snapshot
from kd_accel.metrics import read_rows
from kd_accel.objective import Objective
from kd_accel.report import run, write_report
from kd_accel.schema import ConfigError, validate
from kd_accel.types import TeacherSpec

pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")
CONFIDENCE = "Confidence of the teacher"
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


def add_checkpoint(folder, *, step=3, parts=1, **confidences):
    """The files of a checkpoint that the report reads, and their folder: teacher -> alpha by sample id, in `parts`."""
    state = folder / f"checkpoints/step_{step:08d}/state"
    state.mkdir(parents=True)
    for part in range(parts if confidences else 0):
        columns = {
            f"confidences.{teacher}.alpha": np.array_split(np.float32(alpha), parts)[part]
            for teacher, alpha in confidences.items()
        }
        save_file({"recall.gcl.memory.log_u_image": columns[min(columns)], **columns}, state / NAME.format(part, parts))
    (state / "progress.json").write_text("{}")
    (folder / "checkpoints/latest").write_text(state.parent.name)
    return state


def confidence_section(text: str) -> str:
    return re.search(rf"<section><h2>{CONFIDENCE}.*?</section>", text, flags=re.DOTALL).group()


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


def test_confidences_of_the_seen_samples_are_counted(tmp_path):
    """A histogram per teacher, an outline per run that knows it; samples that were never seen do not count."""
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    some, all_seen = [0.25, np.nan, 0.75, np.nan], [0.125, 0.375]
    add_checkpoint(first, small=some, large=some)
    add_checkpoint(second, large=all_seen)
    _, text = report(tmp_path, first, second)
    section, colors = confidence_section(text), re.findall(r'<i style="background:(#\w+)">', text)
    assert re.findall(r"<figcaption>(.*?)</figcaption>", section) == [
        f"large<br>a: 2 of 4 samples seen, mean {np.nanmean(some)}<br>b: 2 of 2 samples seen, mean {np.mean(all_seen)}",
        f"small<br>a: 2 of 4 samples seen, mean {np.nanmean(some)}",
    ]
    panels = re.findall(r"<svg.*?</svg>", section, flags=re.DOTALL)
    assert [[color in panel for color in colors] for panel in panels] == [[True, True], [True, False]]


def test_a_histogram_shows_where_the_confidences_lie(tmp_path):
    """Samples of two confidences make two bars as high as their shares, 1 to 3, at the bins of 0..1 they fall in."""
    folder = make_run(tmp_path / "a")
    add_checkpoint(folder, teacher=[0.1, 0.9, 0.9, 0.9])
    _, text = report(tmp_path, folder)
    color = re.search(r'<i style="background:(#\w+)">', text).group(1)
    outline = re.search(rf'<path d="([^"]*)"[^>]*style="[^"]*{color}', confidence_section(text)).group(1)
    points = np.array([[float(n) for n in point.split()] for point in re.findall(r"[ML] ([-\d. ]+)", outline)])
    x, height = points[:, 0], points[:, 1].max() - points[:, 1]
    (low, high) = (height[(x - x[0]) / (x[-1] - x[0]) < middle].max() for middle in (0.5, 1.0))
    np.testing.assert_allclose(high / low, 3, rtol=1e-3)
    np.testing.assert_allclose((x[height == high].mean() - x[0]) / (x[-1] - x[0]), 0.9, atol=1 / 40)


def test_the_newest_checkpoint_is_the_one_that_is_shown(tmp_path):
    folder = make_run(tmp_path / "a")
    add_checkpoint(folder, step=2, teacher=[0.25, np.nan])
    add_checkpoint(folder, step=3, teacher=[0.25, 0.75])
    assert "2 of 2 samples seen, mean 0.5<" in report(tmp_path, folder)[1]


def test_the_parts_of_all_ranks_are_one_histogram(tmp_path):
    """Sharded memory is saved by each rank, the last of which holds fewer samples."""
    folder = make_run(tmp_path / "a")
    add_checkpoint(folder, parts=2, teacher=[0.25, np.nan, 0.75])
    assert "2 of 3 samples seen, mean 0.5<" in report(tmp_path, folder)[1]


def test_what_the_objective_remembers_is_what_is_shown(tmp_path):
    """The names in the file are the objective's own."""
    config = validate(ObjectiveConfig, {"terms": {"kl": {"kind": "logit_kl", "confidence": True}}})
    objective = Objective(config, teachers={"big": TeacherSpec(embed_dim=4, logit_scale=100.0)}, num_ids=5)
    objective.confidences["big"].write(torch.tensor([1, 3]), {"alpha": torch.tensor([0.25, 0.75])})
    folder = make_run(tmp_path / "a")
    ((name, columns),) = memory_snapshot(objective).items()
    torch_file.save_file(columns, add_checkpoint(folder) / name)
    assert "big<br>a: 2 of 5 samples seen, mean 0.5<" in report(tmp_path, folder)[1]


def test_a_memory_that_saw_nothing_has_no_mean(tmp_path):
    """A checkpoint from before the first step is not a reason to stop."""
    folder = make_run(tmp_path / "a")
    add_checkpoint(folder, teacher=[np.nan, np.nan])
    assert "<br>a: 0 of 2 samples seen</figcaption>" in report(tmp_path, folder)[1]


def test_runs_without_confidences_have_no_section_for_them(tmp_path):
    """Neither a run without a checkpoint, nor one whose terms weigh no samples."""
    plain, saved = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    add_checkpoint(saved)
    assert CONFIDENCE not in report(tmp_path, plain, saved)[1]


@pytest.mark.parametrize("how", ["gone", "cut short", "something else"])
def test_a_checkpoint_that_cannot_be_read_is_named(how, tmp_path):
    """The report goes on with the other run, and says which run lacks what."""
    whole, damaged = make_run(tmp_path / "whole"), make_run(tmp_path / "damaged")
    add_checkpoint(whole, teacher=[0.25, 0.75])
    file = add_checkpoint(damaged, parts=2, teacher=[0.25, 0.75]) / NAME.format(1, 2)
    match how:
        case "gone":
            file.unlink()
        case "cut short":
            file.write_bytes(file.read_bytes()[:-1])
        case "something else":
            file.write_text("{}")
    _, text = report(tmp_path, whole, damaged)
    section = confidence_section(text)
    assert "No readable <code>state/memory_*.safetensors</code> in the newest checkpoint of damaged:" in section
    assert "whole: 2 of 2 samples seen" in section
    assert "damaged: 2 of 2" not in section


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
    add_checkpoint(folder, **{evil: [0.5]})
    page, text = report(tmp_path, folder)
    assert "<script" not in text
    assert page.text.count(evil) >= 5  # curve, result, confidence, config, environment: shown as text


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
    add_checkpoint(folder, teacher=[0.5])
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
