"""The fuzzing harness notices what it is there for."""

from __future__ import annotations

import os
import signal

import pytest

from parallel_core.errors import DataError
from tests.helpers.fuzzing import Target, fuzz


def _named(value, folder):
    raise DataError(f"a named error about {value}")


def _sleep(value, folder):
    while True:
        pass


def _injected(value, folder):
    error = DataError("x")
    error.args = ("file\nINFO - Loaded checkpoint",)
    raise error


TARGETS = {
    "good": Target(lambda rng: rng.random(), _named),
    "traceback": Target(lambda rng: rng.random(), lambda value, folder: [][0]),
    "crash": Target(lambda rng: rng.random(), lambda value, folder: os.kill(os.getpid(), signal.SIGSEGV)),
    "hang": Target(lambda rng: rng.random(), _sleep, limit_s=1),
    "memory": Target(lambda rng: rng.random(), lambda value, folder: bytearray(8 << 30)),
    "injection": Target(lambda rng: rng.random(), _injected),
}


def test_named_errors_pass():
    fuzz(__file__, "good", 20)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("traceback", "IndexError"),
        ("crash", "status -11 at input 0"),
        ("hang", "status -14 at input 0"),
        ("memory", "MemoryError"),
        ("injection", "a message that is not printable"),
    ],
)
def test_everything_else_fails_with_the_input(name, words):
    with pytest.raises(AssertionError, match=words):
        fuzz(__file__, name, 20)
