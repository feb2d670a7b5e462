"""Terms of the student alone: contrast of its images and captions, and labels."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from kd_accel.schedules import Cosine, Scheduled, StepEvery, bounds
from kd_accel.schema import Schema
from kd_accel.terms.base import Term


class Clip(Term):
    """InfoNCE between the student's images and captions (CLIP, arXiv 2103.00020, fig. 3)."""

    columns: ClassVar[tuple[str, ...]] = ("student",)
    kind: Literal["clip"] = "clip"


class HardLabel(Term):
    """InfoNCE on cosines at a fixed temperature, 1 in DistillCLIP (its `hard_label`)."""

    columns: ClassVar[tuple[str, ...]] = ("student",)
    kind: Literal["hard_label"] = "hard_label"
    temperature: float = Field(1.0, gt=0)
    """Divides the cosines."""


class SigLip(Term):
    """Pairwise sigmoid loss of the student's images and captions (SigLIP, arXiv 2303.15343, alg. 1).

    Needs objective.logit_bias (the paper starts at -10, with temperature 0.1).
    """

    columns: ClassVar[tuple[str, ...]] = ("student",)
    kind: Literal["siglip"] = "siglip"


class IndividualTemperature(Schema):
    """A learned temperature per sample id and tower."""

    update: Literal["adam", "momentum"] | None = None
    """adam: FastCLIP-v2. momentum: iSogCLR. null: momentum for variant isogclr, else adam."""
    init: float | None = Field(None, gt=0)
    """At first; null: 0.03 with adam, 0.01 with momentum."""
    min: float | None = Field(None, gt=0)
    """Never below; null: 0.01 with adam, 0.005 with momentum."""
    max: float | None = Field(None, gt=0)
    """Never above; null: 1 with adam, 0.05 with momentum."""
    lr: Scheduled | None = None
    """Step size; null: 0.0133 with adam, 0.03 with momentum."""


class NetworkTemperature(Schema):
    """A small network that predicts every sample's temperature from its features (TempNet, arXiv 2404.04575)."""

    head: Literal["tempnet", "disttempnet"] = "tempnet"
    """tempnet: bounded by a sigmoid. disttempnet: difference of two linear layers over rho (DistTempNet)."""
    prototypes: int = Field(256, gt=0)
    """Prototypes per tower, taken from the first global batch, which must be at least as large."""
    min: float | None = Field(None, gt=0)
    """Lowest temperature; null: 0.005 for tempnet, 0.001 for disttempnet."""
    max: float | None = Field(None, gt=0)
    """Highest temperature; null: 0.05 for tempnet, none for disttempnet."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Of the hidden layer; the mask is a pure function of the step and of the row, whatever the ranks."""
    lr: Scheduled = StepEvery(value=3e-5, ratio=0.9, epochs=1)
    """Learning rate of the network; no weight decay."""


_VARIANTS = {  # (temperature, multiply_tau)
    "v0": ("learnable", False),
    "v1": ("constant", False),
    "v2": ("individual", True),
    "v3": ("learnable", True),
    "sogclr": ("constant", True),
    "isogclr": ("individual", True),
}
_INDIVIDUAL: dict[str, dict[str, Any]] = {  # update -> init, min, max, lr
    "adam": {"init": 0.03, "min": 0.01, "max": 1.0, "lr": 0.0133},
    "momentum": {"init": 0.01, "min": 0.005, "max": 0.05, "lr": 0.03},
}
_BY_TEMPERATURE = ("individual", "network")  # sections of their own
_NETWORK: dict[str, dict[str, Any]] = {
    "tempnet": {"min": 0.005, "max": 0.05},
    "disttempnet": {"min": 0.001, "max": None},
}


