"""Run directories as kd-accel train and eval write them, and the page that the report makes of them, parsed."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import yaml
from PIL import Image

from kd_accel.report.verb import write_report

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


def result(step, acc1, *, dataset="digits", task="zero_shot", n=360, model="m", **metrics):
    """A row of results.jsonl, with acc1 as its main metric."""
    metrics = {"acc1": acc1, **metrics, "main_metric": acc1}
    return {"model": model, "step": step, "key": dataset, "dataset": dataset, "task": task, "n": n, "metrics": metrics}


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, *, results=(), lr=1e-3, term="clip", steps=(), teacher=None) -> Path:
    """A run that logged `steps`, 64 samples each at 32 samples/s; `teacher` is the path that its config names."""
    folder.mkdir(parents=True)
    rows = [
        {"step": s, "samples": 64 * s, "loss": 3 / s, f"loss/{term}": 2 / s, "lr": lr, "temperature": 0.07,
         "grad_norm": 1.0, "samples_per_second": 32.0, "data_wait": 0.1}
        for s in steps
    ]  # fmt: skip
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(folder / "results.jsonl", results)
    objective = {"terms": {term: {"kind": "clip", "weight": 1.0}}}
    settings = {"name": folder.name, "optim": {"lr": lr, "warmup_steps": 7}, "objective": objective}
    settings |= {"teacher": {"path": str(teacher)}} if teacher else {}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    environment = {"python": "3.11.9", "packages": {"torch": "2.11.0"}, "world_size": 2}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def jpeg(color: str) -> str:
    """A small picture as base64."""
    file = io.BytesIO()
    Image.new("RGB", (48, 32), color).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def add_examples(folder: Path, *, dataset="flickr", captions=("a red square", "a green one"), right=True) -> None:
    """Two pictures, each asked for and asked about; `right`: whether the first answer is."""
    keys = ["0", "7"]
    order = (0, 1) if right else (1, 0)

    def answers(wanted, what, values):
        ranked = [wanted if place == 0 else 1 - wanted for place in order]
        return [{what: values[i], "score": 0.9 - 0.5 * n, "right": i == wanted} for n, i in enumerate(ranked)]

    place = 1 if right else 2
    examples = {
        "dataset": dataset,
        "step": 3,
        "pictures": {
            key: {"jpeg": jpeg(color), "caption": caption}
            for key, color, caption in zip(keys, ("red", "green"), captions, strict=True)
        },
        "image_retrieval": [
            {"query": captions[i], "wanted": keys[i], "place": place, "answers": answers(i, "picture", keys)}
            for i in (0, 1)
        ],
        "text_retrieval": [
            {"query": keys[i], "place": place, "answers": answers(i, "caption", captions)} for i in (0, 1)
        ],
    }
    (folder / "examples").mkdir(exist_ok=True)
    (folder / "examples" / f"{dataset}.json").write_text(json.dumps(examples))


class Page(HTMLParser):
    """A parsed page: its tags with attributes, its visible text, and a proof that tags are balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.source = text
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
        if self.open and self.open[-1][0] == "td" and self.open[-1][1].get("class") == "best":
            self.bold.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def section(self, title: str) -> str:
        """The source of the section below this heading; fails without one."""
        return re.search(rf"<section><h2>{title}</h2>.*?</section>", self.source, flags=re.DOTALL).group()

    @property
    def main_table(self) -> list[list[str]]:
        """The first table of the evaluation: the text of every cell, row by row."""
        table = re.search(r"<table>.*?</table>", self.section("Evaluation"), flags=re.DOTALL).group()
        rows = re.findall(
            r"<tr>(.*?)</tr>", table.replace("<wbr>", "").replace("\N{NO-BREAK SPACE}", " "), flags=re.DOTALL
        )
        return [
            [re.sub(r"<[^>]*>", " ", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in rows
        ]


def report(tmp_path: Path, *runs: Path) -> Page:
    return Page(write_report(list(runs), tmp_path / "report.html").read_text())
