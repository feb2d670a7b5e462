"""kd-accel train in one process, end to end: what a run writes, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tarfile
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from kd_accel import assembly, checkpoint, saver
from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.models.release_folder import resolve_release
from kd_accel.models.scale import Scale
from kd_accel.schema import ConfigError, validate
from kd_accel.train import Trainer, run


@pytest.fixture
def config(tmp_path, train_shards, tiny_teacher):
    """A function that makes the config of a run of two epochs; keyword arguments replace whole sections."""

    def make(**changes) -> TrainConfig:
        values = {
            "name": "run",
            "output_dir": str(tmp_path),
            "precision": "fp32",
            "data": {"shards": str(train_shards), "batch_size": 8, "num_workers": 0},
            "student": {"arch": tiny.arch(), "projector": "linear"},
            "teacher": {"path": str(tiny_teacher)},
            "objective": {"terms": {"clip": {"kind": "clip"}, "feature": {"kind": "feature_mse", "confidence": True}}},
            "optim": {"lr": 1e-2, "epochs": 2},
            "log": {"every_steps": 1},
        }
        return validate(TrainConfig, values | changes)

    return make


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_writes_everything(config, tmp_path):
    """Six epochs of 5 steps: the loss falls, the temperature moves, every file is there, the last checkpoint whole."""
    run(config(optim={"lr": 1e-2, "epochs": 6}))
    folder = tmp_path / "run"
    history = rows(folder)
    assert [row["step"] for row in history] == list(range(1, 31))
    assert sum(row["loss"] for row in history[-5:]) < sum(row["loss"] for row in history[:5])
    for name in ("loss/clip", "loss/feature", "confidence", "lr", "grad_norm", "samples_per_second", "data_wait"):
        assert name in history[0]
    assert history[-1]["temperature"] != history[0]["temperature"]
    for name in ("config.yaml", "environment.json", "out.log", "checkpoints/latest"):
        assert (folder / name).is_file()
    latest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    assert latest.name == "step_00000030"
    assert (latest / "student" / "open_clip_model.safetensors").is_file()
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_00000025", "step_00000030"]  # save.keep_last = 2, one per epoch


def test_resolved_config_reruns_the_run(config, tmp_path):
    """The config.yaml of a run is a complete config of the same run."""
    from kd_accel.config_files import load

    wanted = config(optim={"lr": 1e-2, "steps": 1})
    run(wanted)
    assert load(TrainConfig, [tmp_path / "run" / "config.yaml"]) == wanted


def test_teacher_is_in_no_checkpoint(config, tmp_path):
    """Neither weights nor release hold a tensor of the teacher, and the release holds no projector."""
    run(config(optim={"lr": 1e-2, "steps": 1}))
    state = load_file(tmp_path / "run/checkpoints/step_00000001/state/weights.safetensors")
    assert {name.split(".")[0] for name in state} == {"clip", "projector"}
    release = load_file(tmp_path / "run/checkpoints/step_00000001/student/open_clip_model.safetensors")
    assert not [name for name in release if "projector" in name or "teacher" in name]


@pytest.mark.parametrize("placement", ["engine", "replicated"])
def test_placements_train_alike(config, tmp_path, tiny_teacher, placement):
    """Inside or outside the engine the frozen teacher says the same: equal losses and weights."""
    teacher = {"path": str(tiny_teacher), "placement": placement}
    run(config(name="other", teacher=teacher, optim={"lr": 1e-2, "steps": 3}))
    run(config(name="engine", optim={"lr": 1e-2, "steps": 3}))
    state = "checkpoints/step_00000003/state/weights.safetensors"
    ours, theirs = load_file(tmp_path / "other" / state), load_file(tmp_path / "engine" / state)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_gradient_checkpointing_changes_nothing(config, tmp_path):
    """Recomputed activations give the weights that stored ones give."""
    student = {"arch": tiny.arch(), "projector": "linear"}
    run(config(name="stored", optim={"lr": 1e-2, "steps": 2}))
    run(config(name="recomputed", optim={"lr": 1e-2, "steps": 2}, student=student | {"grad_checkpointing": True}))
    state = "checkpoints/step_00000002/state/weights.safetensors"
    stored, recomputed = load_file(tmp_path / "stored" / state), load_file(tmp_path / "recomputed" / state)
    for name in stored:
        torch.testing.assert_close(recomputed[name], stored[name])


def test_bf16_trains_near_fp32(config, tmp_path):
    """bf16 towers, fp32 losses: the first loss is that of fp32 up to bf16's three digits."""
    for precision in ("fp32", "bf16"):
        run(config(name=precision, precision=precision, optim={"lr": 1e-3, "steps": 2}))
    first = {name: rows(tmp_path / name)[0]["loss/clip"] for name in ("fp32", "bf16")}
    assert first["bf16"] != first["fp32"]
    assert first["bf16"] == pytest.approx(first["fp32"], rel=2**-7)


