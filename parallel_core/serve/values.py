"""Reading what clients send: JSON objects whose fields are known, each of its type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from parallel_core.errors import ParallelCoreError
from parallel_core.records import parse_json, show


class Refused(ParallelCoreError):
    """A request that cannot be answered; the client is told why.

    Args:
        message: what is wrong, and what to send instead.
        status: of the answer.
        parameter: the field it is about.
        code: OpenAI's word for it.
    """

    def __init__(self, message: str, status: int = 400, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.parameter, self.code = status, parameter, code


async def json_object(request: Request) -> dict[str, Any]:
    """Return the request's body.

    Raises:
        Refused: it is no JSON object.
    """
    body = await request.body()
    try:
        values = parse_json(body, "the body", ParallelCoreError)
    except ParallelCoreError as error:
        raise Refused(str(error), code="invalid_json") from None
    if not isinstance(values, dict):
        raise Refused(f"the body is a {type(values).__name__}; send a JSON object")
    return values


class Fields:
    """The fields of a JSON object, taken one by one; what nobody takes is refused."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {key: value for key, value in values.items() if value is not None}

    def take(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a field, or `default` where it is not there or null.

        Raises:
            Refused: it has another type.
        """
        value = self._values.pop(name, None)
        if value is None:
            return default
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if isinstance(value, bool) and bool not in allowed or not isinstance(value, allowed):
            words = " or ".join(_WORDS[kind] for kind in allowed)
            raise Refused(f"{name} is {show(value)}; send {words}", parameter=name)
        return value

    def number(self, name: str, default: float | None = None) -> Any:
        """Return a number."""
        return self.take(name, (int, float), default)

    def ignore(self, *names: str) -> None:
        """Take fields that change nothing here."""
        for name in names:
            self._values.pop(name, None)

    def refuse(self, name: str, why: str, neutral: tuple[Any, ...] = ()) -> None:
        """Refuse a field that asks for what is not built, unless its value asks for nothing.

        Raises:
            Refused: it does.
        """
        value = self._values.pop(name, None)
        if value is not None and value not in neutral:
            raise Refused(f"{name}: {why}", parameter=name)

    def end(self) -> None:
        """Refuse what is left.

        Raises:
            Refused: something is.
        """
        if self._values:
            names = ", ".join(sorted(map(show, self._values)))
            raise Refused(f"unknown field(s) {names}; leave them out", parameter=next(iter(self._values)))


_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
          dict: "an object"}  # fmt: skip
