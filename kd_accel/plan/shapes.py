"""Models without memory: tensors with shapes and types that run every operation, and hold no numbers.

with shapes_only():
    features = build()(torch.zeros(8, 3, 224, 224))
features.shape
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

UNSAFE_VIEW = torch.ops.aten._unsafe_view.default  # a view, but its schema does not say so
ASK_FOR_A_NUMBER = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
SMALL = 1024  # numbers
META = torch.device("meta")


@contextmanager
def shapes_only() -> Iterator[None]:
    """Tensors made inside take no memory. Whoever asks for a number that depends on weights or inputs gets a 1.

    torch's FakeTensorMode does the same, and more that is not needed here, in several times as long.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation, whose FLOPs nobody counts
    try:
        with _Shapes():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """As module.to(dtype), which cannot swap fake parameters."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to(dtype), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)


class _Shape(Tensor):
    """A CPU tensor to all who ask, autocast and autograd among them.

    meta    a meta tensor, which knows its storage
    known   the tensor itself, if it is small and does not depend on weights or inputs: timm asks for dropout rates
    """

    meta: Tensor
    known: Tensor | None

    @staticmethod
    def __new__(cls, meta: Tensor):
        layout = {"strides": meta.stride(), "storage_offset": meta.storage_offset(), "dtype": meta.dtype}
        shape = Tensor._make_wrapper_subclass(cls, meta.shape, **layout, device="cpu")
        shape.meta, shape.known = meta, None
        return shape

    def tolist(self):
        """Torch has none for subclasses."""
        return [part.tolist() for part in self] if self.ndim else self.item()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Shapes(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def operate(operation, args: tuple, kwargs: dict) -> Any:
    """operation(*args, **kwargs) for other modes: inside shapes_only() without torch's way from this one to its own."""
    if not isinstance(_get_current_dispatch_mode(), _Shapes):
        return operation(*args, **kwargs)
    with torch._C._DisableTorchDispatch():
        return _run(operation, args, kwargs)


@dataclass(frozen=True, slots=True)
class _Layout:
    """What torch.empty_strided wants to know."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


_layouts: dict[tuple, Any] = {}  # of results, by operation and arguments: many meta kernels are slow Python


def _run(operation, args: tuple, kwargs: dict) -> Any:
    """On meta tensors."""
    given = [shape for shape in tensors_in((args, kwargs)) if isinstance(shape, _Shape)]
    if operation in ASK_FOR_A_NUMBER:
        return 1 if given[0].known is None else given[0].known.item()
    if operation._schema.is_mutable:
        for shape in given:
            shape.known = None
        return _shared(operation, args, kwargs, given)
    made = _shared(operation, args, kwargs, given) if _views(operation) else _new(operation, args, kwargs)
    if all(shape.known is not None for shape in given) and _is_constant(operation, made):
        known = operation(*_each(_known_of, args), **_each(_known_of, kwargs))
        for shape, value in zip(tensors_in(made), tensors_in(known), strict=True):
            shape.known = value
    return made


def _shared(operation, args: tuple, kwargs: dict, given: list[_Shape]) -> Any:
    """What comes out, whatever it shares with what is given."""
    if len(given) == 1 and args[0] is given[0] and not tensors_in((args[1:], kwargs)):  # as nearly all views are
        made = operation(given[0].meta, *args[1:], **kwargs)
        return given[0] if made is given[0].meta else _each(_Shape, made)
    shapes = {id(shape.meta): shape for shape in given}
    return _each(
        lambda x: (shapes.get(id(x)) if id(x) in shapes else _Shape(x)) if isinstance(x, Tensor) else x,
        _on_meta(operation, args, kwargs),
    )


def _new(operation, args: tuple, kwargs: dict) -> Any:
    """What comes out, if it shares nothing; the operation itself runs only once."""
    key = operation, _key(args), _key(kwargs)
    if key not in _layouts:
        _layouts[key] = _each(_layout_of, _on_meta(operation, args, kwargs))
    return _each(_empty, _layouts[key])


def _on_meta(operation, args: tuple, kwargs: dict) -> Any:
    kwargs = _each(_meta_of, kwargs)
    if _takes_device(operation) and not tensors_in(args):
        kwargs["device"] = META
    return operation(*_each(_meta_of, args), **kwargs)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with every part of its tuples, lists and dicts changed; torch's pytree was most of `plan`'s time."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_each(change, part) for part in value])
    if kind is dict:
        return {name: _each(change, part) for name, part in value.items()}
    return change(value)


def tensors_in(value: Any) -> list[Tensor]:
    """Those in nested tuples, lists and dicts."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, tuple | list):
        for part in value:
            _collect(part, found)
    elif isinstance(value, dict):
        for part in value.values():
            _collect(part, found)


def _key(value: Any) -> Any:
    """What decides the layouts of results: of tensors theirs. 1, 1.0 and True are not the same."""
    if isinstance(value, tuple | list):
        return tuple([_key(part) for part in value])
    if isinstance(value, dict):
        return tuple([(name, _key(part)) for name, part in value.items()])
    return _layout_of(value) if isinstance(value, Tensor) else (type(value), value)


def _meta_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.meta if isinstance(value, _Shape) else value.to(META)
    return META if isinstance(value, torch.device) else value


def _known_of(value: Any) -> Any:
    return value.known if isinstance(value, _Shape) else value


def _layout_of(value: Any) -> Any:
    return _Layout(value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _empty(value: Any) -> Any:
    if isinstance(value, _Layout):
        return _Shape(torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=META))
    return value


@cache
def _takes_device(operation) -> bool:
    return any(argument.name == "device" for argument in operation._schema.arguments)


@cache
def _views(operation) -> bool:
    """What it is given; or it may."""
    return operation is UNSAFE_VIEW or any(argument.alias_info is not None for argument in operation._schema.arguments)


def _is_constant(operation, made: Any) -> bool:
    small = all(shape.numel() <= SMALL for shape in tensors_in(made))
    return small and torch.Tag.nondeterministic_seeded not in operation.tags


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Of a real tensor or of one inside shapes_only()."""
    return (tensor.meta if isinstance(tensor, _Shape) else tensor).untyped_storage()
