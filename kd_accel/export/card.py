"""README.md of a release, the model card of the Hub: what it is, how good it is, how to load it, how it was made.

Everything in it is read from the release and from the run that it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from kd_accel import __version__
from kd_accel.export.assemble import Exported
from kd_accel.export.calibrate import Agreement
from kd_accel.export.curves import write_curves
from kd_accel.export.evaluation import evaluation_table
from kd_accel.export.origin import Origin, hub_name, origin_of, without_secrets
from kd_accel.export.parity import LIMITS, Parity
from kd_accel.export_config import ExportConfig
from kd_accel.models.model_cfg import is_open_clips

RECIPE = ("student", "compress", "teacher", "teachers", "objective", "optim", "data")
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

CLASS_HEAD = """`class_head.safetensors` (weight, bias) turns raw image features into logits of {num_classes} classes.

```bash
kd-accel predict FOLDER photos/
```"""


def write_card(
    folder: Path, config: ExportConfig, exported: Exported, parities: list[Parity], agreement: Agreement | None
) -> None:
    """Write FOLDER/README.md, and a picture of the curves beside it where they can be drawn."""
    origins = [origin for release in exported.sources if (origin := origin_of(release))]
    sections = [
        f"---\n{_front_matter(config, exported, origins)}\n---",
        f"# {Path(config.out).name}",
        _summary(exported, origins),
        *_results(exported, origins),
        *([] if agreement is None else [f"## INT8\n\n{_int8(config, agreement)}"]),
        f"## Loading\n\n{_loading(exported, config)}",
        *(_training(origin, folder, number) for number, origin in enumerate(origins, start=1)),
        f"## Checked\n\n{_checked(parities)}",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _front_matter(config: ExportConfig, exported: Exported, origins: list[Origin]) -> str:
    """What the Hub reads. Base models and datasets are those of the Hub; of others it knows nothing."""
    whole = exported.contract.image is not None and exported.contract.text is not None
    alone = "feature-extraction" if exported.class_head is None else "image-classification"
    data = ModelCardData(
        library_name="open_clip" if is_open_clips(exported.model_cfg) else "kd_accel",
        pipeline_tag="zero-shot-image-classification" if whole else alone,
        license=config.license,
        tags=["clip", *(["knowledge-distillation"] if any(o.teachers for o in origins) else []), "kd_accel"],
        base_model=_unique(name for origin in origins for name in origin.base_models),
        datasets=_unique(name for origin in origins for name in origin.datasets),
    )
    return data.to_yaml()


def _unique(names: Iterable[str]) -> list[str] | None:
    return list(dict.fromkeys(names)) or None


def _summary(exported: Exported, origins: list[Origin]) -> str:
    millions = sum(tensor.numel() for tensor in exported.state.values()) / 1e6
    image, text = exported.contract.image, exported.contract.text
    towers = [f"pictures of {image.size[0]} x {image.size[1]} pixels"] if image else []
    towers += [f"texts of {text.context_length} tokens"] if text else []
    width = exported.model_cfg["embed_dim"]
    size = f"{millions:,.1f} M parameters; {' and '.join(towers)} become embeddings of width {width}."
    teachers = _unique(_teacher(section) for origin in origins for section in origin.teachers.values())
    taught = f" Distilled from {', '.join(teachers)}." if teachers else ""
    return f"{size}{taught} Trained with kd_accel {__version__}."


def _teacher(section: dict[str, Any]) -> str:
    """A link to it where it is the Hub's, else its name in the config."""
    if name := hub_name(section):
        return f"[{name}](https://huggingface.co/{name})"
    return f"`{section.get('path') or section.get('arch') or section.get('store')}`"


def _results(exported: Exported, origins: list[Origin]) -> list[str]:
    """None for a model that was put together: it is neither of those that were evaluated."""
    table = evaluation_table(origins[0]) if len(exported.sources) == len(origins) == 1 else None
    return [] if table is None else [f"## Evaluation\n\n{table}"]


def _training(origin: Origin, folder: Path, number: int) -> str:
    """What decided the training, as the run's config has it, and how it went."""
    kept = {key: value for key in RECIPE if (value := _given(origin.config.get(key))) is not None}
    recipe = without_secrets(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).rstrip())
    picture = "curves.png" if number == 1 else f"curves_{number}.png"
    drawn = [f"![loss and temperature over steps]({picture})"] if write_curves(origin, folder / picture) else []
    head = f"## Training: {origin.run.name}, step {origin.step:,}"
    return "\n\n".join([head, *drawn, f"```yaml\n{recipe}\n```"])


def _given(value: Any) -> Any:
    """Without what was left out: null, {} and []; None where nothing else is there."""
    if isinstance(value, dict):
        value = {key: part for key, inner in value.items() if (part := _given(inner)) is not None}
    return None if value in ({}, []) else value


def _int8(config: ExportConfig, agreement: Agreement) -> str:
    return (
        f"`image.onnx` was quantised after training by {config.int8}, with the ranges that {agreement.num_pictures}"
        f" pictures showed; on them the {agreement}."
    )


def _loading(exported: Exported, config: ExportConfig) -> str:
    parts = [OPEN_CLIP if is_open_clips(exported.model_cfg) else OURS]
    parts += [TRANSFORMERS] if "transformers" in config.format else []
    parts += [ONNX] if "onnx" in config.format else []
    parts += [CLASS_HEAD.format(num_classes=len(exported.class_head.bias))] if exported.class_head else []
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
            "int8: `image.onnx` has integers; compared by 1 - cosine to the tower that imitates their rounding.",
        ]
    return "\n".join([head, *lines])