def test_siglip_needs_no_teacher(config, tmp_path):
    """SigLIP alone trains, its bias moves and is part of the release."""
    objective = {"terms": {"s": {"kind": "siglip"}}, "logit_bias": -10.0, "temperature": {"init": 0.1}}
    student = {"arch": tiny.arch()}
    run(config(teacher=None, student=student, objective=objective, optim={"lr": 1e-2, "steps": 3}))
    release = load_file(tmp_path / "run/checkpoints/step_00000003/student/open_clip_model.safetensors")
    assert release["logit_bias"].item() != -10.0


def test_pretrained_student_keeps_its_temperature(config, tmp_path, tiny_teacher):
    """temperature.init=null starts from the scale that came with the weights; a number replaces it."""
    weights = load_file(tiny_teacher / "open_clip_model.safetensors")
    weights["logit_scale"] = torch.tensor(math.log(1 / 0.03))
    save_file(weights, tmp_path / "trained.safetensors")
    student = {"arch": tiny.arch(24, 12), "pretrained": str(tmp_path / "trained.safetensors")}
    run(config(name="own", student=student, optim={"lr": 1e-2, "steps": 1}))
    assert rows(tmp_path / "own")[0]["temperature"] == pytest.approx(0.03)
    objective = {"terms": {"clip": {"kind": "clip"}, "kl": {"kind": "logit_kl"}}, "temperature": {"init": 0.1}}
    run(config(name="given", student=student, objective=objective, optim={"lr": 1e-2, "steps": 1}))
    assert rows(tmp_path / "given")[0]["temperature"] == pytest.approx(0.1)


