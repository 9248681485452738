"""What a pickle would do, read from its instructions before any of them is carried out."""

from __future__ import annotations

import pickle
import pickletools
from dataclasses import dataclass

MAX_DEPTH = 100
MAX_KEY_NODES = 1000
"""Values in a mapping's key, shared ones counted each time: hashing and comparing visit them all."""
_FORBIDDEN_OPCODES = frozenset(
    ["EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"]
)


@dataclass(frozen=True)
class _Extent:
    """How deep a value is nested, and how many values are in it, shared ones counted each time."""

    depth: int = 0
    nodes: int = 1


_LEAF = _Extent()


def check_opcodes(data: bytes) -> None:
    """Refuse, before anything is built, what would make the C unpickler or Python itself misbehave.

    Those are instructions torch never writes, memo numbers that allocate without limit, nesting so deep that
    hashing the result would overflow the C stack, and keys with so much in them that hashing them would never end.
    Extents follow the stack as `pickletools` describes it; of a list or a mapping that is filled after it was put into
    the memo they say too little, but neither can be part of a key.

    Raises:
        pickle.UnpicklingError: it holds one of those, or is cut short.
    """
    stack: list[_Extent | None] = []  # None is a mark
    memo: dict[int, _Extent] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _FORBIDDEN_OPCODES:
            raise pickle.UnpicklingError(f"instruction {name}")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(memo) if name == "MEMOIZE" else int(argument or 0)
            if number > len(data):
                raise pickle.UnpicklingError(f"memo number {number}")
            memo[number] = stack[-1] or _LEAF
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif opcode.stack_before or opcode.stack_after:
            _follow(opcode, stack)


def _follow(opcode: pickletools.OpcodeInfo, stack: list[_Extent | None]) -> None:
    """Do to the stack of extents what an instruction does to the stack of values."""
    if opcode.name == "MARK":
        stack.append(None)
        return
    taken: list[_Extent] = []  # the last one first
    if pickletools.markobject in opcode.stack_before:
        while (extent := stack.pop()) is not None:
            taken.append(extent)
        above = 0 if opcode.stack_before[0] is pickletools.markobject else 1
    else:
        taken = [stack.pop() or _LEAF for _ in opcode.stack_before]
        above = 1 if opcode.name in ("APPEND", "SETITEM") else 0
        if above:
            stack.append(taken.pop())
    _check_keys(opcode.name, taken)
    depth = max((extent.depth for extent in taken), default=-1) + 1
    nodes = sum(extent.nodes for extent in taken) + 1
    if above:  # something is put into a container, which stays where it is
        container = stack.pop() or _LEAF
        depth, nodes = max(depth, container.depth), nodes + container.nodes
    if depth > MAX_DEPTH:
        raise pickle.UnpicklingError(f"values nested more than {MAX_DEPTH} deep")
    stack.extend(_Extent(depth, nodes) for _ in opcode.stack_after)


def _check_keys(name: str, taken: list[_Extent]) -> None:
    """Check what an instruction is about to hash, given the values it takes, the last one first."""
    keys = taken[1::2] if name in ("SETITEM", "SETITEMS", "DICT") else taken
    if name in ("SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET"):
        for extent in keys:
            if extent.nodes > MAX_KEY_NODES:
                raise pickle.UnpicklingError(f"a key of more than {MAX_KEY_NODES} values")
