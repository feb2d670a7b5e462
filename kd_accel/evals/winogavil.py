"""WinoGAViL (arXiv:2207.12576): which of the candidate images are associated with a cue? Scored as in DataComp.

The model picks as many candidates as there are associations; the score is the Jaccard index of the two sets. n images,
q questions, d embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor


@dataclass(frozen=True)
class Association:
    """One question: the images of the set, by index, among which the associations of the cue hide."""

    cue: str
    candidates: tuple[int, ...]
    associations: tuple[int, ...]
    """Some of the candidates."""


# metric -> of how many candidates
SPLITS: dict[str, Callable[[int], bool]] = {
    "avg_jaccard_score": lambda n: True,
    "jaccard_score_5": lambda n: n == 5,
    "jaccard_score_6": lambda n: n == 6,
    "jaccard_score_10": lambda n: n == 10,
    "jaccard_score_12": lambda n: n == 12,
    "jaccard_score_5-6": lambda n: n <= 6,
    "jaccard_score_10-12": lambda n: n >= 10,
}


def prompt(cue: str) -> str:
    """What stands for the cue before the text tower: "A werewolf", "An egg"; the cue in small letters."""
    cue = cue.lower()
    return f"{'An' if cue[:1] in tuple('aeiou') else 'A'} {cue}"


def evaluate_winogavil(
    images: Tensor, rows: Tensor, cues: Tensor, questions: Sequence[Association]
) -> dict[str, float | None]:
    """Mean Jaccard indices (0..1) by the number of candidates; None where no question has that many.

    images [n, d] with unit rows are those with the indices `rows` [n], the ones that could be read; cues [q, d] are the
    features of the questions' prompts. A question with an unreadable image is left out.
    """
    place = {row: index for index, row in enumerate(rows.tolist())}
    scores: list[tuple[int, float]] = []  # number of candidates, Jaccard index
    for cue, question in zip(cues, questions, strict=True):
        if all(candidate in place for candidate in question.candidates):
            shown = images[[place[candidate] for candidate in question.candidates]]
            scores.append((len(question.candidates), jaccard(shown @ cue, question)))
    return {name: _mean([score for n, score in scores if asked(n)]) for name, asked in SPLITS.items()}


def jaccard(similarities: Tensor, question: Association) -> float:
    """Intersection over union of the associations and as many best candidates, by `similarities` [candidates].

    Of equal similarities the earlier candidate is picked.
    """
    best = similarities.sort(descending=True, stable=True).indices[: len(question.associations)].tolist()
    picked = {question.candidates[index] for index in best}
    return len(picked & set(question.associations)) / len(picked | set(question.associations))


def _mean(scores: list[float]) -> float | None:
    return fmean(scores) if scores else None
