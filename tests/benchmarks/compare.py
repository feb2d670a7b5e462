"""Whether a benchmark became worse: python tests/benchmarks/compare.py OLD.json NEW.json

Two files of `kd-accel bench CONFIG output=FILE`, or of a script here with `--output FILE`, on one machine, one soon
after the other: machines differ more than versions do. The end of a number's name says what is better, and other
numbers are not compared. Ends with 1 when something is worse than 0.9 of what it was, or is not in the new file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WORST = 0.9
MORE_IS_BETTER = ("_per_second", "speedup", "ratio", "efficiency")
LESS_IS_BETTER = ("seconds", "bytes", "_mib", "peak_memory", "checkpoint_stall")


def numbers(node: object, path: str = "") -> dict[str, float]:
    """By path, "case.seconds": all that say what is better, and are more than 0."""
    if isinstance(node, dict | list):
        parts = node.items() if isinstance(node, dict) else enumerate(node)
        inner = [numbers(part, f"{path}.{name}" if path else str(name)) for name, part in parts]
        return {name: value for found in inner for name, value in found.items()}
    compared = path.endswith(MORE_IS_BETTER + LESS_IS_BETTER) and isinstance(node, int | float) and node > 0
    return {path: node} if compared else {}


def better(path: str, old: float, new: float) -> float:
    """Above 1 where `new` is better."""
    return new / old if path.endswith(MORE_IS_BETTER) else old / new


def main(words: list[str]) -> int:
    if len(words) != 2:
        print(__doc__)
        return 2
    old, new = (numbers(json.loads(Path(word).read_text())) for word in words)
    if not old:
        print(f"nothing to compare: no name in {words[0]} ends in {', '.join(MORE_IS_BETTER + LESS_IS_BETTER)}")
        return 2
    worse = False
    for path, value in old.items():
        ratio = better(path, value, new[path]) if path in new else 0.0
        worse |= ratio < WORST
        now = f"{new[path]:14.6g}" if path in new else f"{'missing':>14}"
        print(f"{path:44} {value:14.6g} -> {now}   {ratio:5.2f}{'' if ratio >= WORST else '  WORSE'}")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
