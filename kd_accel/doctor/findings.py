"""What was found: one line each, those of all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kd_accel import distributed
from kd_accel.schema import ConfigError


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: Literal["ok", "warn", "FAIL"]  # as it should be; training runs all the same; it does not
    what: str  # what was looked at
    said: str  # what was seen; unless ok, with what to do

    def __str__(self) -> str:
        return f"{self.status:4}  {self.what}: {self.said}"


def checked(what: str, check: Callable[[], str | Finding]) -> list[Finding]:
    """What `check` says of `what`; each line of a ConfigError, or an OSError, is a failure."""
    try:
        said = check()
    except (ConfigError, OSError) as error:
        return [Finding("FAIL", what, line.removeprefix(f"{what}: ")) for line in str(error).splitlines()]
    return [said if isinstance(said, Finding) else Finding("ok", what, said)]


def of_all_ranks(findings: list[Finding]) -> list[Finding]:
    """Every rank's; what not all who looked at it found alike begins with those that did. Collective."""
    return together(distributed.gather_objects(findings))


def together(by_rank: Sequence[list[Finding]]) -> list[Finding]:
    """As of_all_ranks, of what every rank found."""
    looked: dict[str, list[int]] = {}
    found: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for what in dict.fromkeys(finding.what for finding in findings):
            looked.setdefault(what, []).append(rank)
        for finding in dict.fromkeys(findings):
            found.setdefault(finding, []).append(rank)
    return [
        finding if ranks == looked[finding.what] else replace(finding, said=f"{named(ranks)}: {finding.said}")
        for finding, ranks in found.items()
    ]


def named(ranks: list[int]) -> str:
    """[0, 1, 2, 5] as "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(spans)}"
