"""A second look of the image tower at a few of the patches (masked feature distillation of CLIP-KD, arXiv 2307.12732).

mask = PatchMask.install(visual, ratio=0.75)
with mask:
    masked = visual(image)      # each sample keeps a random quarter of its patches
"""

from __future__ import annotations

from open_clip.transformer import VisionTransformer
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from kd_accel.schema import ConfigError


class PatchMask(nn.Module):
    """Drops patches inside `with`, in training only; position embeddings are added before, the class token stays.

    It takes the place of the tower's own patch dropout, which goes on outside. timm's dropout and not open_clip's: that
    one knows of one token before the patches, where timm's towers have none, a class token, or registers beside it.
    """

    def __init__(self, ratio: float, outside: nn.Module, *, prefix_tokens: int):
        super().__init__()
        self.inside, self.outside = PatchDropout(ratio, num_prefix_tokens=prefix_tokens), outside
        self.masking = False

    @staticmethod
    def install(visual: nn.Module, ratio: float) -> PatchMask:
        """Put a mask into an image tower. Raises ConfigError for one without patches."""
        if isinstance(visual, VisionTransformer):
            visual.patch_dropout = PatchMask(ratio, visual.patch_dropout, prefix_tokens=1)
            return visual.patch_dropout
        trunk = getattr(visual, "trunk", None)  # timm's
        if not isinstance(trunk, TimmVisionTransformer):
            raise ConfigError(
                "student.arch: masked_feature_mse needs an image tower with patches to drop: choose a ViT of"
                " open_clip's own or timm's VisionTransformer, or set that term to null"
            )
        trunk.patch_drop = PatchMask(ratio, trunk.patch_drop, prefix_tokens=trunk.num_prefix_tokens)
        return trunk.patch_drop

    def __enter__(self) -> None:
        self.masking = True

    def __exit__(self, *_) -> None:
        self.masking = False

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, p + L, d] -> [b, p + kept, d] while masking, p tokens before the patches; else what the tower does."""
        return self.inside(tokens) if self.masking else self.outside(tokens)
