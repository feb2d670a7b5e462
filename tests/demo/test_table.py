"""The table of the demo."""

from __future__ import annotations

import statistics

from kd_accel.demo.table import Row, table


def test_the_table_gives_mean_and_deviation_over_seeds():
    """One seed is a number, several are mean +- sample standard deviation; columns line up."""
    seeds = [0.5, 0.6, 0.7]
    one = Row("teacher", 13_000_000, [0.9], [0.8], [0.7], [300.0])
    three = Row("student", 2_000_000, seeds, seeds, seeds, [500.0])
    lines = table([one, three]).strip().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "90.0 %" in lines[2]
    assert f"{100 * statistics.mean(seeds):.1f} +- {100 * statistics.stdev(seeds):.1f} %" in lines[3]
