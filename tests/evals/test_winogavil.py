"""WinoGAViL's scores are the mean Jaccard indices of the picked and the true associations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score

from kd_accel.evals.tasks import TASKS
from kd_accel.evals.winogavil import Association, evaluate_winogavil, jaccard, prompt


def test_prompts_are_in_small_letters_with_their_article():
    assert [prompt(cue) for cue in ("Werewolf", "egg", "Ice cream", "hour")] == [
        "A werewolf",
        "An egg",
        "An ice cream",
        "A hour",
    ]


def questions_of(sizes: list[int], num_images: int) -> list[Association]:
    """Questions over random candidates with two to four associations."""
    made = []
    for i, size in enumerate(sizes):
        candidates = torch.randperm(num_images)[:size].tolist()
        made.append(Association(f"cue {i}", tuple(candidates), tuple(candidates[1 : 3 + i % 3])))
    return made


def test_scores_equal_scikit_learn_by_number_of_candidates():
    """A loop over the questions with scikit-learn's jaccard_score, and numpy's argsort to pick."""
    sizes = [5, 6, 10, 12] * 6
    images, cues = (F.normalize(torch.randn(rows, 16), dim=-1) for rows in (40, len(sizes)))
    questions = questions_of(sizes, 40)
    metrics = evaluate_winogavil(images, torch.arange(40), cues, questions)

    scores = []
    for cue, question in zip(cues, questions, strict=True):
        truth = torch.tensor([c in question.associations for c in question.candidates])
        best = (images[list(question.candidates)] @ cue).numpy().argsort()[-int(truth.sum()) :]
        picked = torch.zeros(len(truth), dtype=torch.bool)
        picked[best] = True
        scores.append(jaccard_score(truth, picked))
    scores, sizes = torch.tensor(scores, dtype=torch.float64), torch.tensor(sizes)
    expected = {"avg_jaccard_score": scores.mean().item()}
    expected |= {f"jaccard_score_{size}": scores[sizes == size].mean().item() for size in (5, 6, 10, 12)}
    expected |= {"jaccard_score_5-6": scores[sizes < 7].mean().item()}
    expected |= {"jaccard_score_10-12": scores[sizes > 7].mean().item()}
    assert metrics == pytest.approx(expected)
    assert 0 < metrics[TASKS["misc/winogavil"].main_metric] < 1


def test_equal_similarities_go_to_the_earlier_candidate():
    question = Association("cue", candidates=(7, 8, 9), associations=(8, 7))
    assert jaccard(torch.zeros(3), question) == 1


def test_a_question_with_an_unreadable_image_is_left_out():
    """The other questions keep their scores though the indices of images have moved."""
    images, cues = (F.normalize(torch.randn(rows, 8), dim=-1) for rows in (14, 4))
    questions = [question for question in questions_of([5] * 30, 14) if 3 not in question.candidates][:3]
    whole = evaluate_winogavil(images, torch.arange(14), cues[:3], questions)
    rows = torch.tensor([row for row in range(14) if row != 3])
    with_bad = [*questions, Association("bad", (3, 0, 1, 2, 4), (3, 0))]
    assert evaluate_winogavil(images[rows], rows, cues, with_bad) == whole
    assert whole["jaccard_score_5"] == whole["avg_jaccard_score"]


def test_without_questions_of_a_size_there_is_no_score():
    images = F.normalize(torch.randn(6, 8), dim=-1)
    metrics = evaluate_winogavil(images, torch.arange(6), images[:1], questions_of([5], 6))
    assert metrics["jaccard_score_10-12"] is None
    assert metrics["jaccard_score_12"] is None
