"""OpenAI's endpoints of completions: `/v1/completions`, `/v1/chat/completions`, `/v1/models`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from parallel_core.data.chat import ChatTemplate
from parallel_core.errors import ConfigError, DataError
from parallel_core.generate.requests import SamplingParams, TokenLogprob
from parallel_core.serve.answers import Answer, collected
from parallel_core.serve.service import Piece, Service, Ticket
from parallel_core.serve.values import Fields, Refused, json_object

_NEUTRAL = ("user", "metadata", "store", "service_tier", "model")
MOST_PROMPTS = 128


class Completions:
    """The endpoints of one service.

    Args:
        service: the engine.
        model: the name the model goes by.
        template: of chats; None: they are refused.
    """

    def __init__(self, service: Service, model: str, template: ChatTemplate | None) -> None:
        self._service, self._model, self._template = service, model, template
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        """Say which model there is."""
        own = {"id": self._model, "object": "model", "created": self._created, "owned_by": "parallel_core",
               "max_model_len": self._service.it.max_length}  # fmt: skip
        return JSONResponse({"object": "list", "data": [own]})

    # ---- /v1/completions --------------------------------------------------------------------------------------------
    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        fields = Fields(await json_object(request))
        prompts = _prompts(fields)
        echo = fields.take("echo", bool, False)
        logprobs = fields.take("logprobs", int)
        most = fields.take("max_tokens", int, 16)
        fields.refuse("suffix", "texts are continued at their end alone; leave it out", ("",))
        best_of = fields.take("best_of", int)
        stream, with_usage = _stream(fields)
        scored = echo and logprobs is not None
        params = _sampling(fields, max_new_tokens=most, logprobs=logprobs, prompt_logprobs=scored)
        if best_of not in (None, params.n):
            raise Refused(f"best_of={best_of}: answers are not ranked; leave it out, or give n={best_of}")
        fields.end()
        if not most and not echo:
            raise Refused("max_tokens=0 asks for nothing; with echo true it scores the prompt", parameter="max_tokens")
        ticket = await self._service.ask(prompts, params)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                "model": self._model}  # fmt: skip
        prompts_of = [list(own[0].tokens) for own in ticket.requests]
        texts = [self._text_of(prompt, tokens) for prompt, tokens in zip(prompts, prompts_of)] if echo else []

        def choice(answer: Answer) -> dict[str, Any]:
            which = answer.index // params.n
            tokens, entries = answer.tokens, list(answer.logprobs)
            text, first = answer.text, None
            if echo:
                text, tokens = texts[which] + text, [*prompts_of[which], *tokens]
                first, entries = prompts_of[which][0], [*answer.prompt_logprobs, *entries]
            found = None if logprobs is None else self._logprobs(entries, first)
            return {"index": answer.index, "text": text, "logprobs": found, "finish_reason": answer.finish_reason}

        if not stream:
            answers = await collected(request, ticket)
            return JSONResponse({**head, "choices": [choice(a) for a in answers], "usage": usage(ticket, answers)})
        begun: set[int] = set()

        def part(piece: Piece) -> dict[str, Any]:
            text = piece.text
            if echo and piece.index not in begun:
                text = texts[piece.index // params.n] + text
            begun.add(piece.index)
            found = None if logprobs is None else self._logprobs(piece.logprobs, None)
            return {"index": piece.index, "text": text, "logprobs": found, "finish_reason": piece.finish_reason}

        return _events(ticket, head, part, with_usage)

    def _text_of(self, prompt: Any, tokens: list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        tokenizer = self._service.it.tokenizer
        return "" if tokenizer is None else tokenizer.detokenize(tokens)

    def _token(self, token: int) -> str:
        tokenizer = self._service.it.tokenizer
        return str(token) if tokenizer is None else tokenizer.detokenize([token])

    def _logprobs(self, entries: list[TokenLogprob], first: int | None) -> dict[str, Any]:
        """Return OpenAI's lists; `first` is the prompt's first token, of which there is no probability."""
        words = [self._token(entry.token) for entry in entries]
        values: list[float | None] = [entry.logprob for entry in entries]
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            top: dict[str, float] = {}
            for token, value in [*entry.top, (entry.token, entry.logprob)]:
                top.setdefault(self._token(token), value)  # of tokens that read alike the likeliest
            tops.append(top)
        if first is not None:
            words, values, tops = [self._token(first), *words], [None, *values], [None, *tops]
        offsets, at = [], 0
        for word in words:
            offsets.append(at)
            at += len(word)
        return {"tokens": words, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    # ---- /v1/chat/completions ---------------------------------------------------------------------------------------
    async def chat(self, request: Request) -> Response:
        """Answer the last message of a conversation."""
        fields = Fields(await json_object(request))
        messages = fields.take("messages", list)
        if self._template is None:
            raise Refused("this model has no chat template; use /v1/completions", code="no_chat_template")
        if not messages:
            raise Refused('messages: send a list of {"role": ..., "content": ...}', parameter="messages")
        try:
            tokens = self._template.tokens(messages)
        except DataError as error:
            raise Refused(str(error), parameter="messages") from None
        wants, top = fields.take("logprobs", bool, False), fields.take("top_logprobs", int, 0)
        if top and not wants:
            raise Refused("top_logprobs needs logprobs true", parameter="top_logprobs")
        most = fields.take("max_completion_tokens", int) or fields.take("max_tokens", int)
        fields.ignore("max_tokens")
        for name in ("tools", "tool_choice", "functions", "function_call"):
            fields.refuse(name, "calls of tools are not built; leave it out", ([], "none"))
        fields.refuse("response_format", "answers are plain text; leave it out", ({"type": "text"},))
        stream, with_usage = _stream(fields)
        room = self._service.it.max_length - len(tokens)
        if room < 1:
            raise Refused(
                f"the conversation has {len(tokens)} tokens, and {self._service.it.max_length} is all there is room "
                "for; send less", parameter="messages", code="context_length_exceeded",
            )  # fmt: skip
        chosen = min(room, 4096) if most is None else most
        params = _sampling(fields, max_new_tokens=chosen, logprobs=top if wants else None)
        fields.end()
        if not chosen:
            raise Refused("max_tokens=0 asks for nothing", parameter="max_tokens")
        ticket = await self._service.ask([tokens], params)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._model}
        if not stream:
            answers = await collected(request, ticket)
            choices = [
                {
                    "index": a.index,
                    "message": {"role": "assistant", "content": a.text},
                    "logprobs": self._chat_logprobs(a.logprobs) if wants else None,
                    "finish_reason": a.finish_reason,
                }
                for a in answers
            ]
            return JSONResponse(
                {**head, "object": "chat.completion", "choices": choices, "usage": usage(ticket, answers)}
            )
        begun: set[int] = set()

        def part(piece: Piece) -> dict[str, Any]:
            delta: dict[str, str] = {} if piece.index in begun else {"role": "assistant"}
            begun.add(piece.index)
            if piece.text or "role" in delta:
                delta["content"] = piece.text
            found = self._chat_logprobs(piece.logprobs) if wants else None
            return {"index": piece.index, "delta": delta, "logprobs": found, "finish_reason": piece.finish_reason}

        return _events(ticket, {**head, "object": "chat.completion.chunk"}, part, with_usage)

    def _chat_logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any]:
        def one(token: int, value: float) -> dict[str, Any]:
            text = self._token(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        content = [
            {**one(e.token, e.logprob), "top_logprobs": [one(token, value) for token, value in e.top]} for e in entries
        ]
        return {"content": content}


def usage(ticket: Ticket, answers: list[Answer]) -> dict[str, int]:
    """Return how many tokens there were."""
    prompt, new = sum(len(own[0].tokens) for own in ticket.requests), sum(len(a.tokens) for a in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _stream(fields: Fields) -> tuple[bool, bool]:
    """Return whether pieces are wanted, and the usage after them."""
    stream, options = fields.take("stream", bool, False), Fields(fields.take("stream_options", dict, {}))
    with_usage = options.take("include_usage", bool, False)
    options.ignore("include_obfuscation")
    options.end()
    return stream, with_usage


def _prompts(fields: Fields) -> list[Any]:
    value = fields.take("prompt", (str, list))
    if value is None:
        raise Refused("prompt: send a text, a list of texts, or token ids", parameter="prompt")
    prompts = [value] if isinstance(value, str) or (value and all(type(x) is int for x in value)) else value
    fits = all(isinstance(p, str) or (isinstance(p, list) and all(type(x) is int for x in p)) for p in prompts)
    if not prompts or not fits:
        raise Refused("prompt: send a text, a list of texts, or lists of token ids", parameter="prompt")
    if len(prompts) > MOST_PROMPTS:
        raise Refused(f"prompt: {len(prompts)} prompts; send up to {MOST_PROMPTS} at a time", parameter="prompt")
    return prompts


def _sampling(fields: Fields, **given: Any) -> SamplingParams:
    """Return how texts are continued, in OpenAI's words and those that other servers added."""
    values: dict[str, Any] = {**given}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        values[name] = fields.number(name)
    for name in ("top_k", "seed", "n"):
        values[name] = fields.take(name, int)
    values["top_k"] = 0 if values["top_k"] == -1 else values["top_k"]
    values["stop"], values["stop_token_ids"] = fields.take("stop", (str, list)), fields.take("stop_token_ids", list)
    values["ignore_eos"] = fields.take("ignore_eos", bool)
    fields.refuse("logit_bias", "logits are not shifted; leave it out", ({},))
    fields.ignore(*_NEUTRAL)
    try:
        return SamplingParams.of({name: value for name, value in values.items() if value is not None})
    except ConfigError as error:
        raise Refused(str(error).replace("max_new_tokens", "max_tokens")) from None


def _events(ticket: Ticket, head: dict[str, Any], part: Callable[[Piece], Any], with_usage: bool) -> Response:
    """Return a response of server-sent events."""

    async def events() -> AsyncIterator[str]:
        tokens = 0
        try:
            async for piece in ticket.pieces():
                tokens += len(piece.tokens)
                more = {"usage": None} if with_usage else {}
                yield _event({**head, "choices": [part(piece)], **more})
        except Exception as error:  # the status has been sent: an event says what happened
            yield _event({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
            return
        if with_usage:
            prompt = sum(len(own[0].tokens) for own in ticket.requests)
            counts = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
            yield _event({**head, "choices": [], "usage": counts})
        yield "data: [DONE]\n\n"

    return _EventResponse(ticket, events())


class _EventResponse(StreamingResponse):
    """Events of a ticket, which gives back what it holds when they end, however that is."""

    def __init__(self, ticket: Ticket, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.leave()


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"
