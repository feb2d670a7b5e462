"""Starts a student from a larger model's weights, as TinyCLIP's manual inheritance does (arXiv 2309.12314).

    for line in inherit(student.clip, teacher.clip, where="student.init=teacher"):
        log.info(line)

Depth: n blocks of the teacher's N, evenly from the first to the last: block i takes round(i (N - 1) / (n - 1)).
Width: the leading channels of the residual stream, the leading heads, each of them whole, the leading hidden units of
an MLP, the leading columns of a projection.
"""

from __future__ import annotations

import re

import torch
from open_clip.transformer import Attention
from torch import Tensor, nn

from kd_accel.schema import ConfigError

BLOCK_NUMBER = re.compile(r"(?<=\bresblocks\.)\d+")
WHOLE = {  # dimensions that are not a width: of these a part would mean something else
    "conv1.weight": (1, 2, 3),
    "positional_embedding": (0,),
    "token_embedding.weight": (0,),
}


def inherit(student_clip: nn.Module, teacher_clip: nn.Module, *, where: str) -> list[str]:
    """Copy what fits of the teacher's towers into the student's; returns a sentence per tower for the log.

    open_clip's transformers may be deeper and wider in the teacher; towers of other kinds are copied where every name
    and shape is the same. A tower that does not fit keeps its fresh weights.
    Raises ConfigError, which begins with `where`, when neither fits.
    """
    said, misfits = [], []
    for tower in ("image", "text"):
        ours, theirs = _tower(student_clip, tower), _tower(teacher_clip, tower)
        if ours is None:
            continue
        reason = _misfit(ours, theirs)
        if reason is not None:
            misfits.append(f"the {tower} tower {reason}")
            continue
        blocks = _copy(_state(ours), _state(theirs))
        said.append(f"the {tower} tower starts from that of {where.partition('=')[2]}{blocks}")
    if not said:
        raise ConfigError(f"{where}: nothing of that model fits: {'; '.join(misfits)}")
    return said + [f"{misfit}: it starts fresh" for misfit in misfits]


def _tower(clip: nn.Module, tower: str) -> nn.Module | None:
    """The image tower, or what holds the text tower: open_clip's CLIP keeps the parts of its own beside the image's."""
    return clip.visual if tower == "image" else getattr(clip, "text", clip)


def _state(tower: nn.Module) -> dict[str, Tensor]:
    """The tower's tensors by name, as they lie in it."""
    beside = ("visual.", "logit_")
    return {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith(beside)}


def _misfit(ours: nn.Module, theirs: nn.Module | None) -> str | None:
    """Why nothing can be taken, as the end of a sentence; None where the tower fits."""
    if theirs is None:
        return "has no counterpart there"
    small, large = _state(ours), _state(theirs)
    if _num_blocks(small) > _num_blocks(large):
        return f"has more blocks, {_num_blocks(small)}, than the teacher's, {_num_blocks(large)}"
    sources = _sources(small, large)
    if unknown := [name for name, source in sources.items() if source not in large]:
        return f"is built in another way: the teacher has no {unknown[0]}"
    for name, source in sources.items():
        wanted, given = tuple(small[name].shape), tuple(large[source].shape)
        cut = [i for i, (a, b) in enumerate(zip(wanted, given, strict=False)) if a != b]
        grows = len(wanted) != len(given) or any(wanted[i] > given[i] for i in cut)
        if cut and (grows or not _num_blocks(small) or set(cut) & set(WHOLE.get(name, ()))):
            return f"has {name} of shape {wanted}, which is no part of the teacher's, {given}"
    if _blocks_are(ours) != _blocks_are(theirs):
        heads, activations = zip(_blocks_are(ours), _blocks_are(theirs), strict=True)
        return f"has heads of width {heads[0]} and {activations[0]}, the teacher {heads[1]} and {activations[1]}"
    return None


def _blocks_are(tower: nn.Module) -> tuple[list[int], list[str]]:
    """Widths of the heads, names of the activations: what the shapes of the weights do not show."""
    parts = [module for name, module in tower.named_modules() if not name.startswith("visual.")]
    heads = {module.head_dim for module in parts if isinstance(module, nn.MultiheadAttention | Attention)}
    return sorted(heads), sorted({type(module).__name__ for module in parts if "GELU" in type(module).__name__})


def _num_blocks(state: dict[str, Tensor]) -> int:
    found = [BLOCK_NUMBER.search(name) for name in state]
    return max((int(match[0]) + 1 for match in found if match), default=0)


def _sources(small: dict[str, Tensor], large: dict[str, Tensor]) -> dict[str, str]:
    """Name in the student -> name in the teacher."""
    n, of = _num_blocks(small), _num_blocks(large)
    taken = [str(round(i * (of - 1) / max(n - 1, 1))) for i in range(n)]
    return {name: BLOCK_NUMBER.sub(lambda match: taken[int(match[0])], name) for name in small}


@torch.no_grad()
def _copy(small: dict[str, Tensor], large: dict[str, Tensor]) -> str:
    """Overwrite the tensors of `small`; says which blocks they came from, and which share of the weights was taken."""
    sources = _sources(small, large)
    for name, source in sources.items():
        small[name].copy_(_leading(large[source], small[name].shape, parts=3 if "in_proj" in name else 1))
    blocks = sorted({int(match[0]) for source in sources.values() if (match := BLOCK_NUMBER.search(source))})
    share = sum(t.numel() for t in small.values()) / sum(t.numel() for t in large.values())
    return f": blocks {', '.join(map(str, blocks))}, {share:.0%} of its weights" if blocks else ", all its weights"


def _leading(source: Tensor, shape: torch.Size, *, parts: int) -> Tensor:
    """The leading entries of every dimension; queries, keys and values lie over each other in one tensor of 3 parts."""
    rows = shape[0] // parts if shape else 0
    cut = tuple(slice(size) for size in (rows, *shape[1:])) if shape else ...
    return torch.cat([part[cut] for part in source.chunk(parts)]) if parts > 1 else source[cut]
