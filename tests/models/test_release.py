"""A release is what open_clip loads, bit for bit; a damaged one is refused in one line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from kd_accel.models.image import encode_image, to_model_input
from kd_accel.models.release import read_release, write_release
from kd_accel.models.release_folder import CONFIG, WEIGHTS, resolve_release
from kd_accel.schema import ConfigError
from kd_accel.sections import PreprocessConfig

ODD_PIXELS = PreprocessConfig(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear", resize_mode="squash")


def settled(model, view):
    """In eval mode, with batch statistics that are not those of a fresh model."""
    model.train()
    model.encode_image(view)
    return model.eval()


def write(folder: Path, model, **scales) -> Path:
    state = model.release_state(model.state_dict())
    write_release(folder, state=state, model_cfg=model.model_cfg, contract=model.contract, **scales)
    return folder


def load_with_open_clip(folders: list[Path], view, captions, contract) -> None:
    pixels = to_model_input(view, contract.image, torch.float32)
    where = folders[0].parent
    save_file({"pixels": pixels}, where / "input.safetensors")
    (where / "captions.json").write_text(json.dumps(captions))
    script = Path(__file__).with_name("load_release.py")
    command = [sys.executable, script, where / "input.safetensors", where / "captions.json", *folders]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(where / "hub"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_open_clip_loads_the_same_model(tmp_path, student, arch, view, captions, monkeypatch):
    """A process that knows only open_clip, without network, gets the features, tokens, scales and preprocessing."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", arch(vision={"width": 48}))
    models = {
        "named": student(arch="ViT-tiny"),
        "vit": student(preprocess=ODD_PIXELS),
        "quick_gelu": student(arch=arch(quick_gelu=True)),
        "custom_text": student(arch=arch(custom_text=True)),
        "bias_in_config": student(arch=arch(init_logit_bias=-10.0)),
        "canonical": student(arch=arch(text={"tokenizer_kwargs": {"clean": "canonicalize"}})),
        "resnet": student("resnet"),
        "timm": student("timm", teacher_dim=24, projector="linear"),
    }
    scales = {name: {"log_scale": 2.5, "logit_bias": None} for name in models}
    scales["resnet"] = {"log_scale": math.log(10), "logit_bias": -9.5}
    folders = [write(tmp_path / name, settled(model, view), **scales[name]) for name, model in models.items()]
    # Pixels that fit all of them: the preprocessing of each is compared apart.
    pixels = models["named"].contract
    load_with_open_clip(folders, view, captions, pixels)
    for name, model in models.items():
        tokens = model.contract.text.tokenize(captions)
        with torch.no_grad():
            image = model.clip.encode_image(to_model_input(view, pixels.image, torch.float32))
            text = model.encode_text(tokens)
        log_scale, logit_bias = (scales[name][key] for key in ("log_scale", "logit_bias"))
        expected = {"image": image, "text": text, "tokens": tokens, "logit_scale": torch.tensor(log_scale)}
        if logit_bias is not None:
            expected["logit_bias"] = torch.tensor(logit_bias)
        torch.testing.assert_close(load_file(tmp_path / f"{name}.safetensors"), expected, rtol=0, atol=0)
        seen = json.loads((tmp_path / f"{name}.json").read_text())
        contract = model.contract
        assert tuple(seen["size"] if isinstance(seen["size"], list) else [seen["size"]] * 2) == contract.image.size
        assert (tuple(seen["mean"]), tuple(seen["std"])) == (contract.image.mean, contract.image.std)
        assert (seen["interpolation"], seen["resize_mode"]) == (
            contract.image.interpolation,
            contract.image.resize_mode,
        )


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_read_gives_back_what_was_written(kind, tmp_path, student, view, captions):
    """Features bit for bit, the contract but for its tokenizer object, the model_cfg and the scale."""
    written = settled(student(kind, preprocess=ODD_PIXELS), view)
    folder = write(tmp_path / "release", written, log_scale=1.25, logit_bias=-4.0)
    model, contract, model_cfg, scale = read_release(folder)
    assert (scale.log_scale, scale.bias) == (1.25, -4.0)
    assert model_cfg == json.loads(json.dumps(written.model_cfg)) | {"init_logit_bias": -4.0}
    assert contract.image == written.contract.image
    for name in ("context_length", "tokenizer", "pad"):
        assert getattr(contract.text, name) == getattr(written.contract.text, name)
    with torch.no_grad():
        expected = written(view, written.contract.text.tokenize(captions))
        made = {
            "image": encode_image(model, view, contract.image),
            "text": model.encode_text(contract.text.tokenize(captions)),
        }
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_written_files(release):
    """Config, weights and the four tokenizer files, and nothing left of the writing."""
    folder = release()
    tokenizer = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS} | tokenizer
    assert list(folder.parent.iterdir()) == [folder]
    config = json.loads((folder / CONFIG).read_text())
    assert config.keys() == {"model_cfg", "preprocess_cfg"}


def test_weights_are_fp32_whatever_comes_in(release, student, tmp_path):
    """A bf16 state, as an engine may hand over, is released in fp32; counters stay whole numbers."""
    folder = write(tmp_path / "release", student("resnet").to(torch.bfloat16), log_scale=1.0, logit_bias=None)
    dtypes = {name: tensor.dtype for name, tensor in load_file(folder / WEIGHTS).items()}
    counters = {name for name in dtypes if name.endswith("num_batches_tracked")}
    assert counters
    assert {dtypes[name] for name in counters} == {torch.int64}
    assert {dtype for name, dtype in dtypes.items() if name not in counters} == {torch.float32}


