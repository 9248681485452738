"""Fuzzing of the readers: mutated inputs in a process of their own, which a crash, a hang or a memory bomb may end.

A `Target` makes one input from a random generator (mutations of valid ones, see `mutate_bytes` and `mutate_value`) and
feeds it to a reader. The property is always the same: the reader returns, or raises a `ParallelCoreError` with a
printable message, within the target's seconds and `LIMIT_BYTES` of memory. Input number `n` depends on the target and
`n` alone, so a failure is seen again with `python -m tests.helpers.fuzzing FILE NAME N 1`.
"""

from __future__ import annotations

import faulthandler
import importlib
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_core.errors import ParallelCoreError

REPO = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 3 << 30

INTERESTING_BYTES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\n", b'"', b"{", b"[", b"\xe2\x80\xae", b"\x1b[31m")
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 255, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "x", "\0", "\ud800", "a\nINFO - forged\x1b[31m", "../x", "/dev/zero", "0" * 5000),
    *([], [0], [[]], {}, {"a": 1}, [1] * 40, {"": None}, "1", "float32", "é", "True"),
)


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        make: gives one input, in whatever form `read` takes it.
        read: hands it to the reader; the folder is empty and thrown away afterwards.
        limit_s: for inputs that take milliseconds: what is slower has found a loop that grows with the wrong thing.
    """

    make: Callable[[random.Random], Any]
    read: Callable[[Any, Path], Any]
    limit_s: int = 20


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return `data` with a few bits flipped, parts cut out, doubled, moved or overwritten."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        length = rng.choice((1, 1, 2, 4, 16, 100))
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length] * rng.choice((1, 2, 50))
        elif kind == 4:
            out[at : at + 1] = rng.choice(INTERESTING_BYTES)
        elif kind == 5:
            source = rng.randrange(len(out) + 1)
            out[at : at + length] = out[source : source + length]
        else:
            out[at : at + length] = rng.randbytes(length)
    return bytes(out)


def mutate_value(rng: random.Random, value: Any) -> Any:
    """Return a JSON-like value with one to three parts of another type, missing, added or repeated."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _mutate_once(rng, value)
    return value


def _mutate_once(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        kind = rng.randrange(12)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[rng.choice(("", "x", "\0", "\ud800", "a\nb\x1b[31m", f"{key}x"))] = changed.pop(key)
        elif kind == 2:
            changed[rng.choice(list(value))] = value[key]
        else:
            changed[key] = _mutate_once(rng, value[key])
        return changed
    if isinstance(value, (list, tuple)) and value and rng.random() < 0.8:
        changed_list = list(value)
        at = rng.randrange(len(changed_list))
        kind = rng.randrange(6)
        if kind == 0:
            del changed_list[at]
        elif kind == 1:
            changed_list[at:at] = [changed_list[at]] * rng.choice((1, 2, 30))
        else:
            changed_list[at] = _mutate_once(rng, changed_list[at])
        return type(value)(changed_list)
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-2, -1, 1, 2, 64, 10**6, -value, -2 * value, 2**40))
    if rng.random() < 0.05:
        for _ in range(rng.choice((50, 90, 200))):
            value = [value]
        return value
    return rng.choice(ODD_VALUES)


def fuzz(file: str, name: str, count: int, first: int = 0) -> None:
    """Run inputs `first` to `first + count` of the target `name` in the `TARGETS` of the test module `file`.

    Raises:
        AssertionError: an input broke the property; the message has the input, the error and how to see it again.
    """
    command = [sys.executable, "-m", "tests.helpers.fuzzing", file, name, str(first), str(count)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, timeout=120 + count, check=False)
    if done.returncode:
        output = done.stdout.decode(errors="replace")
        at = output.splitlines()[-1] if output else "start-up"
        errors = done.stderr.decode(errors="replace")[-6000:]
        raise AssertionError(f"{' '.join(command)}\nended with status {done.returncode} at input {at}:\n{errors}")


def _run(target: Target, label: str, first: int, count: int) -> None:
    # What Python cannot catch (a loop in C, a signal) ends this process, and the number of the input was the last word.
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(first, first + count):
        print(number, flush=True)
        made = target.make(random.Random(f"{label} {number}"))
        with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
            signal.alarm(target.limit_s)
            try:
                target.read(made, Path(folder))
            except ParallelCoreError as error:
                _check_message(error, made)
            except BaseException:  # noqa: BLE001 - whatever it is, the input must be shown with it
                traceback.print_exc()
                print(f"input: {made!r:.3000}", file=sys.stderr)
                sys.exit(1)
            finally:
                signal.alarm(0)


def _check_message(error: ParallelCoreError, made: Any) -> None:
    """End the process if the message cannot be printed, or could pass for something else on a terminal."""
    text = str(error)
    forged = any(line.startswith(("INFO - ", "WARNING - ", "ERROR - ")) for line in text.splitlines()[1:])
    if forged or not all(character.isprintable() or character in "\n\t" for character in text):
        print(f"a message that is not printable: {text!r:.2000}\ninput: {made!r:.3000}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _file, _name, _first, _count = sys.argv[1:5]
    sys.path.insert(0, str(Path(_file).parent))
    _run(importlib.import_module(Path(_file).stem).TARGETS[_name], _name, int(_first), int(_count))
