"""What open_clip's text towers make of captions that are shorter than their context.

    pad = text_pad(text_cfg)                             # which padding may go, if any
    features = encode_text(model, trimmed(tokens, pad))  # equal to those of the whole context

With a causal mask no token sees those after it. So where the feature is read off the end-of-text token, what stands
behind that token changes nothing. A tower that looks both ways without masking its padding has learnt to live with it:
MobileCLIP's and SigLIP's captions are never cut.
"""

from __future__ import annotations

from typing import Any

from open_clip.model import CLIP, CLIPTextCfg
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn


def text_pad(text_cfg: dict[str, Any]) -> int | None:
    """The token whose trailing columns may be cut off, for a text tower of open_clip's own, by its text_cfg.

    None: never cut. That includes towers with a tokenizer of their own, whose padding may be their end-of-text token,
    and HuggingFace towers, whose TextInput comes with them (hf_text.py).
    """
    text = CLIPTextCfg(**text_cfg)
    reads_the_end = text.pool_type in ("argmax", "eos") and not text.no_causal_mask and not text.embed_cls
    return 0 if reads_the_end and not text.hf_model_name and not text.hf_tokenizer_name else None


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """int64 [b, T] -> raw embeddings [b, d]; T may be less than the context length where `text_pad` is not None."""
    tower = model if isinstance(model, CLIP) else model.text
    if not _is_causal(tower):
        return model.encode_text(tokens, normalize=False)
    # Whatever the length: under ZeRO-3 all ranks have to ask for the weights in one order, and theirs may differ.
    length = tokens.shape[1]
    # open_clip 3.3 does the same, but adds all positions (CLIP), or masks all of them (TextTransformer).
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
    pool, end = ("text_pool_type", "text_eos_id") if isinstance(tower, CLIP) else ("pool_type", "eos_id")
    x = text_global_pool(x, tokens, getattr(tower, pool), eos_token_id=getattr(tower, end))
    return _projected(x, tower.text_projection)


def _is_causal(tower: nn.Module) -> bool:
    ours = isinstance(tower, CLIP | TextTransformer)
    return ours and tower.attn_mask is not None and getattr(tower, "cls_emb", None) is None


def _projected(x: Tensor, projection: nn.Linear | nn.Parameter | None) -> Tensor:
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection
