"""The model card: what it says is what the run and the results say, and no secret of a config is in it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from kd_accel.export.origin import hub_name, without_secrets
from kd_accel.export.verb import run
from kd_accel.export_config import ExportConfig

CONFIG = {
    "student": {"arch": "ViT-B-32", "init": None, "lock": {}},
    "teacher": {"path": "runs/teacher"},
    "objective": {"terms": {"clip": {"kind": "clip"}}},
    "optim": {"lr": 0.1},
    "data": {"shards": "datasets/pairs"},
}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def result(model: str, step: int, acc1: float, *, key="mnist", n=1000) -> dict:
    row = {"model": model, "step": step, "key": key, "dataset": key.upper(), "task": "zero_shot", "n": n}
    return row | {"weights": "w", "metrics": {"acc1": acc1, "main_metric": acc1}}


@pytest.fixture
def make_run(tmp_path, releases, monkeypatch):
    """A function: a run with a checkpoint of step 10 -> the checkpoint; what is relative starts from tmp_path."""
    monkeypatch.chdir(tmp_path)

    def make(name: str = "small", *, kind: str = "vit", logged=(5, 10), **sections) -> Path:
        folder = tmp_path / "runs" / name
        checkpoint = folder / "checkpoints" / "step_00000010"
        shutil.copytree(releases(kind), checkpoint / "student")
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | sections))
        terms = {"loss/clip": 2.0, "loss/kl": 1.0}
        write_rows(folder / "metrics.jsonl", [{"step": s, "loss": 3 / s, **terms, "temperature": 0.07} for s in logged])
        return checkpoint

    return make


def card(checkpoint: Path, out: str = "out", **values) -> str:
    run(ExportConfig(model=str(checkpoint), out=out, **values))
    return (Path(out) / "README.md").read_text()


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_it_tells_how_the_model_was_made_and_how_good_it_is(make_run):
    """Recipe without what was left out, results of this step alone, licence, curves that the Hub finds."""
    checkpoint = make_run()
    results = [result("small", 5, 0.05), result("small", 10, 0.1), result("another", 10, 0.9)]
    write_rows(checkpoint.parents[1] / "results.jsonl", results)
    text = card(checkpoint, license="mit")
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe == CONFIG | {"student": {"arch": "ViT-B-32"}}
    assert "| data | task | metric | this model | samples |" in text
    assert [line for line in text.splitlines() if line.startswith("| MNIST")] == [
        "| MNIST | zero-shot | acc1 | 10.0\N{NO-BREAK SPACE}% | 1,000 |"
    ]
    assert front_matter(text)["license"] == "mit"
    assert "](curves.png)" in text
    with Image.open("out/curves.png") as picture:
        assert picture.width > picture.height  # four panels, three beside each other


def test_the_teacher_stands_beside_it_where_both_were_measured_alike(make_run):
    """Its newest results, by its own run or in the student's; those of another number of samples are not compared."""
    checkpoint = make_run()
    rows = [result("small", 10, 0.1), result("small", 10, 0.2, key="svhn"), result("small", 10, 0.3, key="dtd")]
    write_rows(checkpoint.parents[1] / "results.jsonl", [*rows, result("teacher", 7, 0.6, key="dtd")])
    teacher = Path("runs/teacher")
    teacher.mkdir()
    own = [result("teacher", 9, 0.5), result("teacher", 8, 0.4), result("teacher", 9, 0.7, key="svhn", n=999)]
    write_rows(teacher / "results.jsonl", own)
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for line in card(checkpoint).splitlines()]
    assert "| data | task | metric | this model | teacher (teacher) | samples |" in lines
    assert [line for line in lines if "zero-shot |" in line] == [
        "| MNIST | zero-shot | acc1 | 10.0 % | 50.0 % | 1,000 |",
        "| SVHN | zero-shot | acc1 | 20.0 % | \N{EN DASH} | 1,000 |",
        "| DTD | zero-shot | acc1 | 30.0 % | 60.0 % | 1,000 |",
    ]


def test_curves_end_where_the_release_is(make_run):
    """A run that went on draws the same picture."""
    card(make_run("short"), "short")
    card(make_run("long", logged=(5, 10, 15)), "long")
    assert Path("short/curves.png").read_bytes() == Path("long/curves.png").read_bytes()


