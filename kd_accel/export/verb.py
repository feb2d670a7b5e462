"""kd-accel export RUN out=FOLDER format=open_clip,transformers,onnx: a student, ready for those who use it.

    FOLDER/open_clip_config.json  open_clip_model.safetensors  tokenizer files      always
           config.json  model.safetensors  processor_config.json     transformers: CLIPModel, VisionTextDualEncoderModel
           image.onnx  text.onnx  meta.json                                         onnx
           int8.safetensors                              of a student that is int8 by training, or by `calibrate`
           class_head.safetensors                        of a student that was trained with one
           README.md  curves.png                                                    the model card

Every format is loaded again and compared with the student; the folder appears whole, or not at all.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from kd_accel.export.assemble import Exported, load_exported
from kd_accel.export.calibrate import Agreement, check_float, quantise
from kd_accel.export.card import write_card
from kd_accel.export.dual_encoder import check_dual_encoder, write_dual_encoder
from kd_accel.export.onnx_files import write_onnx
from kd_accel.export.parity import Parity, check_all
from kd_accel.export.transformers_clip import check_plain_clip, write_transformers_clip
from kd_accel.export_config import ExportConfig
from kd_accel.int8 import restore
from kd_accel.models.release import read_release, write_release
from kd_accel.schema import ConfigError


def run(config: ExportConfig) -> None:
    """Write the release and say where. Raises ConfigError as `export` does."""
    export(config)
    print(f"written to {config.out}")


def export(config: ExportConfig) -> None:
    """Write the release. Raises ConfigError for what cannot be exported, and for an `out` that is there already."""
    out = Path(config.out)
    if out.exists():
        raise ConfigError(f"out={out}: is there already: name another folder, or remove it")
    exported = load_exported(config)
    if config.int8 is not None:
        check_float(exported, f"int8={config.int8}")
    if "transformers" in config.format:
        _check_transformers(exported)
    partial = out.with_name(f".exporting_{out.name}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        parities, agreement = _write(partial, exported, config)
        partial.rename(out)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for parity in parities:
        what = "1 - cosine of a picture" if parity.format == "int8" else "difference of unit features"
        print(f"{parity.format}: largest {what} {_largest(parity):.2g}")
    if agreement is not None:
        print(f"int8: {agreement}, over {agreement.num_pictures} pictures")


def _check_transformers(exported: Exported) -> None:
    if exported.hf_text is None:
        check_plain_clip(exported.model_cfg, exported.contract)
    else:
        check_dual_encoder(exported.model_cfg, exported.contract, exported.hf_text)


def _write(folder: Path, exported: Exported, config: ExportConfig) -> tuple[list[Parity], Agreement | None]:
    """All files; the formats' differences from the model, and that of a tower that is quantised here."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_release(
        folder,
        state=exported.state,
        model_cfg=exported.model_cfg,
        contract=exported.contract,
        log_scale=exported.scale.log_scale,
        logit_bias=exported.scale.bias,
        hf_text=exported.hf_text,
        int8=exported.int8,
        class_head=exported.class_head,
    )
    model, contract, model_cfg, scale = read_release(folder)
    if "transformers" in config.format:
        values = {"state": model.state_dict(), "model_cfg": model_cfg, "contract": contract}
        values["log_scale"] = scale.log_scale
        if exported.hf_text is None:
            write_transformers_clip(folder, **values)
        else:
            write_dual_encoder(folder, text=exported.hf_text, **values)
    int8 = agreement = None
    if config.int8 is not None:
        int8, agreement = quantise(folder, config.int8, config.calibrate, model=model, image=contract.image)
    if "onnx" in config.format:
        if exported.int8 is not None:
            int8 = restore(folder, exported.int8)
        name, width = Path(config.out).name, model_cfg["embed_dim"]
        write_onnx(folder, model=model, contract=contract, embed_dim=width, scale=scale, name=name, int8=int8)
    formats = list(dict.fromkeys(["open_clip", *config.format]))
    parities = check_all(folder, formats, model=model, contract=contract, int8=int8)
    write_card(folder, config, exported, parities, agreement)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes files that only their owner can read
    return parities, agreement


def _largest(parity: Parity) -> float:
    return max(value for value in (parity.image, parity.text) if value is not None)
