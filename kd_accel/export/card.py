"""README.md of a release, the model card of the Hub: what it is, how it was made, how good it is, how to load it.

Everything in it is read from the release and from the run that it comes from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from kd_accel import __version__
from kd_accel.evals.results import RESULTS, Row, read_results
from kd_accel.export.assemble import Exported
from kd_accel.export.parity import LIMITS, Parity
from kd_accel.export_config import ExportConfig
from kd_accel.models.model_cfg import is_open_clips

OPEN_CLIP = """```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")  # or "hf-hub:OWNER/NAME"
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```"""
OURS = """```python
from pathlib import Path

from kd_accel.models.release import read_release  # a tower of it is none of open_clip's

model, contract, model_cfg, scale = read_release(Path("FOLDER"))
```"""
TRANSFORMERS = """```python
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("FOLDER"), AutoProcessor.from_pretrained("FOLDER")
```"""
ONNX = """```bash
kd-accel eval FOLDER/image.onnx text_from=FOLDER/text.onnx data=datasets/zeroshot
```

`image.onnx` takes normalised pixels, `text.onnx` tokens; both give raw features. `meta.json` has sizes and names."""


def write_card(folder: Path, config: ExportConfig, exported: Exported, parities: list[Parity]) -> None:
    """Write FOLDER/README.md."""
    whole = exported.contract.image is not None and exported.contract.text is not None
    data = ModelCardData(
        library_name="open_clip" if is_open_clips(exported.model_cfg) else "kd_accel",
        pipeline_tag="zero-shot-image-classification" if whole else "feature-extraction",
        license=config.license,
        tags=["clip", "knowledge-distillation", "kd_accel"],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(config.out).name}",
        _origin(exported),
        *(f"## Made from {release.parent.name}\n\n{_recipe(release)}" for release in exported.sources if _run(release)),
        *_results(exported),
        f"## Loading\n\n{_loading(exported, config)}",
        f"## Checked\n\n{_checked(parities)}",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _origin(exported: Exported) -> str:
    millions = sum(tensor.numel() for tensor in exported.state.values()) / 1e6
    image, text = exported.contract.image, exported.contract.text
    towers = [f"pictures of {image.size[0]} x {image.size[1]} pixels"] if image else []
    towers += [f"texts of {text.context_length} tokens"] if text else []
    width = exported.model_cfg["embed_dim"]
    size = f"{millions:,.1f} M parameters; {' and '.join(towers)} become embeddings of width {width}."
    return f"{size} Trained with kd_accel {__version__}."


def _run(release: Path) -> Path | None:
    """The run that a release lies in: RUN/checkpoints/step_00001000/student."""
    run = release.parent.parent.parent
    return run if release.parent.parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


def _recipe(release: Path) -> str:
    """What decided the training, as the run's config has it."""
    config = yaml.safe_load((_run(release) / "config.yaml").read_text(encoding="utf-8"))
    kept = {
        key: _without_nulls(config[key]) for key in ("student", "teacher", "teachers", "objective", "optim", "data")
    }
    kept = {key: value for key, value in kept.items() if value}
    return f"```yaml\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).rstrip()}\n```"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return value


def _results(exported: Exported) -> list[str]:
    """The main metrics of the checkpoint, where it was evaluated; none for a model that was put together."""
    if len(exported.sources) > 1 or (run := _run(exported.sources[0])) is None:
        return []
    step = int(exported.sources[0].parent.name.removeprefix("step_"))
    rows = [row for row in read_results(run / RESULTS) if row["step"] == step and row["model"] == run.name]
    lines = [_result(row) for row in rows if row["metrics"].get("main_metric") is not None]
    head = "| data | | % | images |\n|---|---|---|---|"
    return ["\n".join(["## Evaluation", "", head, *lines])] if lines else []


def _result(row: Row) -> str:
    return f"| {row['dataset']} | {row['task']} | {100 * row['metrics']['main_metric']:.1f} | {row['n']:,} |"


def _loading(exported: Exported, config: ExportConfig) -> str:
    parts = [OPEN_CLIP if is_open_clips(exported.model_cfg) else OURS]
    parts += [TRANSFORMERS] if "transformers" in config.format else []
    parts += [ONNX] if "onnx" in config.format else []
    return "\n\n".join(parts)


def _checked(parities: list[Parity]) -> str:
    head = "Every format was loaded again and compared with the model; the largest difference of any number:\n"
    lines = ["| format | image features | text features | cosines | limit |", "|---|---|---|---|---|"]
    for parity in parities:
        values = " | ".join("" if v is None else f"{v:.1e}" for v in (parity.image, parity.text, parity.cosine))
        lines.append(f"| {parity.format} | {values} | {LIMITS[parity.format]:g} |")
    if any(parity.format == "int8" for parity in parities):
        lines += [
            "",
            "int8: `image.onnx` has 8-bit integers; compared with the tower as it was trained, by 1 - cosine.",
        ]
    return "\n".join([head, *lines])
