"""How deep in its tower a parameter lies, told by its name: open_clip's, timm's, torchvision's and HuggingFace's."""

from __future__ import annotations

import re
from collections.abc import Iterable

BLOCK = re.compile(  # of a tower: its name, its number
    r"(.*?(?:\b(?:resblocks|blocks|layers|layer|stages|features)|encoder_layer_|trunk_output\.block))\.?(\d+)\b"
)
ATTENTION_POOL = re.compile(r"attn_?pool")  # lies above the blocks, position embedding and all
BELOW_BLOCKS = re.compile(  # what comes before the first block
    r"class_embedding|class_token|positional_embedding|pos_embed|cls_token|cls_emb|reg_token|token_embedding|embeddings"
    r"|patch_embed|conv_proj|visual\.(trunk\.)?(conv|bn)\d|ln_pre|norm_pre|stem"
)


def layers_above(names: Iterable[str]) -> dict[str, int]:
    """How many layers of its tower lie above each parameter, its own block included; 0 for what lies above all blocks.

    Every tower counts its own blocks: embeddings lie below the first one; heads, last norms and projections on top.
    So does a parameter whose place is unknown.
    """
    found = {name: BLOCK.match(name) for name in names}
    depth: dict[str, int] = {}  # blocks by tower
    for match in filter(None, found.values()):
        depth[match[1]] = max(depth.get(match[1], 0), int(match[2]) + 1)
    return {name: _above(name, match, depth) for name, match in found.items()}


def _above(name: str, match: re.Match | None, depth: dict[str, int]) -> int:
    if match is not None:
        return depth[match[1]] - int(match[2])
    if ATTENTION_POOL.search(name) or not BELOW_BLOCKS.search(name):
        return 0
    of_image = "visual" in name
    return max((blocks + 1 for tower, blocks in depth.items() if ("visual" in tower) == of_image), default=0)
