"""Whether a benchmark became worse: python tests/benchmarks/compare.py OLD.json NEW.json

Two files of `kd-accel bench CONFIG output=FILE` on one machine, one soon after the other: machines differ more than
versions do. Ends with 1 when something is worse than 0.9 of what it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WORST = 0.9
MORE_IS_BETTER = ("samples_per_second",)
LESS_IS_BETTER = ("step_seconds", "peak_memory", "checkpoint_stall")


def ratios(old: dict, new: dict) -> dict[str, float]:
    """By name, above 1 where `new` is better."""
    found = {name: new[name] / old[name] for name in MORE_IS_BETTER if name in old and name in new}
    return found | {name: old[name] / new[name] for name in LESS_IS_BETTER if name in old and name in new}


def main(words: list[str]) -> int:
    if len(words) != 2:
        print(__doc__)
        return 2
    old, new = (json.loads(Path(word).read_text()) for word in words)
    found = ratios(old, new)
    for name, ratio in found.items():
        print(f"{name:20} {old[name]:14.6g} -> {new[name]:14.6g}   {ratio:5.2f}{'' if ratio >= WORST else '  WORSE'}")
    if not found:
        print(f"nothing to compare: neither file has any of {', '.join(MORE_IS_BETTER + LESS_IS_BETTER)}")
        return 2
    return int(min(found.values()) < WORST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
