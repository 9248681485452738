"""Requests from rank 0 to the models that share them, and answers back; all ranks go on step by step together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from parallel_core.context import ParallelContext
from parallel_core.generate.engine import Engine
from parallel_core.generate.requests import Completion, Request, TokenLogprob


class RankLoop:
    """One rank's part of the loop.

    Args:
        engine: this rank's.
        context: its groups. Each data parallel rank is a model of its own; requests go to them in turn.
    """

    def __init__(self, engine: Engine, context: ParallelContext) -> None:
        self._engine, self._context = engine, context
        self._new: list[Request] = []
        self._cancelled: list[str] = []
        self._open: set[tuple[str, int]] = set()
        self._turn = 0

    @property
    def is_idle(self) -> bool:
        """Whether every request has been answered; known to rank 0."""
        return not (self._open or self._new or self._cancelled)

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand requests to the models at the next step."""
        self._new += requests
        self._open |= {(request.key, request.sample) for request in requests}

    def cancel(self, key: str) -> None:
        """End a request's answers at the next step."""
        self._cancelled.append(key)
        mine = {entry for entry in self._open if entry[0] == key}
        self._open -= mine

    def step(self) -> list[Completion]:
        """Go on by a step on all ranks, and return the answers that changed on any of them; rank 0 calls it."""
        context = self._context
        new, cancelled = self._new, self._cancelled
        self._new, self._cancelled = [], []
        if context.world.size == 1:
            changed = self._run(new, cancelled)
        else:
            told = {"new": [request.to_json() for request in new], "cancelled": cancelled}
            context.world.broadcast_object(told)
            changed = self._run(new, cancelled)
            if context.dp.size > 1:
                changed += [_from_json(x) for other in context.dp.all_gather_object([])[1:] for x in other]
        self._open -= {(c.key, c.sample) for c in changed if c.finish_reason is not None}
        return changed

    def _run(self, new: Sequence[Request], cancelled: Sequence[str]) -> list[Completion]:
        dp = self._context.dp
        for request in new:
            if self._turn % dp.size == dp.rank:
                self._engine.add(request)
            self._turn += 1
        for key in cancelled:  # after the new ones: some are given up before they begin
            self._engine.cancel(key)
        return self._engine.step()

    def follow(self) -> None:
        """Do as rank 0 says until it closes; the other ranks call it."""
        context = self._context
        while True:
            told: dict[str, Any] = context.world.broadcast_object(None)
            if told.get("close"):
                return
            changed = self._run([Request.from_json(x) for x in told["new"]], told["cancelled"])
            if context.dp.size > 1:
                context.dp.all_gather_object([asdict(c) for c in changed])

    def close(self) -> None:
        """Tell the other ranks to end."""
        if self._context.world.size > 1:
            self._context.world.broadcast_object({"close": True})


def _from_json(values: dict[str, Any]) -> Completion:
    completion = Completion(**values)
    completion.logprobs, completion.prompt_logprobs = (
        [TokenLogprob(x["token"], x["logprob"], [(int(t), float(v)) for t, v in x["top"]]) for x in entries]
        for entries in (values["logprobs"], values["prompt_logprobs"])
    )
    return completion
