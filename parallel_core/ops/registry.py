"""Where kernels are registered; `selection` chooses which implementation of each runs.

`@kernel` on a function of `reference` makes it a kernel. It stays as it is, the specification; `ops` holds its door, of
the same name, signature and docstring, which runs the selected implementation. `@compiled(reference.f)` or
`@on_ascend(reference.f)` on a function of that signature makes it the implementation of f on CPU or Ascend; arguments
that it does not take go to the reference.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_type_hints

import mindspore as ms
import numpy as np
from mindspore import Tensor

logger = logging.getLogger(__name__)

_NUMPY_FLOAT32 = np.dtype(np.float32)
HALF_NAMES = ("bfloat16", "float16")
"""NumPy's names of the types of 16 bits."""

Implementation = Callable[..., Any]
F = TypeVar("F", bound=Implementation)


class Kernel:
    """A reference, its door, and the implementations that `use_kernels` chooses from."""

    def __init__(self, reference: Implementation) -> None:
        self.reference = self.selected = reference
        self.door = self._make_door()
        self.implementations: dict[str, Implementation] = {}
        """By device, what `use_kernels` selects there."""
        self.needs_gemm = False
        """Whether the one for CPU needs a matrix product for large operands."""

    def _make_door(self) -> Implementation:
        @functools.wraps(self.reference)
        def door(*args: Any, **kwargs: Any) -> Any:
            return self.selected(*args, **kwargs)

        return door


KERNELS: dict[str, Kernel] = {}
"""Every kernel by its name."""


def kernel(reference: F) -> F:
    """Register a function of tensors, in plain MindSpore, as the specification of a kernel; returns it unchanged.

    References call each other as they stand, so that what is selected never changes what they compute.

    Raises:
        TypeError: if there is a kernel of this name.
    """
    name = reference.__name__
    if name in KERNELS:
        raise TypeError(f"there is a kernel {name} already, in {KERNELS[name].reference.__module__}")
    KERNELS[name] = Kernel(reference)
    return reference


def doors() -> dict[str, Implementation]:
    """Return by its name the function of each kernel that runs what is selected."""
    return {name: entry.door for name, entry in KERNELS.items()}


def compiled(
    reference: Implementation,
    *,
    integers: Sequence[str] = (),
    halves: Sequence[str] = (),
    refuses: Callable[..., str] | None = None,
    needs_gemm: bool = False,
) -> Callable[[F], F]:
    """Register a function that calls C++ as the implementation of a kernel on CPU.

    It runs when every tensor is float32, or None, and every NumPy array float32 and C-contiguous; else the reference
    runs, with the same arguments.

    Args:
        reference: the kernel's reference.
        integers: parameters that hold tensors of integers, of any width.
        halves: parameters whose tensor or array may be bfloat16 or float16 too.
        refuses: called with the arguments; says in a few words why they are for the reference, "" if they are not.
        needs_gemm: leave the kernel to the reference where there is no matrix product for large operands.

    Raises:
        TypeError: if the signature is not the reference's.
    """

    def register(function: F) -> F:
        run = _guarded(reference, function, (ms.float32,), integers, refuses, halves)
        entry = _of(reference)
        entry.implementations["CPU"], entry.needs_gemm = run, needs_gemm
        return run

    return register


def on_ascend(
    reference: Implementation,
    *,
    dtypes: Sequence[Any],
    integers: Sequence[str] = (),
    refuses: Callable[..., str] | None = None,
    selected: bool = True,
) -> Callable[[F], F]:
    """Register a function over Ascend's operators as the implementation of a kernel on Ascend.

    Args:
        reference: the kernel's reference.
        dtypes: MindSpore types that its tensors may have.
        integers: see `compiled`.
        refuses: see `compiled`.
        selected: whether `use_kernels` selects it; else a caller that wants it calls it by its name.

    Raises:
        TypeError: if the signature is not the reference's; it may have further keyword-only options with defaults.
    """

    def register(function: F) -> F:
        run = _guarded(reference, function, tuple(dtypes), integers, refuses)
        if selected:
            _of(reference).implementations["Ascend"] = run
        return run

    return register


def _of(reference: Implementation) -> Kernel:
    entry = KERNELS.get(reference.__name__)
    if entry is None or entry.reference is not reference:
        raise TypeError(f"{reference.__name__} is not the reference of a kernel; write @kernel over it")
    return entry


