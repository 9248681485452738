"""Registration of kernels: a toy one, what goes to the reference, and that declarations agree with the C++ sources."""

from __future__ import annotations

import ctypes
import inspect
import re
from types import SimpleNamespace
from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core import ops
from parallel_core.ops import (
    build,
    library,
    reference,
    reference_experts,
    reference_layer,
    reference_meetings,
    registry,
)
from parallel_core.ops.registry import KERNELS, compiled, doors, kernel, on_ascend

REFERENCES = (reference, reference_experts, reference_layer, reference_meetings)

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)

SHARED = {"attention_mask", "cast"}
"""Functions of the reference that `ops` has as they are."""


@pytest.fixture(autouse=True)
def restore():
    known = dict(KERNELS)
    yield
    KERNELS.clear()
    KERNELS.update(known)
    ops.use_kernels("local")


@pytest.fixture
def toy():
    """A kernel as a file would define it; each of its functions says that it ran."""
    ran = []

    @kernel
    def scaled(x: Tensor, ids: Tensor | None, into: np.ndarray, factor: float = 2.0) -> Tensor:
        """Return factor * x, in x's dtype."""
        ran.append("reference")
        return x * factor

    def too_large(x: Tensor, ids: Tensor | None, into: np.ndarray, factor: float = 2.0) -> str:
        return "the factor is large" if factor > 9 else ""

    @compiled(scaled, integers=["ids"], refuses=too_large)
    def _scaled(x: Tensor, ids: Tensor | None, into: np.ndarray, factor: float = 2.0) -> Tensor:
        ran.append("compiled")
        return Tensor(x.asnumpy() * np.float32(factor))

    def call(*args, **kwargs):
        ran.clear()
        value = doors()["scaled"](*args, **kwargs)
        (by,) = ran
        return by, value.asnumpy().tolist()

    return SimpleNamespace(reference=scaled, call=call)


X, IDS, INTO = Tensor(np.array([1.0, 3.0], np.float32)), Tensor(np.array([1, 2])), np.zeros((2, 2), np.float32)


def compiled_kernels():
    sentence = ops.use_kernels("auto", num_threads=1)
    if not sentence.startswith("fused"):
        pytest.skip(sentence)


def test_a_door_runs_what_is_selected_and_the_reference_stays_itself(toy):
    door = doors()["scaled"]
    assert door.__doc__ == toy.reference.__doc__ and inspect.signature(door) == inspect.signature(toy.reference)
    assert toy.call(X, None, INTO)[0] == "reference"
    compiled_kernels()
    assert toy.call(X, None, INTO) == ("compiled", [2.0, 6.0])
    assert toy.call(X, IDS, into=INTO, factor=3.0) == ("compiled", [3.0, 9.0])
    assert toy.reference.__module__ == __name__ and toy.reference(X, IDS, INTO) is not None
    ops.use_kernels("local")
    assert toy.call(X, None, INTO)[0] == "reference"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"x": X.astype(ms.float16)}, "x is Float16"),
        ({"x": X.astype(ms.float64)}, "x is Float64"),
        ({"x": X.astype(ms.int32)}, "x is Int32"),
        ({"into": INTO.astype(np.float64)}, "into is float64"),
        ({"into": np.zeros((2, 4), np.float32)[:, ::2]}, "into is float32, or not contiguous"),
        ({"factor": 10.0}, "the factor is large"),
    ],
)
def test_what_a_compiled_kernel_does_not_take_goes_to_the_reference_and_is_said_once(toy, caplog, change, reason):
    compiled_kernels()
    arguments = {"x": X, "ids": IDS, "into": INTO, "factor": 3.0, **change}
    with caplog.at_level("INFO", logger=registry.logger.name):
        for _ in range(2):
            by, value = toy.call(*arguments.values())
            assert by == "reference" and value == [arguments["factor"], 3 * arguments["factor"]]
            assert toy.call(**arguments)[0] == "reference"
    (record,) = caplog.records
    assert record.message.startswith("scaled: the plain MindSpore operators run where ") and reason in record.message