@pytest.mark.parametrize("missing", ["matplotlib", "metrics"])
def test_without_curves_there_is_no_link(make_run, monkeypatch, missing):
    checkpoint = make_run()
    if missing == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    else:
        (checkpoint.parents[1] / "metrics.jsonl").unlink()
    text = card(checkpoint)
    assert "curves" not in text
    assert not list(Path("out").glob("*.png"))
    assert "## Training: small, step 10" in text


def test_of_a_model_put_together_both_runs_are_told(make_run):
    """And no results: they are of neither."""
    image, text = make_run("a", kind="image alone"), make_run("b", kind="text alone")
    write_rows(image.parents[1] / "results.jsonl", [result("a", 10, 0.1)])
    found = card(image, text_from=str(text))
    assert [line for line in found.splitlines() if line.startswith(("## ", "!["))] == [
        "## Loading",
        "## Training: a, step 10",
        "![loss and temperature over steps](curves.png)",
        "## Training: b, step 10",
        "![loss and temperature over steps](curves_2.png)",
        "## Checked",
    ]


def test_what_the_hub_knows_is_linked(make_run):
    """Datasets, the teacher, and as base models those whose weights the student started from."""
    teachers = {"a": {"arch": "ViT-B-32", "pretrained": "openai"}, "b": {"arch": "hf/me/clip"}}
    sources = {"x": {"dataset": "nlphuji/flickr30k"}, "y": {"dataset": "runs/saved"}, "z": {"shards": "pairs"}}
    Path("runs/saved").mkdir(parents=True)
    given = {"teacher": None, "teachers": teachers, "data": {"dataset": None, "sources": sources}}
    text = card(make_run(**given))
    head = front_matter(text)
    assert head["datasets"] == ["nlphuji/flickr30k"]
    assert "base_model" not in head
    assert "(https://huggingface.co/timm/vit_base_patch32_clip_224.openai), [me/clip](https://" in text
    student = {"arch": "ViT-S-16", "init": "b"}
    assert front_matter(card(make_run("b", **given, student=student), "b"))["base_model"] == ["me/clip"]
    student = {"arch": "timm/resnet18", "pretrained": "default"}
    assert front_matter(card(make_run("c", student=student), "c"))["base_model"] == ["timm/resnet18.a1_in1k"]


def test_a_run_without_a_teacher_is_no_distillation(make_run):
    text = card(make_run(teacher=None))
    assert front_matter(text)["tags"] == ["clip", "kd_accel"]
    assert "Distilled" not in text


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"arch": "sentence/all-MiniLM-L6-v2"}, "sentence-transformers/all-MiniLM-L6-v2"),
        ({"arch": "ViT-B-32"}, None),
        ({"arch": "ViT-B-32", "pretrained": "weights/b32.pt"}, None),
        ({"arch": "timm/resnet18", "pretrained": "weights/r18.pth"}, None),
        ({"arch": "hf//models/bert"}, None),
        ({"arch": "ssl/auto", "pretrained": "moco.pth.tar"}, None),
        ({"arch": {"embed_dim": 8}}, None),
        ({"path": "runs/teacher"}, None),
        ({}, None),
    ],
)
def test_only_names_of_the_hub_are_linked(section, name):
    assert hub_name(section) == name


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://me:secret@host/a.tar", "s3://***@host/a.tar"),
        ("https://host/a.tar?v=1&X-Amz-Signature=secret", "https://host/a.tar?***"),
        ("pipe:curl -H 'Authorization: Bearer secret' http://host/a", "pipe:curl -H 'Authorization: Bearer ***' http://host/a"),
        ("hf_" + "secret" * 6, "***"),
        ("hf_model_name: bert-base, me@host, a?b", "hf_model_name: bert-base, me@host, a?b"),
    ],
)  # fmt: skip
def test_no_secret_of_a_config_is_in_it(make_run, given, kept):
    """Passwords and signatures of addresses, tokens of commands and of the Hub."""
    assert without_secrets(given) == kept
    text = card(make_run(data={"shards": given}))
    assert "secret" not in text