def test_transformers_reads_the_tokenizer_files(release, student):
    """AutoTokenizer gives the training tokenizer's ids up to the first end of text; its padding is its own."""
    from transformers import AutoTokenizer

    texts = ["a photo of a cat", "Hello, WORLD!! it's   \u2014 ok", "na\u00efve caf\u00e9 3.14 #tag", "x" * 400, ""]
    tokenizer = AutoTokenizer.from_pretrained(release())
    ours = student().contract.text.tokenize(texts)
    assert tokenizer.model_max_length == ours.shape[1]
    theirs = tokenizer(texts, padding="max_length", truncation=True)["input_ids"]
    end = tokenizer.eos_token_id
    for row, other in zip(ours.tolist(), theirs, strict=True):
        assert row[: row.index(end) + 1] == other[: other.index(end) + 1]


def test_release_with_a_huggingface_tokenizer_carries_it(release, student, arch, tmp_path, captions):
    """text_cfg.hf_tokenizer_name: the release holds its files, and both readers take them from there."""
    source = release(folder=tmp_path / "source")
    model = student(arch=arch(text={"hf_tokenizer_name": str(source)}))
    folder = write(tmp_path / "copy", model, log_scale=1.0, logit_bias=None)
    source.rename(tmp_path / "gone")
    expected = model.contract.text.tokenize(captions)
    torch.testing.assert_close(read_release(folder)[1].text.tokenize(captions), expected)
    torch.testing.assert_close(open_clip.get_tokenizer(f"local-dir:{folder}")(captions), expected)


def test_interrupted_writing_leaves_no_release(tmp_path, student):
    """Absent until complete: a writer that dies leaves a partial directory, which the next one clears away."""
    model = student()
    state = model.release_state(model.state_dict())
    rest = {"contract": model.contract, "log_scale": 1.0, "logit_bias": None}
    with pytest.raises(TypeError, match="JSON"):  # after the weights, before the tokenizer
        write_release(tmp_path / "release", state=state, model_cfg={"embed_dim": object()}, **rest)
    assert not (tmp_path / "release").exists()
    assert list(tmp_path.iterdir())
    write_release(tmp_path / "release", state=state, model_cfg=model.model_cfg, **rest)
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_release(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_truncated_weights_are_refused(release):
    file = release() / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    assert refused(file.parent).startswith(f"{file}: truncated, or not safetensors: ")


def test_pickle_under_the_safetensors_name_is_refused(release):
    folder = release()
    torch.save(load((folder / WEIGHTS).read_bytes()), folder / WEIGHTS)
    assert "not safetensors" in refused(folder)


def test_pickle_beside_is_not_read(release):
    folder = release()
    (folder / WEIGHTS).rename(folder / "open_clip_pytorch_model.bin")
    assert "open_clip_pytorch_model.bin is a pickle, which may run code: convert it" in refused(folder)


def change_weights(folder: Path, change) -> None:
    weights = load((folder / WEIGHTS).read_bytes())  # load_file would map the file that is written next
    change(weights)
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("visual.proj"), "the weights lack visual.proj"),
        (lambda w: w.update(extra=torch.zeros(1)), "the weights have unknown extra"),
        (lambda w: w.update({"visual.proj": torch.zeros(3, 3)}), "other shapes of visual.proj"),
    ],
)
def test_weights_of_another_model_are_refused(change, message, release):
    folder = release()
    change_weights(folder, change)
    assert refused(folder) == f"{folder / WEIGHTS}: not the model of {CONFIG}: {message}"


def test_config_with_an_unknown_key_is_refused(release):
    folder = release()
    config = json.loads((folder / CONFIG).read_text())
    config["model_cfg"]["text_cfg"]["witdh"] = 3
    (folder / CONFIG).write_text(json.dumps(config))
    assert refused(folder) == f"{folder / CONFIG}: model_cfg.text_cfg.witdh: unknown key; did you mean 'width'?"


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read: "), ("[]", "expected {"), ("{}", "expected {")])
def test_config_that_is_none_is_refused(text, message, release):
    folder = release()
    (folder / CONFIG).write_text(text)
    assert refused(folder).startswith(f"{folder / CONFIG}: {message}")


@pytest.fixture
def run(tmp_path, release) -> Path:
    """A run with a checkpoint at step 10 and its newest one at step 20."""
    checkpoints = tmp_path / "run" / "checkpoints"
    release(folder=checkpoints / "step_00000010" / "student")
    release(folder=checkpoints / "step_00000020" / "student")
    (checkpoints / "latest").write_text("step_00000020\n")
    return tmp_path / "run"


def test_resolve_run_checkpoint_and_release(run):
    """A run means its newest checkpoint; a checkpoint and a release mean themselves."""
    newest = run / "checkpoints" / "step_00000020"
    older = run / "checkpoints" / "step_00000010"
    assert resolve_release(str(run)) == newest / "student"
    assert resolve_release(str(older)) == older / "student"
    assert resolve_release(str(older / "student")) == older / "student"


def test_resolve_says_what_it_looked_for(tmp_path, run):
    with pytest.raises(ConfigError, match="no such directory"):
        resolve_release(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"looked for open_clip_config.json .*student/.*checkpoints/latest"):
        resolve_release(str(tmp_path))
    (run / "checkpoints" / "latest").write_text("step_00000030")
    with pytest.raises(ConfigError, match="latest names step_00000030, but there is no"):
        resolve_release(str(run))
