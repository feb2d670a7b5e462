"""Pictures keep peaks and gaps, tell runs apart, and stay small for long runs."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from kd_accel.report.pictures import (
    COLORS,
    DASHES,
    MAX_POINTS,
    Curve,
    Line,
    color,
    dash,
    inline_svg,
    thinned,
    write_png,
)

pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")


def path_of(svg: str, number: int = 0) -> str:
    """The drawn line of a run."""
    return re.search(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: {color(number)}', svg).group(1)


def test_a_long_line_keeps_its_peaks_and_ends():
    """Of 100,000 points a few hundred remain, with the single spike, the single dip, the first and the last."""
    x = np.arange(100_000)
    y = np.zeros(len(x))
    y[[31_234, 77_777]] = 5, -3
    thin_x, thin_y = thinned(x, y)
    assert len(thin_x) <= MAX_POINTS + 2
    assert {0, 31_234, 77_777, 99_999} <= set(thin_x.tolist())
    np.testing.assert_array_equal(thin_y, y[thin_x])
    assert (np.diff(thin_x) > 0).all()


def test_a_long_line_keeps_a_long_gap():
    y = np.ones(10_000)
    y[2_000:4_000] = np.nan
    _, thin_y = thinned(np.arange(len(y)), y)
    assert np.isnan(thin_y).any()
    assert not np.isnan(thin_y).all()


def test_a_short_line_is_drawn_as_it_is():
    x, y = np.arange(MAX_POINTS), np.random.default_rng(0).normal(size=MAX_POINTS)
    assert thinned(x, y)[0] is x


def test_a_value_that_is_not_finite_is_a_gap():
    """The line begins anew after it: two strokes for 1, 2, nan, 4, 5."""
    svg = inline_svg(Curve("loss", [Line("a", 0, np.arange(5), np.array([1, 2, np.nan, 4, 5]))]))
    assert path_of(svg).count("M") == 2


def test_a_point_between_gaps_is_seen():
    """It has no line to the left or to the right, so it is a dot."""
    values = np.array([np.nan, 1.0, np.nan])
    svg = inline_svg(Curve("loss", [Line("a", 0, np.arange(3), values)]))
    dots = re.search(rf'<g clip-path="[^"]*">\s*<use [^>]*style="fill: {color(0)}', svg)
    assert dots


def test_a_line_without_a_finite_value_is_said():
    curve = Curve("loss", [Line("a", 0, np.arange(2), np.array([np.nan, np.nan]))])
    inline_svg(curve)
    assert curve.words == "loss over steps. a: no finite value"


def test_a_long_run_has_a_small_picture():
    """100,000 logged steps: some tens of kB."""
    y = np.random.default_rng(0).normal(size=100_000)
    assert len(inline_svg(Curve("loss", [Line("a", 0, np.arange(len(y)), y)]))) < 50_000


def test_runs_look_different():
    """As many as there are colours and dashes."""
    several = len(COLORS) * len(DASHES)
    assert len({(color(i), dash(i)) for i in range(several)}) == several


def test_names_are_text_and_no_formulas(tmp_path):
    """A dollar sign in a run's name does not reach matplotlib's parser, and a long one leaves room for the curves."""
    curve = Curve(
        "a$\\frac{$" + "x" * 200, [Line(f"$\\x{i}$" + "y" * 200, i, np.arange(2), np.arange(2.0)) for i in range(2)]
    )
    write_png(curve, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (1160, 520)  # 5.8 x 2.6 inches of 200 dots
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_ids_of_two_pictures_differ():
    """They stand on one page, and a clip path found by id must be its own."""
    line = Line("a", 0, np.arange(3), np.arange(3.0))
    one, other = (set(re.findall(r' id="([^"]*)"', inline_svg(Curve(name, [line])))) for name in ("loss", "lr"))
    assert one
    assert one.isdisjoint(other)
