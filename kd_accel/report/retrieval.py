"""What the models find: pictures for captions and captions for pictures, of each retrieval set, right and wrong ones.

kd_accel.evals.examples writes what is shown here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kd_accel.report.page import Section, escape, fold, note, swatch
from kd_accel.report.runs import Run

QUERIES = 4  # of a set, each way
MODELS = 4  # of whom pictures are shown: a page of megabytes is read by nobody

Example = dict[str, Any]
Shown = tuple[Run, dict[str, Any]]  # a run and its examples of one set


def retrieval_sections(runs: list[Run]) -> list[Section]:
    """One section, or none where no run has examples."""
    sets: dict[str, list[Shown]] = {}
    for run in runs:
        for examples in run.examples:
            sets.setdefault(examples["dataset"], []).append((run, examples))
    if not sets:
        return []
    content = "".join(fold(name, _set(shown[:MODELS])) for name, shown in sets.items())
    content = content.replace("<details>", "<details open>", 1)
    words = "Queries lie evenly spaced in the set; answers come by score, the cosine. &#10003; right, &#10007; wrong."
    few = f" Of the first {MODELS} runs that have examples." if max(map(len, sets.values())) > MODELS else ""
    return [Section("Retrieval examples", note(words + few) + content)]


def _set(shown: list[Shown]) -> str:
    by_caption = "".join(_image_query(*query) for query in _together(shown, "image_retrieval"))
    by_image = "".join(_text_query(*query) for query in _together(shown, "text_retrieval"))
    halves = {"Pictures for a caption": by_caption, "Captions for a picture": by_image}
    return "".join(f"<h3>{title}</h3><div class=pairs>{queries}</div>" for title, queries in halves.items())


def _together(shown: list[Shown], way: str) -> Iterable[tuple[str, list[tuple[Shown, Example]]]]:
    """The first QUERIES queries of any run, each with the runs that were asked it."""
    queries: dict[str, list[tuple[Shown, Example]]] = {}
    for run, examples in shown:
        for example in examples[way]:
            queries.setdefault(example["query"], []).append(((run, examples), example))
    return list(queries.items())[:QUERIES]


def _image_query(caption: str, asked: list[tuple[Shown, Example]]) -> str:
    rows = (f"<div class=answers>{_who(run, it)}{_pictures(examples, it)}</div>" for (run, examples), it in asked)
    (_, examples), first = asked[0]
    return _query(caption, _picture(examples, first["wanted"]), "".join(rows))


def _text_query(key: str, asked: list[tuple[Shown, Example]]) -> str:
    rows = (f"<div>{_who(run, example)}{_captions(example)}</div>" for (run, _), example in asked)
    (_, examples), _ = asked[0]
    return _query(examples["pictures"][key]["caption"], _picture(examples, key), "".join(rows))


def _query(caption: str, picture: str, answers: str) -> str:
    return (
        f"<article class=query><h4>{escape(caption)}</h4><div class=found>{picture}<div>{answers}</div></div></article>"
    )


def _who(run: Run, example: Example) -> str:
    found = any(answer["right"] for answer in example["answers"])
    place = "" if found else f"<small>right one at place {example['place']:,}</small>"
    return f"<p class=who>{swatch(run.number)}{escape(run.name)}{place}</p>"


def _pictures(examples: dict[str, Any], example: Example) -> str:
    shown = ((_class(answer), _picture(examples, answer["picture"]), _mark(answer)) for answer in example["answers"])
    return "".join(f'<div class="answer {kind}">{picture}<span>{mark}</span></div>' for kind, picture, mark in shown)


def _captions(example: Example) -> str:
    lines = (
        f"<li class={_class(answer)}><span>{_mark(answer)}</span> {escape(answer['caption'])}</li>"
        for answer in example["answers"]
    )
    return f"<ul class=captions>{''.join(lines)}</ul>"


def _picture(examples: dict[str, Any], key: str) -> str:
    picture = examples["pictures"][key]
    return f'<img src="data:image/jpeg;base64,{escape(picture["jpeg"])}" alt="{escape(picture["caption"])}">'


def _mark(answer: Example) -> str:
    return f"{'&#10003;' if answer['right'] else '&#10007;'} {answer['score']:.2f}"


def _class(answer: Example) -> str:
    return "right" if answer["right"] else "wrong"
