"""The model that learns: an open_clip model and, where terms compare features, a projector to the teacher's width."""

from __future__ import annotations

from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn

from kd_accel.config import StudentConfig
from kd_accel.models.towers import build_open_clip, encode_image
from kd_accel.schema import ConfigError


class Student(nn.Module):
    """Everything with gradients that the engine holds. Temperature and bias belong to the objective, in fp32.

    clip        the open_clip model; state keys "clip.*"
    projector   None, or one linear layer per tower: {image, text}; state keys "projector.*"
    contract    what it wants as input
    model_cfg   open_clip's description of it, for the release
    embed_dim   d
    scale       what it starts with: of its weights, or of its architecture
    """

    def __init__(self, config: StudentConfig, teacher_dim: int | None):
        """Fresh weights come from torch's global generator; those of the projector last. Raises ConfigError."""
        super().__init__()
        self.clip, self.contract, self.model_cfg, self.scale = build_open_clip(
            config.arch, pretrained=config.pretrained, preprocess=config.preprocess, name="student"
        )
        self.embed_dim: int = self.model_cfg["embed_dim"]
        self.projector = None if config.projector is None else _linear_projector(self.embed_dim, teacher_dim)
        if config.grad_checkpointing:
            self._checkpoint_gradients()

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """uint8 `image[b,3,H,W]`, int64 `text[b,T]` -> raw embeddings "image", "text" `[b,d]`.

        With a projector also "projected_image", "projected_text" `[b,d_teacher]`: linear in the embedding as it is,
        before any normalisation (CLIP-KD, arXiv 2307.12732, sec. 3.3).
        """
        embeddings = {"image": self.encode_image(image), "text": self.encode_text(text)}
        if self.projector is None:
            return embeddings
        return embeddings | {f"projected_{tower}": self.projector[tower](row) for tower, row in embeddings.items()}

    def encode_image(self, view: Tensor) -> Tensor:
        """uint8 `[b,3,H,W]` of any size -> raw embeddings `[b,d]`."""
        return encode_image(self.clip, view, self.contract)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 `[b,T]` -> raw embeddings `[b,d]`."""
        return self.clip.encode_text(tokens, normalize=False)

    @staticmethod
    def release_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The open_clip part of a state dict of Student: without the projector, keys without "clip."."""
        odd = [key for key in state if not key.startswith(("clip.", "projector."))]
        assert not odd, f"not a state of Student: {odd}"
        return {key.removeprefix("clip."): tensor for key, tensor in state.items() if key.startswith("clip.")}

    def _checkpoint_gradients(self) -> None:
        if isinstance(self.clip.visual, ModifiedResNet):
            raise ConfigError("student.grad_checkpointing: open_clip's ResNet cannot do it; use a ViT, or false")
        self.clip.set_grad_checkpointing(True)


def _linear_projector(embed_dim: int, teacher_dim: int | None) -> nn.ModuleDict:
    if teacher_dim is None:
        raise ConfigError("student.projector=linear needs a teacher to project to: add the section teacher, or drop it")
    return nn.ModuleDict({tower: nn.Linear(embed_dim, teacher_dim) for tower in ("image", "text")})
