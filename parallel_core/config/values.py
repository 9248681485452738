"""What a user wrote, and its conversion to the type the table asks for."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass

from parallel_core.config.argument import Argument


@dataclass(frozen=True)
class Given:
    """One value from the user, in the user's own terms."""

    name: str
    """The argument's name in the table, or the user's own for an argument of an extra group."""
    value: object
    source: str
    """Where it stands: file:line, a flag, or the name of a defaults dictionary."""
    written: str
    """The key or flag as it was typed."""
    raw: object = None
    """The value as it was typed."""

    @property
    def is_substituted(self) -> bool:
        """Whether the value stands in an environment variable, which may be secret: it is not shown."""
        return self.value != self.raw and "${" in str(self.raw)

    @property
    def terms(self) -> str:
        """The value as the user would recognise it: `--flag value`, or `file:line: key: value`."""
        if self.written.startswith("--"):
            return self.written if isinstance(self.raw, bool) else f"{self.written} {_shown(self.raw)}"
        return f"{self.source}: {self.written}: {_shown(self.raw)}"


def _shown(raw: object) -> str:
    if isinstance(raw, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in raw):
        raw = " ".join(map(_safe_text, raw))
    text = str(raw).lower() if isinstance(raw, bool) else _safe_text(raw)
    return shortened(text if text.isprintable() else repr(text))


