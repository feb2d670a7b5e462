"""Lines of all ranks as few lines."""

from __future__ import annotations

import pytest

from kd_accel.doctor.findings import Finding, checked, named, together
from kd_accel.schema import ConfigError

GOOD = Finding("ok", "data", "there")
BAD = Finding("FAIL", "data", "gone")


def test_what_all_find_is_one_line():
    assert together([[GOOD], [GOOD]]) == [GOOD]


def test_what_some_find_names_them():
    assert together([[GOOD], [BAD], [BAD]]) == [
        Finding("ok", "data", "rank 0: there"),
        Finding("FAIL", "data", "ranks 1-2: gone"),
    ]


def test_what_one_alone_looks_at_is_not_its_own():
    """The disk is looked at by the main rank."""
    disk = Finding("ok", "disk", "room")
    assert together([[GOOD, disk], [GOOD]]) == [GOOD, disk]


@pytest.mark.parametrize(
    ("ranks", "words"), [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([1, 3, 4], "ranks 1, 3-4")]
)
def test_ranks_in_words(ranks, words):
    assert named(ranks) == words


def test_every_line_of_an_error_is_a_failure():
    """Without the name twice."""

    def check():
        raise ConfigError("hub: no token\nhub: no room")

    assert checked("hub", check) == [Finding("FAIL", "hub", "no token"), Finding("FAIL", "hub", "no room")]


def test_our_own_mistakes_are_none_of_the_users():
    def check():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        checked("hub", check)


def test_a_finding_is_a_line():
    assert str(BAD) == "FAIL  data: gone"
    assert str(GOOD) == "ok    data: there"
