"""Predictions as a page to look at: every picture with a bar per text, in one HTML file that fetches nothing."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

from kd_accel.data.transforms import decode

if TYPE_CHECKING:
    from kd_accel.predict.verb import Guess, Prediction

SIDE = 320  # pixels of a picture's longer side
STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --quiet: #57606a; --page: #fff; --panel: #f6f7f9; --bar: #2b7bba }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --quiet: #a3acb8; --page: #15181c; --panel: #1e2227; --bar: #4a9ad4 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1200px; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; margin: 0 0 1rem; overflow-wrap: anywhere }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 1rem }
article { background: var(--panel); border-radius: 8px; padding: .8rem; min-width: 0 }
img { display: block; max-width: 100%; max-height: 240px; margin: 0 auto .6rem; border-radius: 4px }
h2 { font-size: .85rem; font-weight: 400; color: var(--quiet); margin: 0 0 .4rem; overflow-wrap: anywhere }
ol { list-style: none; margin: 0; padding: 0 }
li { margin: .35rem 0 0 }
.words { display: flex; justify-content: space-between; gap: 1rem }
.words span:first-child { min-width: 0; overflow-wrap: anywhere }
.bar { height: 6px; border-radius: 3px; background: var(--bar); min-width: 1px }
"""


def page(title: str, predictions: list[Prediction]) -> str:
    """One HTML document without script; texts and paths are escaped."""
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n"
        f"<main>{''.join(map(_article, predictions))}</main>\n</body></html>\n"
    )


def _article(prediction: Prediction) -> str:
    best = html.escape(prediction.guesses[0].text)
    rows = "".join(map(_row, prediction.guesses))
    return (
        f'<article><img src="data:image/jpeg;base64,{_picture(prediction.image)}" alt="{best}">'
        f"<h2>{html.escape(prediction.image)}</h2><ol>{rows}</ol></article>\n"
    )


def _row(guess: Guess) -> str:
    share = f"{100 * guess.probability:.1f}"
    return (
        f"<li><div class=words><span>{html.escape(guess.text)}</span><span>{share}&nbsp;%</span></div>"
        f'<div class=bar style="width:{share}%"></div></li>'
    )


def _picture(path: str) -> str:
    """A small JPEG as base64."""
    with open(path, "rb") as file:
        image = decode(file.read())
    image.thumbnail((SIDE, SIDE))
    small = io.BytesIO()
    image.save(small, "JPEG", quality=85)
    return base64.b64encode(small.getvalue()).decode("ascii")
