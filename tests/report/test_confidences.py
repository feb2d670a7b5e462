"""What training remembers of the teacher's confidence is a histogram per teacher, of the newest checkpoint."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from report_run import make_run, report
from safetensors import torch as torch_file
from safetensors.numpy import save_file

from kd_accel.config import ObjectiveConfig
from kd_accel.memory_files import NAME, memory_snapshot
from kd_accel.objective import Objective
from kd_accel.report.pictures import COLORS
from kd_accel.schema import validate
from kd_accel.types import TeacherSpec

pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")
CONFIDENCE = "Confidence of the teacher"


def add_checkpoint(folder, *, step=3, parts=1, **confidences):
    """The files of a checkpoint that the report reads, and their folder: teacher -> alpha by sample id, in `parts`."""
    state = folder / f"checkpoints/step_{step:08d}/state"
    state.mkdir(parents=True)
    for part in range(parts if confidences else 0):
        columns = {
            f"confidences.{teacher}.alpha": np.array_split(np.float32(alpha), parts)[part]
            for teacher, alpha in confidences.items()
        }
        save_file({"recall.gcl.memory.log_u_image": columns[min(columns)], **columns}, state / NAME.format(part, parts))
    (state / "progress.json").write_text("{}")
    (folder / "checkpoints/latest").write_text(state.parent.name)
    return state


def test_confidences_of_the_seen_samples_are_counted(tmp_path):
    """A histogram per teacher, an outline per run that knows it; samples that were never seen do not count."""
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    some, all_seen = [0.25, np.nan, 0.75, np.nan], [0.125, 0.375]
    add_checkpoint(first, small=some, large=some)
    add_checkpoint(second, large=all_seen)
    section = report(tmp_path, first, second).section(CONFIDENCE)
    assert re.findall(r"<figcaption>(.*?)</figcaption>", section) == [
        f"large<br>a: 2 of 4 samples seen, mean {np.nanmean(some)}<br>b: 2 of 2 samples seen, mean {np.mean(all_seen)}",
        f"small<br>a: 2 of 4 samples seen, mean {np.nanmean(some)}",
    ]
    panels = re.findall(r"<svg.*?</svg>", section, flags=re.DOTALL)
    assert [[color in panel for color in COLORS[:2]] for panel in panels] == [[True, True], [True, False]]


def test_a_histogram_shows_where_the_confidences_lie(tmp_path):
    """Samples of two confidences make two bars as high as their shares, 1 to 3, at the bins of 0..1 they fall in."""
    folder = make_run(tmp_path / "a")
    add_checkpoint(folder, teacher=[0.1, 0.9, 0.9, 0.9])
    section = report(tmp_path, folder).section(CONFIDENCE)
    outline = re.search(rf'<path d="([^"]*)"[^>]*style="[^"]*{COLORS[0]}', section).group(1)
    points = np.array([[float(n) for n in point.split()] for point in re.findall(r"[ML] ([-\d. ]+)", outline)])
    x, height = points[:, 0], points[:, 1].max() - points[:, 1]
    (low, high) = (height[(x - x[0]) / (x[-1] - x[0]) < middle].max() for middle in (0.5, 1.0))
    np.testing.assert_allclose(high / low, 3, rtol=1e-3)
    np.testing.assert_allclose((x[height == high].mean() - x[0]) / (x[-1] - x[0]), 0.9, atol=1 / 40)


def test_the_newest_checkpoint_is_the_one_that_is_shown(tmp_path):
    folder = make_run(tmp_path / "a")
    add_checkpoint(folder, step=2, teacher=[0.25, np.nan])
    add_checkpoint(folder, step=3, teacher=[0.25, 0.75])
    assert "2 of 2 samples seen, mean 0.5<" in report(tmp_path, folder).source


def test_the_parts_of_all_ranks_are_one_histogram(tmp_path):
    """Sharded memory is saved by each rank, the last of which holds fewer samples."""
    folder = make_run(tmp_path / "a")
    add_checkpoint(folder, parts=2, teacher=[0.25, np.nan, 0.75])
    assert "2 of 3 samples seen, mean 0.5<" in report(tmp_path, folder).source


def test_what_the_objective_remembers_is_what_is_shown(tmp_path):
    """The names in the file are the objective's own."""
    config = validate(ObjectiveConfig, {"terms": {"kl": {"kind": "logit_kl", "confidence": True}}})
    objective = Objective(config, teachers={"big": TeacherSpec(embed_dim=4, logit_scale=100.0)}, num_ids=5)
    objective.confidences["big"].write(torch.tensor([1, 3]), {"alpha": torch.tensor([0.25, 0.75])})
    folder = make_run(tmp_path / "a")
    ((name, columns),) = memory_snapshot(objective).items()
    torch_file.save_file(columns, add_checkpoint(folder) / name)
    assert "big<br>a: 2 of 5 samples seen, mean 0.5<" in report(tmp_path, folder).source


def test_a_memory_that_saw_nothing_has_no_mean(tmp_path):
    """A checkpoint from before the first step is not a reason to stop."""
    folder = make_run(tmp_path / "a")
    add_checkpoint(folder, teacher=[np.nan, np.nan])
    assert "<br>a: 0 of 2 samples seen</figcaption>" in report(tmp_path, folder).source


def test_runs_without_confidences_have_no_section_for_them(tmp_path):
    """Neither a run without a checkpoint, nor one whose terms weigh no samples."""
    plain, saved = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    add_checkpoint(saved)
    assert CONFIDENCE not in report(tmp_path, plain, saved).source


@pytest.mark.parametrize("how", ["gone", "cut short", "something else"])
def test_a_checkpoint_that_cannot_be_read_is_named(how, tmp_path):
    """The report goes on with the other run, and says which run lacks what."""
    whole, damaged = make_run(tmp_path / "whole"), make_run(tmp_path / "damaged")
    add_checkpoint(whole, teacher=[0.25, 0.75])
    file = add_checkpoint(damaged, parts=2, teacher=[0.25, 0.75]) / NAME.format(1, 2)
    match how:
        case "gone":
            file.unlink()
        case "cut short":
            file.write_bytes(file.read_bytes()[:-1])
        case "something else":
            file.write_text("{}")
    section = report(tmp_path, whole, damaged).section(CONFIDENCE)
    assert "No readable <code>state/memory_*.safetensors</code> in the newest checkpoint of damaged:" in section
    assert "whole: 2 of 2 samples seen" in section
    assert "damaged: 2 of 2" not in section
