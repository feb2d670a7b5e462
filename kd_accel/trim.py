"""Captions are mostly shorter than the context: the columns that hold nothing but padding need not be computed.

    tokens = trimmed(contract.text.tokenize(captions), contract.text.pad)  # [b, 77] -> [b, 16]

Only where the features do not depend on them: TextInput.pad says so, and is None otherwise.
"""

from __future__ import annotations

from torch import Tensor


def trimmed(tokens: Tensor, pad: int | None, multiple: int = 8) -> Tensor:
    """[b, T] -> [b, T'], without trailing columns of `pad` alone; T' is a multiple of `multiple`, or T.

    One length more costs little, and few different lengths let kernels and allocators reuse what they have.
    """
    full = tokens.shape[1]
    if pad is None:
        return tokens
    used = (tokens != pad).any(dim=0).nonzero()  # [columns, 1]
    needed = int(used[-1]) + 1 if len(used) else 1
    # contiguous: what travels between processes is the memory behind a tensor, cut or not
    return tokens[:, : min(full, -(-needed // multiple) * multiple)].contiguous()
