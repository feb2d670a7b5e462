"""The run that a release is of, and what of it may stand in a card that everybody reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm

from kd_accel.config_files import read
from kd_accel.models.release_folder import run_and_step
from kd_accel.report.runs import teachers_in

ON_THE_HUB = re.compile(r"[\w.\-]+/[\w.\-]+")  # OWNER/NAME
SECRETS = (  # what a config may hold and a card may not: of addresses, of commands, of the Hub
    r"(?<=://)[^/\s@]+(?=@)",
    r"(?<=[?&])[^\s'\"]*(key|token|signature|sig|credential)=[^\s'\"]*",
    r"(?<=Bearer )[\w.~+/=\-]+",
    r"\bhf_[A-Za-z0-9]{20,}",
)


@dataclass(frozen=True)
class Origin:
    """RUN of RUN/checkpoints/step_00001000/student."""

    run: Path
    step: int
    config: dict[str, Any]  # of config.yaml

    @property
    def teachers(self) -> dict[str, dict[str, Any]]:
        """The sections that name a teacher; the single one is called "teacher"."""
        return teachers_in(self.config)

    @property
    def base_models(self) -> list[str]:
        """OWNER/NAME of the model whose weights the student started from; a teacher that gave none is no base."""
        student, taught = self.config.get("student") or {}, self.teachers
        if student.get("pretrained"):
            names = [hub_name(student)]
        elif student.get("init") == "teacher":
            names = [hub_name(teacher) for teacher in taught.values()]
        else:
            names = [hub_name(taught.get(student.get("init"), {}))]
        return list(filter(None, names))

    @property
    def datasets(self) -> list[str]:
        """OWNER/NAME of the datasets of the Hub that it was trained on."""
        data = self.config.get("data") or {}
        names = [section.get("dataset") for section in (data, *(data.get("sources") or {}).values()) if section]
        return [name for name in names if name and _is_on_the_hub(name)]


def origin_of(release: Path) -> Origin | None:
    """None for a release that lies in no run. Raises ConfigError for a config.yaml that cannot be read."""
    if (found := run_and_step(release)) is None or not (found[0] / "config.yaml").is_file():
        return None
    run, step = found
    return Origin(run, step, read(run / "config.yaml"))


def hub_name(section: dict[str, Any]) -> str | None:
    """OWNER/NAME of the weights that a student's or teacher's section names, where they are the Hub's."""
    arch, pretrained = section.get("arch"), section.get("pretrained")
    if section.get("path") or not isinstance(arch, str):
        return None
    package, _, name = arch.partition("/")
    if package in ("timm", "hf", "sentence") and pretrained not in (None, "default"):
        return None  # a file
    if package == "timm":
        name = getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "hf_hub_id", None) or ""
    elif package == "sentence" and "/" not in name:
        name = f"sentence-transformers/{name}"
    elif package not in ("hf", "sentence"):
        name = (open_clip.get_pretrained_cfg(arch, pretrained or "").get("hf_hub") or "").rstrip("/")
    return name if _is_on_the_hub(name) else None


def without_secrets(text: str) -> str:
    """`text` with *** in the place of what SECRETS finds."""
    return re.sub("|".join(SECRETS), "***", text, flags=re.IGNORECASE)


def _is_on_the_hub(name: str) -> bool:
    """By its looks; a folder of the same name is what was meant."""
    return ON_THE_HUB.fullmatch(name) is not None and not Path(name).exists()