def test_an_implementation_for_ascend_is_selected_there_and_may_have_options_of_its_own(toy):
    ran = []

    @on_ascend(toy.reference, dtypes=(ms.float16,), integers=["ids"])
    def scaled(x: Tensor, ids: Tensor | None, into: np.ndarray, factor: float = 2.0, *, layout: str = "SBH") -> Tensor:
        ran.append(layout)
        return x * factor

    with mock.patch.object(ms, "get_context", lambda name: "Ascend"):
        sentence = ops.use_kernels()
    named = ("activation, add_rms_norm, attention_block, attention_block_grad, "
             "attention_of_meetings, attention_of_meetings_grad, bidirectional_attention, "
             "causal_attention, causal_attention_packed, embedding, embedding_grad_table_, gather_rows, "
             "grouped_linear, grouped_linear_grad_input, grouped_linear_grad_weight, grouped_linear_grad_weight_, "
             "join_blocks, latent_heads, linear_grad_weight_, rms_norm, rotary, rotary_packed, scaled, "
             "scaled_activation, sum_rows, vocab_grad_logits")
    assert sentence == f"Ascend operators for {named}; plain MindSpore operators for the others"
    doors()["scaled"](X.astype(ms.float16), None, INTO)
    scaled(X.astype(ms.float16), None, INTO, layout="BNSD")
    assert ran == ["SBH", "BNSD"]
    assert scaled(X, None, INTO, layout="BNSD").asnumpy().tolist() == [2.0, 6.0]  # without an option it does not know
    assert ran == ["SBH", "BNSD"] and ops.layer_norm is not reference.layer_norm


def test_without_kernels_for_a_device_the_reference_runs_there():
    with mock.patch.object(ms, "get_context", lambda name: "GPU"):
        sentence = ops.use_kernels()
    assert sentence == "plain MindSpore operators (the fused C++ kernels are for CPU, not GPU)"
    assert all(entry.selected is entry.reference for entry in KERNELS.values())


def test_mistakes_of_registration_are_errors(toy):
    with pytest.raises(TypeError, match="there is a kernel scaled already"):
        kernel(toy.reference)
    with pytest.raises(TypeError, match="elsewhere is not the reference of a kernel"):

        @compiled(lambda_named("elsewhere"))
        def _elsewhere(x: Tensor) -> Tensor:
            return x

    def renamed(y: Tensor, ids: Tensor | None, into: np.ndarray, factor: float = 2.0) -> Tensor: ...

    def another_default(x: Tensor, ids: Tensor | None, into: np.ndarray, factor: float = 1.0) -> Tensor: ...

    def swapped(ids: Tensor | None, x: Tensor, into: np.ndarray, factor: float = 2.0) -> Tensor: ...

    def demanding(x: Tensor, ids: Tensor | None, into: np.ndarray, factor: float = 2.0, *, more: int) -> Tensor: ...

    for function in (renamed, another_default, swapped, demanding):
        with pytest.raises(TypeError, match=r"cannot stand for scaled\(x"):
            compiled(toy.reference)(function)
    with pytest.raises(TypeError, match=r"no parameters \['index'\]"):
        compiled(toy.reference, integers=["index"])(toy.reference)

    @kernel
    def joined(parts: tuple[Tensor, ...]) -> Tensor: ...

    with pytest.raises(TypeError, match="joined: parts holds tensors or arrays whose type is unchecked"):
        compiled(joined)(joined)


def lambda_named(name):
    def function(x: Tensor) -> Tensor:
        return x

    function.__name__ = name
    return function


def test_every_public_function_of_the_reference_is_in_ops():
    """A function that `@kernel` was forgotten on would have a type, but not exist."""
    public = {
        name
        for module in REFERENCES
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public == KERNELS.keys() ^ SHARED and public <= set(ops.__all__)
    for name in KERNELS:
        module = next(m for m in REFERENCES if hasattr(m, name))
        assert getattr(ops, name) is KERNELS[name].door and getattr(module, name) is KERNELS[name].reference
        assert getattr(ops, name).__doc__ == getattr(module, name).__doc__


def test_every_implementation_has_the_signature_of_its_reference():
    compiled_kernels()
    found = 0
    for name, entry in KERNELS.items():
        for implementation in entry.implementations.values():
            want, got = (list(inspect.signature(f).parameters) for f in (entry.reference, implementation))
            own = [] if want[-1] == "options" else got[len(want) :]  # options of its own, with defaults
            assert got == want + own or (want[-1] == "options" and got[: len(want) - 1] == want[:-1]), name
            found += 1
    assert found >= 24


C_TYPES = {"i64": "L", "int64_t": "L", "int": "I", "float": "F", "u64": "U"}


def test_c_functions_are_declared_as_they_are_written():
    """A wrong letter would be read as another number, or as another address, without an error."""
    compiled_kernels()
    written = {}
    for path in build.sources():
        text = path.read_text(encoding="utf-8")
        for result, name, arguments in re.findall(r"^PC_API (\w+) (pc_\w+)\(([^)]*)\)", text, re.MULTILINE):
            kinds = [a.replace("const ", "").split() for a in arguments.split(",")]
            letters = "".join("P" if "*" in "".join(kind) else C_TYPES[kind[0]] for kind in kinds)
            written[name] = letters, {"void": None, "double": ctypes.c_double, "int": ctypes.c_int}[result]
    letter_of = {kind: letter for letter, kind in library._TYPES.items()}
    declared = {
        name: ("".join(letter_of[kind] for kind in kinds), returns)
        for name, (kinds, returns) in library._declared.items()
    }
    assert declared == written