def _safe_text(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes no integer of more than 4300 digits.
        return "a number of thousands of digits"


def shortened(text: str, most: int = 200) -> str:
    """Return `text`, cut where it would fill the screen."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


class Unreadable(ValueError):
    """The value has the wrong type.

    Attributes:
        raw: the value.
        rule: what would be right.
    """

    def __init__(self, raw: object, rule: str) -> None:
        super().__init__(raw, rule)
        self.raw, self.rule = raw, rule

    def __str__(self) -> str:
        return self.about(self.raw)

    def about(self, raw: object) -> str:
        """Return what is wrong in terms of `raw`, the value as it was written."""
        return f"is {shortened(repr(raw) if isinstance(raw, str) else _safe_text(raw))}; {self.rule}"


_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


def convert(argument: Argument, raw: object) -> object:
    """Return `raw` in the argument's type; None stays None, and words such as "1e-5" become numbers.

    Raises:
        Unreadable: The value is not of that type, is not finite, or is not one of the choices.
    """
    word = raw[0] if isinstance(raw, list) and len(raw) == 1 else raw
    if word is None or (isinstance(word, str) and word.strip() in ("None", "null", "~")):
        return None
    if argument.is_switch:
        return _boolean(raw)
    if argument.kind == "int":
        return _integer(raw)
    if argument.kind == "float":
        return _number(raw)
    if argument.kind == "layers":
        return _layers(raw)
    if argument.kind == "pattern":
        return _pattern(raw)
    if argument.kind in ("ints", "floats", "strs"):
        return _list(argument, raw)
    return _word(argument, raw)


def _boolean(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    if word in _TRUE | _FALSE:
        return word in _TRUE
    raise Unreadable(raw, "it takes true or false")


def _integer(raw: object) -> int:
    value = _number(raw, "a whole number")
    if value != int(value):
        raise Unreadable(raw, "it takes a whole number")
    if abs(value) >= 2**63:
        raise Unreadable(raw, "it takes a whole number of at most 18 digits")
    return int(raw) if isinstance(raw, int) else int(value)


def _number(raw: object, wanted: str = "a number") -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise Unreadable(raw, f"it takes {wanted}")
    try:
        value = float(str(raw).replace("_", "") if isinstance(raw, str) else raw)
    except (ValueError, OverflowError):
        raise Unreadable(raw, f"it takes {wanted}") from None
    if not math.isfinite(value):
        raise Unreadable(raw, "it takes a finite number")
    return value


_NUMBERS = re.compile(r"[-+\d\s,.()\[\]eE_]*")
_DEEPEST = 4
"""Brackets within brackets: a list of lists takes two."""


def _literal(raw: object) -> object:
    """Return the numbers of a text such as `[[4,4],[4,3]]`, or else its words."""
    if not isinstance(raw, str):
        return raw
    # What Python's parser is given is small and flat: it fails in many ways, and crashes, on other texts.
    depth = deepest = 0
    for character in raw:
        depth += (character in "([") - (character in ")]")
        deepest = max(deepest, depth)
    if _NUMBERS.fullmatch(raw) and deepest <= _DEEPEST and not re.search(r"[-+]\s*[-+]", raw):
        try:
            return ast.literal_eval(raw)
        except (ValueError, SyntaxError):
            pass
    return [word for word in raw.replace(",", " ").split() if word]


def _layers(raw: object) -> tuple[tuple[int, ...], ...]:
    """Read layers per [pipeline rank][chunk]; a flat list has one chunk per rank."""
    if isinstance(raw, (list, tuple)) and len(raw) == 1 and isinstance(raw[0], str):
        raw = raw[0]
    value = _literal(raw)
    if not isinstance(value, (list, tuple)):
        value = [value]
    rows = [row if isinstance(row, (list, tuple)) else [row] for row in value]
    try:
        layers = tuple(tuple(_integer(number) for number in row) for row in rows)
    except Unreadable as error:
        raise Unreadable(error.raw, f"{error.rule}, layers of [pipeline rank][chunk] such as [[4,4],[4,3]]") from None
    if len({len(row) for row in layers}) > 1:
        raise Unreadable(raw, "every pipeline rank needs the same number of chunks")
    if any(number < 0 for row in layers for number in row):
        raise Unreadable(raw, "a number of layers is not negative")
    return layers


_LONGEST_PATTERN = 10_000


def _pattern(raw: object) -> int | tuple[int, ...]:
    """Read which layers are meant: N for every N-th, or one 0 or 1 per layer, also as "([1]*3+[0])*4"."""
    word = raw[0] if isinstance(raw, (list, tuple)) and len(raw) == 1 and isinstance(raw[0], str) else raw
    try:
        text = word.strip()[:_LONGEST_PATTERN] if isinstance(word, str) else ""
        value = _expanded(ast.parse(text, mode="eval").body) if isinstance(word, str) else word
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        value = None
    if type(value) is int and value > 0:
        return value
    if isinstance(value, (list, tuple)) and value and all(type(item) is int and item in (0, 1) for item in value):
        return tuple(value)
    raise Unreadable(raw, "it takes a number N above zero, or a list of 0 and 1 such as [1,1,0]*4")


def _expanded(node: ast.expr) -> int | list[int]:
    """Return the value of a literal number or list, or of lists added and repeated."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_expanded(item) for item in node.elts]
        if all(isinstance(item, int) for item in items):
            return items  # type: ignore[return-value]
    if isinstance(node, ast.BinOp):
        left, right = _expanded(node.left), _expanded(node.right)
        if isinstance(node.op, ast.Mult) and isinstance(left, int) and isinstance(right, list):
            left, right = right, left
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            if len(left) * right <= _LONGEST_PATTERN:
                return left * right
        elif isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
    raise ValueError(ast.dump(node)[:40])


def _list(argument: Argument, raw: object) -> tuple[object, ...]:
    if argument.kind != "strs" and isinstance(raw, (list, tuple)) and len(raw) == 1:
        raw = raw[0]  # one word, which may hold a list: "(8,0)"
    if isinstance(raw, str):
        value = _literal(raw) if argument.kind != "strs" else raw.split()
    else:
        value = raw
    items = value if isinstance(value, (list, tuple)) else [value]
    if argument.kind == "ints":
        return tuple(_integer(item) for item in items)
    if argument.kind == "floats":
        return tuple(_number(item) for item in items)
    return tuple(str(item) for item in items)


def _word(argument: Argument, raw: object) -> object:
    if isinstance(raw, (list, tuple, dict)) and not (len(raw) == 1 and isinstance(raw, (list, tuple))):
        raise Unreadable(raw, "it takes one word")
    word = str(raw[0] if isinstance(raw, (list, tuple)) else raw)
    word = dict(argument.renamed).get(word, word)
    if argument.choices and word not in argument.choices:
        by_case = {choice.lower(): choice for choice in argument.choices}
        if word.lower() not in by_case:
            raise Unreadable(raw, f"it takes {', '.join(argument.choices)}")
        word = by_case[word.lower()]
    return word


def is_memory_size(text: str) -> bool:
    """Return whether `mindspore.runtime.set_memory` takes a size: a number above zero, then GB."""
    return re.fullmatch(r"(?=.*[1-9])(0|[1-9][0-9]*)(\.[0-9]+)?GB", text, re.ASCII) is not None