# ---- fallback -------------------------------------------------------------------------------------------------------
def _guarded(
    reference: Implementation,
    function: F,
    dtypes: tuple[Any, ...],
    integers: Sequence[str],
    refuses: Callable[..., str] | None,
    halves: Sequence[str] = (),
) -> F:
    """Return `function`, but calling `reference` with what `function` does not take."""
    own = _own_options(reference, function)
    tensors, arrays = _checked(function, integers)
    wider = (*dtypes, ms.bfloat16, ms.float16)
    taken = [(i, name, wider if name in halves else dtypes) for i, name in tensors]
    name = reference.__name__

    def fall_back(reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        log_fallback(name, reason)
        return reference(*args, **{key: value for key, value in kwargs.items() if key not in own})

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = len(args)
        for i, parameter, types in taken:
            x = args[i] if i < given else kwargs.get(parameter)
            # `in` compares identities first, which is what types have in common; their == takes five times as long.
            if x is not None and x.dtype not in types:
                return fall_back(f"{parameter} is {x.dtype}", args, kwargs)
        for i, parameter in arrays:
            x = args[i] if i < given else kwargs.get(parameter)
            if x is None:
                continue
            known = x.dtype == _NUMPY_FLOAT32 or (parameter in halves and x.dtype.name in HALF_NAMES)
            if not known or not x.flags.c_contiguous:
                return fall_back(f"{parameter} is {x.dtype}, or not contiguous", args, kwargs)
        if refuses is not None:
            reason = refuses(*args, **kwargs)
            if reason:
                return fall_back(reason, args, kwargs)
        return function(*args, **kwargs)

    return cast(F, run)


@functools.cache
def log_fallback(name: str, reason: str) -> None:
    """Say once, which the cache sees to, why a selected implementation did not run."""
    logger.warning(
        "%s: the plain MindSpore operators run where %s, which takes several times as long as the kernel", name, reason
    )


class _Parameter(NamedTuple):
    position: int
    name: str


def _checked(function: Implementation, integers: Sequence[str]) -> tuple[list[_Parameter], list[_Parameter]]:
    """Return the parameters that hold floating-point tensors, and those that hold NumPy arrays.

    Raises:
        TypeError: if there is one of another type that holds any (a tuple of tensors), or `integers` names none.
    """
    names = list(inspect.signature(function).parameters)
    unknown = set(integers) - set(names)
    if unknown:
        raise TypeError(f"{function.__name__} has no parameters {sorted(unknown)}")
    types = get_type_hints(function)
    floating = [_Parameter(i, name) for i, name in enumerate(names) if name not in integers]
    tensors = [p for p in floating if types[p.name] in (Tensor, Tensor | None)]
    arrays = [p for p in floating if types[p.name] in (np.ndarray, np.ndarray | None)]
    for parameter in set(floating) - set(tensors) - set(arrays):
        if {Tensor, np.ndarray} & set(get_args(types[parameter.name])):
            raise TypeError(f"{function.__name__}: {parameter.name} holds tensors or arrays whose type is unchecked")
    return tensors, arrays


def _own_options(reference: Implementation, function: Implementation) -> set[str]:
    """Return the names of the options that `function` has beyond the reference's parameters.

    Where the reference says `**options`, `function` may spell them out, or say so too.

    Raises:
        TypeError: if the other parameters differ in name, order, kind or default.
    """
    want, got = (dict(inspect.signature(f).parameters) for f in (reference, function))
    open_ended = [name for name, parameter in want.items() if parameter.kind is parameter.VAR_KEYWORD]
    for name in open_ended:
        del want[name]
    added = [parameter for name, parameter in got.items() if name not in want and name not in open_ended]
    shared = [(p.name, p.kind, p.default) for name, p in got.items() if name in want]
    optional = all(p.kind is p.KEYWORD_ONLY and (open_ended or p.default is not p.empty) for p in added)
    if shared != [(p.name, p.kind, p.default) for p in want.values()] or not optional:
        raise TypeError(
            f"{function.__qualname__}{inspect.signature(function)} cannot stand for {reference.__name__}"
            f"{inspect.signature(reference)}: give it these parameters and defaults"
        )
    return set() if open_ended else {parameter.name for parameter in added}