def test_a_tower_that_no_term_reads_stays_as_it_is(config, tmp_path, tiny_teacher):
    """Weight decay would take it to zero: bit for bit the pretrained one, also after a resume, and the log says so."""
    start = tiny_teacher / "open_clip_model.safetensors"
    values = {
        "student": {"arch": tiny.arch(24, 12), "pretrained": str(start)},
        "objective": {"terms": {"image": {"kind": "embedding_mse", "match": {"image": "image"}}}},
        "save": {"every_steps": 1, "keep_last": 9},
    }
    optim = {"lr": 1e-2, "weight_decay": 0.5}
    run(config(**values, optim=optim | {"steps": 2}))
    run(config(**values, optim=optim | {"steps": 3}, resume="auto"))
    before = load_file(start)
    after = load_file(tmp_path / "run/checkpoints/step_00000003/student/open_clip_model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed - {"logit_scale"} == {name for name in before if name.startswith("visual.")}
    moments = state_of(tmp_path / "run")["exp_avg.safetensors"]
    assert {name.split(".")[1] for name in moments} == {"visual"}
    said = "frozen, because no term of the objective reads what it says: text tower\n"
    assert said in (tmp_path / "run" / "out.log").read_text()


@pytest.mark.parametrize(("asked", "expected"), [(None, -12.9), (-10.0, -10.0)], ids=["own", "given"])
def test_pretrained_student_keeps_its_bias(config, tmp_path, tiny_teacher, asked, expected):
    """objective.logit_bias=null starts from the weights' own; a number replaces it, and the log says so."""
    weights = load_file(tiny_teacher / "open_clip_model.safetensors")
    weights |= {"logit_scale": torch.tensor(math.log(117.3)), "logit_bias": torch.tensor(-12.9)}
    save_file(weights, tmp_path / "siglip.safetensors")
    run(
        config(
            student={"arch": tiny.arch(24, 12), "pretrained": str(tmp_path / "siglip.safetensors")},
            teacher=None,
            objective={"terms": {"s": {"kind": "siglip"}}, "logit_bias": asked},
            optim={"lr": 1e-12, "steps": 1},  # so that the release has what it started with
        )
    )
    release = load_file(tmp_path / "run/checkpoints/step_00000001/student/open_clip_model.safetensors")
    assert release["logit_bias"].item() == pytest.approx(expected)
    said = (tmp_path / "run" / "out.log").read_text()
    assert ("objective.logit_bias=-10 replaces the student's own, -12.9" in said) == (asked is not None)
    assert "own temperature, 0.008525, is held at 0.01: objective.temperature.min=0.01" in said


def test_what_a_student_brings_is_not_worth_a_line_when_it_stays(config, tiny_teacher):
    """CLIP's own scale of 100 is the bound itself, up to fp32; the same bias twice is no change."""
    own = Scale(torch.tensor(math.log(100)).item(), -10.0)
    student = SimpleNamespace(frozen=[], locked=[], inherited=[], sparse=None, scale=own, modules=list)
    objective = {"terms": {"s": {"kind": "siglip"}}, "logit_bias": -10.0}
    assert assembly.remarks(config(teacher=None, objective=objective), student) == []


def test_bias_that_no_term_uses_is_released_as_it_came(config, tmp_path, tiny_teacher):
    """A SigLIP student that goes on with InfoNCE."""
    weights = load_file(tiny_teacher / "open_clip_model.safetensors") | {"logit_bias": torch.tensor(-12.9)}
    save_file(weights, tmp_path / "siglip.safetensors")
    student = {"arch": tiny.arch(24, 12), "pretrained": str(tmp_path / "siglip.safetensors")}
    run(
        config(student=student, teacher=None, objective={"terms": {"c": {"kind": "clip"}}}, optim={"lr": 1, "steps": 1})
    )
    release = load_file(tmp_path / "run/checkpoints/step_00000001/student/open_clip_model.safetensors")
    assert release["logit_bias"] == torch.tensor(-12.9)


# What it refuses ------------------------------------------------------------------------------------------------------


def test_existing_run_is_refused(config, tmp_path):
    """resume=never keeps its hands off a run, and says how to go on."""
    run(config(optim={"lr": 1e-2, "steps": 1}))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"this run exists; resume=auto goes on"):
        run(config(optim={"lr": 1e-2, "steps": 1}))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("source", ["shards", "table", "folder"])
