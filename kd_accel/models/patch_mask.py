"""A second look of the image tower at a few of the patches (masked feature distillation of CLIP-KD, arXiv 2307.12732).

mask = PatchMask.install(visual, ratio=0.75)
with mask:
    masked = visual(image)      # each sample keeps a random quarter of its patches
"""

from __future__ import annotations

from open_clip.transformer import PatchDropout, VisionTransformer
from torch import Tensor, nn

from kd_accel.schema import ConfigError


class PatchMask(nn.Module):
    """Drops patches inside `with`, in training only; position embeddings are added before, the class token stays.

    It takes the place of the tower's own patch dropout, which goes on outside.
    """

    def __init__(self, ratio: float, outside: nn.Module, *, prefix_token: bool):
        super().__init__()
        self.inside, self.outside = PatchDropout(ratio, exclude_first_token=prefix_token), outside
        self.masking = False

    @staticmethod
    def install(visual: nn.Module, ratio: float) -> PatchMask:
        """Put a mask into an image tower. Raises ConfigError for one without patches."""
        if isinstance(visual, VisionTransformer):
            visual.patch_dropout = PatchMask(ratio, visual.patch_dropout, prefix_token=True)
            return visual.patch_dropout
        trunk = getattr(visual, "trunk", None)  # timm's
        if trunk is None or not hasattr(trunk, "patch_drop"):
            raise ConfigError("masked_feature_mse needs an image tower with patches: a ViT, open_clip's or timm's")
        trunk.patch_drop = PatchMask(ratio, trunk.patch_drop, prefix_token=trunk.num_prefix_tokens > 0)
        return trunk.patch_drop

    def __enter__(self) -> None:
        self.masking = True

    def __exit__(self, *_) -> None:
        self.masking = False

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, 1 + L, d] -> [b, 1 + kept, d] while masking, else what the tower itself does."""
        return self.inside(tokens) if self.masking else self.outside(tokens)
