"""The engine's loop beside a server: requests come in from other threads, answers go out as they grow."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from parallel_core.errors import ParallelCoreError
from parallel_core.generate.generator import Generator, Prompt
from parallel_core.generate.requests import Completion, Request, SamplingParams, TokenLogprob

_IDLE_TICK_S = 1.0
"""How often the ranks hear of rank 0 when nothing is asked; far below any time limit of theirs."""


class Overloaded(ParallelCoreError):
    """There is no room for another request now."""


class Unavailable(ParallelCoreError):
    """The engine has ended, or is about to."""


@dataclass
class Piece:
    """What an answer has gained since the last piece.

    Attributes:
        index: which prompt of the request, and which of its answers.
        text: certain new text.
        tokens: new tokens.
        logprobs: of these.
        finish_reason: given with the last piece.
        prompt_tokens: of the prompt.
        prompt_logprobs: with the last piece, where they were asked for.
    """

    index: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None
    prompt_tokens: int
    prompt_logprobs: list[TokenLogprob]


class Ticket:
    """A client's request on its way through the engine; the pieces of all its answers come out of it."""

    def __init__(self, service: Service, requests: Sequence[Sequence[Request]]) -> None:
        self.requests = requests
        self.count = sum(map(len, requests))
        self._service, self._loop = service, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._index = {(r.key, r.sample): i for i, r in enumerate(itertools.chain(*requests))}
        self._given: dict[int, tuple[int, int]] = {}
        self._open = set(self._index.values())
        self._left = False
        self.begun = time.monotonic()

    @property
    def keys(self) -> list[str]:
        """The engine's names of its prompts."""
        return list(dict.fromkeys(key for key, _ in self._index))

    def grow(self, completion: Completion) -> bool:
        """Take what the engine says of one answer, in the engine's thread; return whether all have ended."""
        index = self._index[completion.key, completion.sample]
        characters, tokens = self._given.get(index, (0, 0))
        ended = completion.finish_reason is not None
        end = max(characters, completion.certain)
        piece = Piece(
            index,
            completion.text[characters:end],
            completion.tokens[tokens:],
            completion.logprobs[tokens:],
            completion.finish_reason,
            completion.prompt_tokens,
            list(completion.prompt_logprobs) if ended else [],
        )
        self._given[index] = (end, len(completion.tokens))
        if ended:
            self._open.discard(index)
        self._put(piece)
        return not self._open

    def fail(self, error: BaseException) -> None:
        """End it with an error, in any thread."""
        self._put(error)

    def _put(self, item: Piece | BaseException) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, item)
        except RuntimeError:
            return  # the server's loop has ended, and with it the client's connection

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces until all answers have ended.

        Raises:
            Unavailable: the engine has ended.
        """
        left = self.count
        while left:
            item = await self._pieces.get()
            if isinstance(item, BaseException):
                raise item
            left -= item.finish_reason is not None
            yield item

    def leave(self) -> None:
        """Give back what it holds, in the server's thread; answers that have not ended end where they are."""
        if not self._left:
            self._left = True
            self._service.leave(self)


@dataclass
class Counters:
    """What `/metrics` counts."""

    requests: dict[tuple[str, int], int] = field(default_factory=dict)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    cancelled: int = 0
    refused: int = 0


class Service:
    """Runs a generator in the thread that calls `run`, for tickets from a server's thread.

    Args:
        it: the generator, of rank 0.
        max_requests: answers under way or waiting; more are refused.
    """

    def __init__(self, it: Generator, max_requests: int) -> None:
        self.it, self.max_requests = it, max_requests
        self.counters = Counters()
        self.error: BaseException | None = None
        self.begun = time.time()
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._tickets: dict[str, Ticket] = {}
        self._held = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    # ---- the server's thread ----------------------------------------------------------------------------------------
    @property
    def state(self) -> str:
        """`ok`, `stopping` or `dead`."""
        return "dead" if self.error is not None else "stopping" if self._stopping.is_set() else "ok"

    @property
    def held(self) -> int:
        """Answers under way or waiting."""
        return self._held

    async def ask(self, prompts: Sequence[Prompt], params: SamplingParams) -> Ticket:
        """Hand prompts to the engine; whoever asks makes the ticket `leave` in the end.

        Raises:
            ConfigError: a prompt cannot be.
            Overloaded: too many answers are under way.
            Unavailable: the engine has ended.
        """
        # Long texts take a while to tokenize; others are served meanwhile.
        requests = await asyncio.to_thread(lambda: [self.it.requests(prompt, params) for prompt in prompts])
        ticket = Ticket(self, requests)
        with self._lock:
            if self.state != "ok":
                raise Unavailable(f"the engine is {self.state}")
            if self._held + ticket.count > self.max_requests:
                self.counters.refused += 1
                raise Overloaded(
                    f"{self._held} answers are under way or waiting, and {ticket.count} more would be over the limit "
                    f"of {self.max_requests}; try again later"
                )
            self._held += ticket.count
            self.counters.prompt_tokens += sum(len(own[0].tokens) for own in requests)
        self._inbox.put(("ask", ticket))
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give back what a ticket holds; see `Ticket.leave`."""
        with self._lock:
            self._held -= ticket.count
        self._inbox.put(("leave", ticket))

    def stop(self) -> None:
        """Let `run` return; in any thread, or in a signal's handler."""
        self._stopping.set()

    # ---- the engine's thread ----------------------------------------------------------------------------------------
    def run(self) -> None:
        """Answer until `stop`; what the engine raises ends it, and is raised once every client knows."""
        try:
            while not self._stopping.is_set():
                self._take_all()
                for completion in self.it.step():
                    self._hand_out(completion)
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._end()

    def _take_all(self) -> None:
        """Take what has come in; wait for something, for a moment, where there is nothing to do."""
        wait = self.it.is_idle
        begun = time.monotonic()
        while True:
            try:
                # Short waits, so that a signal is seen soon.
                what, ticket = self._inbox.get(timeout=0.05) if wait else self._inbox.get_nowait()
            except queue.Empty:
                if wait and not self._stopping.is_set() and time.monotonic() - begun < _IDLE_TICK_S:
                    continue
                return
            wait = False
            if what == "ask":
                self._tickets.update(dict.fromkeys(ticket.keys, ticket))
                self.it.submit([request for own in ticket.requests for request in own])
            else:
                for key in ticket.keys:
                    if self._tickets.pop(key, None) is not None:
                        self.counters.cancelled += 1
                        self.it.cancel(key)

    def _hand_out(self, completion: Completion) -> None:
        ticket = self._tickets.get(completion.key)
        if ticket is None:
            return
        self.counters.generated_tokens += 1
        if len(completion.tokens) == 1:
            self.counters.first_tokens += 1
            self.counters.first_token_seconds += time.monotonic() - ticket.begun
        if ticket.grow(completion):
            for key in ticket.keys:
                self._tickets.pop(key, None)

    def _end(self) -> None:
        with self._lock:
            self._stopping.set()
        while True:
            try:
                what, ticket = self._inbox.get_nowait()
            except queue.Empty:
                break
            if what == "ask":
                self._tickets.update(dict.fromkeys(ticket.keys, ticket))
        for ticket in {id(t): t for t in self._tickets.values()}.values():
            ticket.fail(Unavailable(f"the engine is {self.state}"))
        self._tickets.clear()