class GlobalContrastive(Term):
    """Contrast against the whole dataset, whose normaliser u is remembered per sample id (SogCLR, FastCLIP).

    mean_i of tau_i (log(eps + u_i) + rho), averaged over both directions, where u_i follows
    g_i = mean_{j != i} exp((s_ij - s_ii) / tau_i) by u <- (1 - gamma) u + gamma g
    (SogCLR, arXiv 2202.12387, alg. 1; iSogCLR, 2305.11965; GCL, RGCL and RGCL-g of FastCLIP, 2407.01445).
    """

    columns: ClassVar[tuple[str, ...]] = ("student",)
    needs_ids: ClassVar[bool] = True
    kind: Literal["global_contrastive"] = "global_contrastive"
    variant: Literal["v0", "v1", "v2", "v3", "sogclr", "isogclr"] = "v3"
    """Sets temperature and multiply_tau: v0 learnable, off; v1 constant, off; v2 individual; v3 learnable, on;
    sogclr constant, on; isogclr individual, on."""
    temperature: Literal["constant", "learnable", "individual", "network"] | None = None
    """constant, learnable: the student's. individual: one per sample. network: TempNet's; null: the variant's."""
    multiply_tau: bool | None = None
    """Whether the loss is tau (log u + rho) rather than log u; null: the variant's."""
    gamma: Scheduled = Cosine(start=1.0, end=0.8, epochs=10)
    """Share of the present batch in u, in (0, 1]; 1 in the first epoch.

    A schedule in epochs moves it at the start of an epoch, one in steps or samples with every step."""
    rho: float = Field(8.0, ge=0)
    """Pulls the temperature down (rho of the papers); of no effect when tau does not multiply."""
    eps: float = Field(1e-14, ge=0)
    """Added to u inside the logarithm."""
    individual: IndividualTemperature = IndividualTemperature()
    network: NetworkTemperature = NetworkTemperature()
    reference: bool = False
    """true: numbers of the published code.

    FastCLIP counts the temperature's gradient through g twice (v0, v3) or leaves the factor tau_i out of the feature
    gradient (v2); SogCLR, iSogCLR and TempNet add the two directions and report a surrogate as the loss."""

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        low, high = bounds(self.gamma)
        if not 0 < low <= high <= 1:
            raise ValueError(f"gamma must stay in (0, 1] and goes from {low:g} to {high:g}: change gamma")
        temperature, multiply_tau = _VARIANTS[self.variant]
        chosen: dict[str, Any] = {"temperature": self.temperature or temperature}
        multiplied = chosen["temperature"] in ("individual", "network")
        if multiplied and self.multiply_tau is False:
            raise ValueError(
                f"temperature={chosen['temperature']} minimises tau (log u + rho): drop multiply_tau=false"
            )
        chosen["multiply_tau"] = multiplied or (multiply_tau if self.multiply_tau is None else self.multiply_tau)
        for name in _BY_TEMPERATURE:
            chosen[name] = self._completed(getattr(self, name))
            default = self._completed(type(self).model_fields[name].default)
            if chosen["temperature"] != name and chosen[name] != default:
                raise ValueError(
                    f"{name} is only looked at with temperature={name}, and this term has"
                    f" temperature={chosen['temperature']}: set temperature, or drop {name}"
                )
        self._check_ranges(chosen["individual"], chosen["network"])
        if chosen["temperature"] == "network" and self.network.head == "disttempnet" and not self.rho:
            raise ValueError("rho=0 and network.head=disttempnet, which divides by it: raise rho, or take tempnet")
        self.__dict__.update(chosen)
        return self

    def _completed(
        self, section: IndividualTemperature | NetworkTemperature
    ) -> IndividualTemperature | NetworkTemperature:
        """The section with what this term's variant and head put where it leaves null."""
        defaults: dict[str, Any]
        if isinstance(section, NetworkTemperature):
            defaults = _NETWORK[section.head]
        else:
            update = section.update or ("momentum" if self.variant == "isogclr" else "adam")
            defaults = {"update": update, **_INDIVIDUAL[update]}
        return section.model_copy(update={key: v for key, v in defaults.items() if getattr(section, key) is None})

    @staticmethod
    def _check_ranges(individual: IndividualTemperature, network: NetworkTemperature) -> None:
        for name, section in (("individual", individual), ("network", network)):
            if section.min is not None and section.max is not None and section.min >= section.max:
                raise ValueError(
                    f"{name}.min={section.min:g} is not below {name}.max={section.max:g}: change one of them"
                )
        completed = individual.min, individual.init, individual.max
        low, init, high = cast(tuple[float, float, float], completed)
        if not low <= init <= high:
            raise ValueError(
                f"individual.init={init:g} is not between individual.min={low:g} and individual.max={high:g}:"
                " change one of them"
            )


class LabelCE(Term):
    """Cross entropy of class labels: by cosines with class embeddings (CLIP as a classifier), or by a class head."""

    kind: Literal["label_ce"] = "label_ce"
    classes: str | None = None
    """What the labels mean: a safetensors file with `embeddings` [C, d], or a text file with one class name per line,
    which the teacher's text tower embeds. null: the student's own head, student.num_classes."""
    templates: list[str] = ["a photo of a {}."]
    """Prompts around a class name; their embeddings are averaged."""
    teacher: str | None = None
    """Whose text tower embeds the class names; null: the only one."""
    scale: float = Field(100.0, gt=0)
    """Of the cosines."""
    reference: bool = False
    """true: cross entropy of the probabilities, a softmax too many, as in clip-distillation."""

    @model_validator(mode="after")
    def _ignores_nothing(self) -> Self:
        """What only class names, or only class embeddings, make use of."""
        named = self.classes is not None and not self.classes.endswith(".safetensors")
        used = {"templates": named, "teacher": named, "scale": self.classes is not None}
        for key, is_used in used.items():
            if not is_used and getattr(self, key) != type(self).model_fields[key].default:
                needed = (
                    "class embeddings: set classes" if key == "scale" else "class names: set classes to a text file"
                )
                raise ValueError(f"{key} is only looked at with {needed}, or drop {key}")
        return self