def test_data_that_is_not_there_is_said_before_a_teacher_is_fetched(source, config, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(assembly, "build_teachers", lambda config: fetched.append(config))
    with pytest.raises(ConfigError, match=rf"data.{source}.*gone.csv"):
        run(config(data={source: str(tmp_path / "gone.csv"), "batch_size": 8}))
    assert not fetched
    assert not (tmp_path / "run").exists()


def test_widths_that_differ_need_a_projector(config, tmp_path):
    """A term on features of two widths names itself, both widths and the key, and nothing is written."""
    message = r"objective.terms.feature .*8 wide.*12 wide.*student.projector=linear"
    with pytest.raises(ConfigError, match=message):
        run(config(student={"arch": tiny.arch()}))
    assert not (tmp_path / "run").exists()


def test_resume_refuses_another_student_and_another_batch(config):
    """Every key that disagrees is named with both values."""
    run(config(optim={"lr": 1e-2, "steps": 1}))
    changed = config(
        resume="auto",
        data={"shards": config().data.shards, "batch_size": 4, "num_workers": 0},
        objective={"terms": {"clip": {"kind": "clip", "weight": 2.0}, "feature": {"kind": "feature_mse"}}},
    )
    with pytest.raises(ConfigError) as caught:
        run(changed)
    text = str(caught.value)
    assert "objective.terms.clip.weight: the checkpoint has 1.0, the config 2.0" in text
    assert "objective.terms.feature.confidence: the checkpoint has True, the config False" in text
    assert "global_batch_size: the checkpoint has 8, this launch makes 4" in text


def test_resume_goes_on_with_a_longer_run(config, tmp_path):
    """A run of 2 steps goes on to 4 when optim.steps says so; each step is in the log once."""
    run(config(optim={"lr": 1e-2, "steps": 2}))
    run(config(optim={"lr": 1e-2, "steps": 4}, resume="auto"))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert "changed: optim.steps: 2 -> 4" in (tmp_path / "run" / "out.log").read_text()


@pytest.mark.parametrize("term", [{"kind": "clip"}, {"kind": "global_contrastive"}], ids=lambda term: term["kind"])
def test_resume_refuses_other_data(config, tmp_path, term):
    """Shards that have grown: one line, whether or not a term remembers samples by their number."""
    shards = tiny.write_shards(tmp_path / "shards", per_shard=8)
    values = {"data": {"shards": str(shards), "batch_size": 8, "num_workers": 0}, "objective": {"terms": {"x": term}}}
    values |= {"teacher": None, "student": {"arch": tiny.arch()}, "optim": {"lr": 1e-2, "steps": 1}}
    run(config(**values))
    shutil.rmtree(shards)
    tiny.write_shards(shards, per_shard=9)
    with pytest.raises(ConfigError, match=r"^data: .*num_samples=16, this run has num_samples=18"):
        run(config(**values, resume="auto"))


def test_damaged_checkpoint_is_named(config, tmp_path):
    """A truncated file in the newest checkpoint is a clear error, not a traceback."""
    run(config(optim={"lr": 1e-2, "steps": 1}))
    file = tmp_path / "run/checkpoints/step_00000001/state/exp_avg.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ConfigError, match=r"step_00000001: not a whole checkpoint"):
        run(config(optim={"lr": 1e-2, "steps": 2}, resume="auto"))


def test_too_many_bad_samples_stop_the_run(config, tmp_path, train_shards):
    """Above data.max_bad_fraction the run ends with one line that names the share, the sample and the list."""
    shards = tmp_path / "bad"
    shutil.copytree(train_shards, shards)
    with tarfile.open(shards / "00000.tar") as tar:
        member = next(m for m in tar if m.name.endswith(".jpg"))
    with open(shards / "00000.tar", "r+b") as file:
        file.seek(member.offset_data)
        file.write(b"\0" * 64)  # no JPEG any more; sizes, and so the index, stay
    data = {"shards": str(shards), "batch_size": 8, "num_workers": 0, "max_bad_fraction": 0.0}
    with pytest.raises(
        ConfigError, match=r"max_bad_fraction=0.0 allows fewer than the 1 unreadable .*000000.*bad_samples"
    ):
        run(config(data=data))
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert record["id"] == 0
    run(config(name="tolerant", data=data | {"max_bad_fraction": 0.05}))
    assert rows(tmp_path / "tolerant")[-1]["bad_samples"] == 2  # once per epoch


def state_of(folder) -> dict:
    """Every tensor of a run's newest checkpoint."""
    latest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    return {file.name: load_file(file) for file in sorted((latest / "state").glob("*.safetensors"))}


def assert_equal_states(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        assert all(torch.equal(t.nan_to_num(), theirs[file][name].nan_to_num()) for name, t in tensors.items()), file


def test_saving_in_the_background_changes_nothing(config, tmp_path):
    """Every step, while the next ones are computed: the same files, each of them whole."""
    save = {"every_steps": 1, "keep_last": 99}
    run(config(name="foreground", save=save))
    run(config(name="background", save=save | {"background": True}))
    assert_equal_states(state_of(tmp_path / "background"), state_of(tmp_path / "foreground"))
    names = [path.name for path in sorted((tmp_path / "background" / "checkpoints").glob("step_*"))]
    assert names == [f"step_{step:08d}" for step in range(1, 11)]
    for name in names:
        ours, theirs = (tmp_path / which / "checkpoints" / name for which in ("background", "foreground"))
        assert checkpoint.damage(ours) is None
        assert checkpoint.damage(theirs) is None
        weights = "state/weights.safetensors"
        assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()


@pytest.mark.parametrize(
    ("save", "steps"),
    [({}, [5, 10]), ({"every_epochs": 2}, [10]), ({"every_epochs": 1, "every_steps": 4}, [4, 5, 8, 10])],
)
def test_saving_by_epochs(config, tmp_path, save, steps):
    """Two epochs of five steps: once per epoch unless something is said."""
    run(config(save=save | {"keep_last": 99}))
    names = [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("step_*"))]
    assert names == [f"step_{step:08d}" for step in steps]


def test_saving_by_the_clock(config, tmp_path, monkeypatch):
    """A clock that goes three minutes a step, a checkpoint every six: after every second step."""
    now = [0.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: now[0])
    advance = Trainer._advance
    monkeypatch.setattr(Trainer, "_advance", lambda self: now.append(now.pop() + 180) or advance(self))
    run(config(save={"every_minutes": 6, "keep_last": 99}))
    names = [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("step_*"))]
    assert names == [f"step_{step:08d}" for step in (2, 4, 6, 8, 10)]


