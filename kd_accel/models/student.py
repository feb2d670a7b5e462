"""The model that learns: an open_clip model, and the heads that losses want on top of it."""

from __future__ import annotations

from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from kd_accel.models import heads
from kd_accel.models.build import build_student
from kd_accel.models.class_head import ClassHead
from kd_accel.models.hf_text import HFTextTower
from kd_accel.models.image import encode_image
from kd_accel.models.lock import lock
from kd_accel.models.patch_mask import PatchMask
from kd_accel.models.sparsity import without_masks
from kd_accel.models.text import encode_text
from kd_accel.schema import ConfigError
from kd_accel.sections import StudentConfig
from kd_accel.types import InputContract


class Student(nn.Module):
    """Everything with gradients that the engine holds. Temperature and bias belong to the objective, in fp32.

    clip            the open_clip model; state keys "clip.*"
    projector       None, or a head per tower into the teacher's space
    prototype_head  None, or a head per tower whose output is clustered
    class_head      None, or a linear layer on the image embedding
    class_names     None, or what the data calls its classes, by number
    mask            None, or what gives the image tower its masked view
    contract        what it wants as input
    model_cfg       open_clip's description of it, for the release
    embed_dim       d
    towers          of "image" and "text" those it has
    widths          of its features, by name
    scale           what it starts with: of its weights, or of its architecture
    frozen          what is not trained, in words
    inherited       what it starts from of another model, in words
    locked          what `lock` freezes, in words
    sparse          None, or what of it 2:4 sparsity holds, in words
    int8            None, or which backend of kd_accel.int8 quantised its image tower
    unread          towers that are not even run
    """

    def __init__(
        self,
        config: StudentConfig,
        teacher_dims: dict[str, int],
        *,
        mask_ratio: float | None = None,
        weights: bool = True,
    ):
        """Fresh weights come from torch's global generator; those of the heads last. Raises ConfigError.

        `teacher_dims` are the teachers' widths by name, `mask_ratio` the share of patches a masked view goes without;
        `weights`: false leaves pretrained ones out.
        """
        super().__init__()
        built = build_student(config, teacher_width=next(iter(teacher_dims.values()), None), weights=weights)
        self.clip, self.contract, self.model_cfg, self.scale = built
        self.embed_dim: int = self.model_cfg["embed_dim"]
        self.towers = [name for name in heads.TOWERS if getattr(self.contract, name) is not None]
        self.widths = dict.fromkeys(self.towers, self.embed_dim)
        self.unread: set[str] = set()
        self.locked = lock(self.clip, config.lock)
        self.inherited: list[str] = []
        self.sparse: str | None = None
        self.int8: str | None = None
        self.mask = None if mask_ratio is None else PatchMask.install(self.clip.visual, mask_ratio)
        self.projector = self.prototype_head = self.class_head = None
        self.class_names: tuple[str, ...] | None = None
        self.frozen: list[str] = []
        if config.projector is not None:
            self.projector = heads.projector(
                config.projector, self.embed_dim, _common_width(teacher_dims), towers=self.towers
            )
        if config.prototype_head is not None:
            self.prototype_head = heads.prototype_head(config.prototype_head, self.embed_dim, towers=self.towers)
            self.widths |= {f"prototype_{tower}": config.prototype_head.width for tower in self.towers}
        if config.num_classes is not None:
            self.class_head = nn.Linear(self.embed_dim, config.num_classes)
            self.widths["class_logits"] = config.num_classes
        views = [*self.towers, *(["masked_image"] if self.mask else [])]
        self.widths |= dict.fromkeys(views, self.embed_dim)
        if self.projector is not None:
            self.widths |= {f"projected_{view}": _common_width(teacher_dims) for view in views}
        if config.grad_checkpointing:
            self.checkpoint_gradients(True)

    def forward(self, image: Tensor | None, text: Tensor | None) -> dict[str, Tensor]:
        """uint8 `image[b,3,H,W]`, int64 `text[b,T]` -> raw embeddings "image", "text" `[b,d]`, and what the heads make.

        Towers that it does not have, or that nothing reads, say nothing.
        With a projector also "projected_image", ... `[b,d_teacher]`: of the embedding as it is, before any
        normalisation (CLIP-KD, arXiv 2307.12732, sec. 3.3). "masked_image" is a second pass over a few of the patches;
        "prototype_image", "prototype_text" `[b,d_prototype]` and "class_logits" `[b,C]` come from their heads.
        """
        features = {}
        if "image" in self.read:
            features["image"] = self.encode_image(image)
        if "text" in self.read:
            features["text"] = self.encode_text(text)
        made = {}
        if self.prototype_head is not None:
            made |= {f"prototype_{tower}": self.prototype_head[tower](rows) for tower, rows in features.items()}
        if self.class_head is not None and "image" in features:
            made["class_logits"] = self.class_head(features["image"])
        if self.mask is not None and "image" in features:
            with self.mask:
                features["masked_image"] = self.encode_image(image)
        if self.projector is not None:
            made |= {f"projected_{view}": self.projector[_tower(view)](rows) for view, rows in features.items()}
        return features | made

    def encode_image(self, view: Tensor) -> Tensor:
        """uint8 `[b,3,H,W]` of any size -> raw embeddings `[b,d]`."""
        return encode_image(self.clip, view, self.contract.image)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 `[b,T]` -> raw embeddings `[b,d]`."""
        return encode_text(self.clip, tokens)

    def freeze_all_but(self, read: set[str]) -> None:
        """Freeze the towers and heads that none of the features `read` comes out of; such a tower is not even run.

        They get no gradient, and weight decay alone would take them towards zero.
        """
        parts = {}
        self.unread = set(self.towers) - {_tower(name) for name in read}
        for tower in self.towers:
            mine = {name for name in read if _tower(name) == tower}
            if not mine:
                parts[f"{tower} tower"] = self._parameters_of(tower)
            if self.projector is not None and not any(name.startswith("projected_") for name in mine):
                parts[f"{tower} projector"] = list(self.projector[tower].parameters())
            if self.prototype_head is not None and f"prototype_{tower}" not in mine:
                parts[f"{tower} prototype head"] = list(self.prototype_head[tower].parameters())
        if self.class_head is not None and "class_logits" not in read:
            parts["class head"] = list(self.class_head.parameters())
        for parameter in sum(parts.values(), []):
            parameter.requires_grad_(False)
        self.frozen = list(parts)
        self.train(self.training)

    def train(self, mode: bool = True) -> Student:
        """What is frozen stays in eval mode, as teachers do: its running statistics do not move either."""
        super().train(mode)
        for module in self.modules():
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                nn.Module.train(module, False)
        return self

    @property
    def hf_text(self) -> HFTextTower | None:
        """Its text tower, where that is HuggingFace's: a release then holds its config.json."""
        text = getattr(self.clip, "text", None)
        return text if isinstance(text, HFTextTower) else None

    @property
    def read(self) -> set[str]:
        """Towers that run."""
        return set(self.towers) - self.unread

    @property
    def wants(self) -> InputContract:
        """What the towers that run want to see."""
        return self.contract.only(self.read)

    @staticmethod
    def release_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The open_clip part of a state dict of Student: without heads and sparsity masks, keys without "clip."."""
        heads_of = ("projector.", "prototype_head.", "class_head.")
        odd = [key for key in state if not key.startswith(("clip.", *heads_of))]
        assert not odd, f"not a state of Student: {odd}"
        clip = {key.removeprefix("clip."): tensor for key, tensor in state.items() if key.startswith("clip.")}
        return without_masks(clip)

    def released_head(self, state: dict[str, Tensor]) -> ClassHead | None:
        """The class head of a state dict of Student, with the names where the data has one for each of its classes.

        None without one, and for one that no term trains.
        """
        if self.class_head is None or "class head" in self.frozen:
            return None
        weight, bias = state["class_head.weight"], state["class_head.bias"]
        names = self.class_names if self.class_names and len(self.class_names) == len(bias) else None
        return ClassHead(weight, bias, names)

    def checkpoint_gradients(self, enable: bool) -> None:
        """Whether the towers compute their activations again in the backward pass, in place of keeping them.

        Raises ConfigError for those that cannot.
        """
        if isinstance(getattr(self.clip, "visual", None), ModifiedResNet):
            raise ConfigError("student.grad_checkpointing: open_clip's ResNet cannot do it; use a ViT, or false")
        try:
            self.clip.set_grad_checkpointing(enable)
        except (AssertionError, NotImplementedError) as error:
            raise ConfigError(f"student.grad_checkpointing: {error}; set it to false") from None

    def _parameters_of(self, tower: str) -> list[nn.Parameter]:
        """open_clip keeps the image tower under `visual`, and a CLIP's text tower beside it."""
        named = self.clip.named_parameters()
        return [p for name, p in named if name.startswith("visual.") == (tower == "image")]


def _tower(feature: str) -> str:
    """The tower that a feature comes out of; class logits come out of the image tower."""
    return "text" if feature.endswith("text") else "image"


def _common_width(teacher_dims: dict[str, int]) -> int:
    """The width that all teachers share."""
    if not teacher_dims:
        raise ConfigError("student.projector needs a teacher to project to: add the section teacher, or drop it")
    if len(set(teacher_dims.values())) > 1:
        given = ", ".join(f"{name} {width}" for name, width in teacher_dims.items())
        raise ConfigError(f"student.projector leads to one width, but the teachers have several: {given}")
    return next(iter(teacher_dims.values()))
