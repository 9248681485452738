"""Whole answers from their pieces, while the client is there."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from starlette.requests import Request

from parallel_core.generate.requests import TokenLogprob
from parallel_core.serve.service import Ticket


@dataclass
class Answer:
    """One whole answer; attributes as in `service.Piece`."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class ClientGone(Exception):
    """Nobody waits for the answer."""


async def collected(request: Request, ticket: Ticket) -> list[Answer]:
    """Return a ticket's answers once all have ended.

    Raises:
        ClientGone: the client has closed its connection.
        Unavailable: the engine has ended.
    """
    answers = [Answer(i) for i in range(ticket.count)]

    async def collect() -> None:
        async for piece in ticket.pieces():
            answer = answers[piece.index]
            answer.text += piece.text
            answer.tokens += piece.tokens
            answer.logprobs += piece.logprobs
            answer.prompt_logprobs = piece.prompt_logprobs
            answer.finish_reason = piece.finish_reason

    task = asyncio.ensure_future(collect())
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        ticket.leave()
        await asyncio.gather(task, gone, return_exceptions=True)
    return answers


async def _until_gone(request: Request) -> None:
    """Return once the client has closed its connection; the body has been read by then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