def test_average_is_kept_released_and_resumed(config, tmp_path):
    """student_ema/ is a release of its own, what `eval RUN` takes; the average goes on after a resume."""
    train = {"ema_decay": 0.8}
    run(config(name="whole", train=train))
    run(config(name="halves", train=train, optim={"lr": 1e-2, "epochs": 2}, save={"every_steps": 5, "keep_last": 9}))
    first_half = tmp_path / "halves" / "checkpoints" / "step_00000005"
    run(config(name="resumed", train=train, resume=str(first_half)))
    assert_equal_states(state_of(tmp_path / "resumed"), state_of(tmp_path / "whole"))
    released = resolve_release(str(tmp_path / "whole"))
    assert released.name == "student_ema"
    average = load_file(released / "open_clip_model.safetensors")["visual.proj"]
    state = state_of(tmp_path / "whole")
    assert torch.equal(average, state["ema.safetensors"]["clip.visual.proj"])
    assert not torch.equal(average, state["weights.safetensors"]["clip.visual.proj"])


def test_a_length_in_samples(config, tmp_path):
    """Rounded up to whole steps of 8."""
    run(config(optim={"lr": 1e-2, "samples": 20}))
    assert rows(tmp_path / "run")[-1]["step"] == 3


def test_accumulation_counts_micro_batches(config, tmp_path):
    """Two micro-batches of 4 see the samples that one batch of 8 sees, and give its curve."""
    run(config(name="whole"))
    data = {**config().data.model_dump(), "batch_size": 4}
    run(config(name="parts", data=data, train={"accumulate": 2}))
    for ours, theirs in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
        assert ours["samples"] == theirs["samples"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert "4 per process x 2 micro-batches x 1 processes = 8 samples" in (tmp_path / "parts" / "out.log").read_text()


def test_deterministic_mode_holds_for_the_run(config):
    """torch refuses operations without a deterministic kernel while it lasts."""
    seen = []
    original = Trainer.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Trainer, "train", lambda self: seen.append(torch.are_deterministic_algorithms_enabled()) or original(self)
        )
        run(config(train={"deterministic": True}))
        run(config(name="fast"))
    assert seen == [True, False]


def test_non_finite_loss_is_skipped_and_then_stops_the_run(config, tiny_teacher, tmp_path):
    """A teacher that says nan: max_skipped steps are logged and change nothing, the next names all that is known."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_teacher, broken)
    weights = load_file(broken / "open_clip_model.safetensors")
    weights["text_projection"][0, 0] = float("nan")
    save_file(weights, broken / "open_clip_model.safetensors")
    broken_run = {"teacher": {"path": str(broken)}, "train": {"max_skipped": 2}, "save": {"every_steps": 1}}
    with pytest.raises(
        ConfigError,
        match=r"step 3: loss/feature is not finite; .*text on rank 0 \(sample ids .*max_skipped=2.*step_00000002",
    ):
        run(config(**broken_run))
    history = rows(tmp_path / "run")
    assert [(row["step"], row["loss"], row["skipped"]) for row in history] == [(1, None, 1), (2, None, 2)]
    first, second = (tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "state" for step in (1, 2))
    for name in ("weights", "objective"):
        before, after = (load_file(folder / f"{name}.safetensors") for folder in (first, second))
        assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)
    assert (tmp_path / "run" / "out.log").read_text().count("skipped\n") == 2


def test_a_signal_in_the_last_step_changes_nothing(config, tmp_path, monkeypatch):
    """The run ends as it would have; resume=auto then finds nothing to do."""
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, lr: (os.kill(os.getpid(), signal.SIGUSR1), step(self, lr))[1])
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    try:
        run(config(optim={"lr": 1e-2, "steps": 1}))
    finally:
        signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGUSR1, before[1])
    kept = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "stopped by SIGUSR1 after step 1" in (tmp_path / "run" / "out.log").read_text()
    run(config(optim={"lr": 1e-2, "steps": 1}, resume="auto"))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == kept
    assert (tmp_path / "run" / "out.log").read_text().count("done: ") == 2
