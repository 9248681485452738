"""The call from Python: a model of a checkpoint's directory that continues texts."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel_core import ops
from parallel_core.context import ParallelContext
from parallel_core.errors import ConfigError
from parallel_core.generate.cache import KeyValueCache
from parallel_core.generate.engine import Engine
from parallel_core.generate.layout import Layout
from parallel_core.generate.loading import Described, build_config, checked_length, describe, load_model
from parallel_core.generate.ranks import RankLoop
from parallel_core.generate.requests import Completion, Request, SamplingParams
from parallel_core.generate.runner import StageRunner
from parallel_core.generate.sampling import Sampler
from parallel_core.training.runtime import start_runtime

Prompt = str | Sequence[int]
"""A text, or token ids."""

DEFAULT_ROWS = 32
"""Sequences that are continued at a time, where nobody says otherwise."""


class Generator:
    """A model that continues prompts on this rank; every rank makes one, with the same arguments.

    Rank 0 asks (`generate`, `stream`, `submit` and `step`), the others serve it (`follow`).

    Args:
        load: directory of a checkpoint: native or Megatron's in any layout, or a Hugging Face model; or what `describe`
            said of it.
        layout: ranks; None: this process alone.
        max_batch_size: sequences that are continued at a time, on each of the data parallel models.
        max_length: tokens of a prompt with its answer; None: what the model was made for.
        step: the iteration to load; None: the latest.
        base: of adapters, the model they are on, where it is not at the place that they name.
        kernels: `auto` for compiled kernels, `local` for plain MindSpore operators.
        context: this rank's groups, where there are any already.

    Raises:
        ConfigError: a setting or the layout cannot be.
        CheckpointError: the checkpoint cannot be read.
    """

    def __init__(
        self,
        load: str | Path | Described,
        *,
        layout: Layout | None = None,
        max_batch_size: int = DEFAULT_ROWS,
        max_length: int | None = None,
        step: int | None = None,
        base: str = "",
        kernels: str = "auto",
        context: ParallelContext | None = None,
    ) -> None:
        layout = layout or Layout()
        self.described = load if isinstance(load, Described) else describe(load, step, base)
        config = build_config(self.described, layout)
        self.max_length = checked_length(self.described, max_length)
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size={max_batch_size}: give 1 or more")
        if context is None:
            rank, world_size = start_runtime()
            if world_size != layout.world_size:
                raise ConfigError(
                    f"{world_size} rank(s) run, and the layout has {layout.world_size}; start as many as it has"
                )
            context = ParallelContext.create(config.parallel_config, rank, world_size)
        self.kernels = ops.use_kernels(kernels)
        self.config, self.context = config, context
        cache = KeyValueCache(max_batch_size, self.max_length)
        model = load_model(self.described, config, context, cache)
        self.tokenizer = self.described.tokenizer
        sampler = None
        if context.is_last_stage:
            rows = config.model_config.vocab_size // context.tp.size
            # Where a checkpoint does not say which rows are padding, the tokenizer does: it has no text for them.
            known = self.described.model.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
            sampler = Sampler(context.tp, min(known, self.described.model.vocab_size), rows)
        self.engine = Engine(
            StageRunner(model, context, cache),
            sampler,
            context.pp,
            self.described.model.vocab_size,
            None if self.tokenizer is None else self.tokenizer.detokenize,
            None if self.tokenizer is None else self.tokenizer.end_of_text,
        )
        self._loop = RankLoop(self.engine, context)
        self._numbers = itertools.count()

    # ---- rank 0 -----------------------------------------------------------------------------------------------------
    def requests(self, prompt: Prompt, params: SamplingParams, key: str | None = None) -> list[Request]:
        """Return the requests of one prompt, one for each of its `n` answers, checked.

        Raises:
            ConfigError: as `Engine.check`, or a text is given and there is no tokenizer.
        """
        key = key or f"request-{next(self._numbers)}"
        seed = secrets.randbits(62) if params.seed is None else params.seed
        tokens = tuple(self.tokens_of(prompt))
        made = [Request(key, tokens, params, seed, sample) for sample in range(params.n)]
        self.engine.check(made[0])
        return made

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids.

        Raises:
            ConfigError: a text is given and there is no tokenizer, or it is neither a text nor ids.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError(f"a text needs a tokenizer ({self.described.why_no_tokenizer}); give token ids")
            return [int(token) for token in self.tokenizer.tokenize(prompt)]
        if not all(type(token) is int for token in prompt):
            raise ConfigError("a prompt is a text or a list of token ids (whole numbers)")
        return list(prompt)

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests that `requests` made; they begin with the next `step`."""
        self._loop.submit(requests)

    def cancel(self, key: str) -> None:
        """End the answers of a request with the next `step`."""
        self._loop.cancel(key)

    def step(self) -> list[Completion]:
        """Go on by a step, and return the answers that changed; each has its `finish_reason` when it has ended."""
        return self._loop.step()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is asked that has not been answered."""
        return self._loop.is_idle

    def stream(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Yield the answers as they come, each time that one changes."""
        self.submit(requests)
        while not self.is_idle:
            yield from self.step()

    def generate(
        self,
        prompts: Sequence[Prompt] | Prompt,
        params: SamplingParams | Sequence[SamplingParams] | Mapping[str, Any] | None = None,
        *,
        on_change: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Return the answers to prompts, in their order (all `n` of the first, then of the second, ...).

        Args:
            prompts: texts or lists of token ids; or one of either.
            params: how all are continued, or each one; a mapping gives `SamplingParams` by name.
            on_change: called with an answer each time that it has grown.

        Raises:
            ConfigError: a prompt or a parameter cannot be.
        """
        asked: Sequence[Any] = prompts
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            asked = [prompts]
        if params is None or isinstance(params, Mapping):
            params = SamplingParams.of(params or {})
        each = [params] * len(asked) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(asked):
            raise ConfigError(f"{len(asked)} prompts and {len(each)} parameters; give one for each, or one for all")
        requests = [r for prompt, own in zip(asked, each) for r in self.requests(prompt, own)]
        done: dict[tuple[str, int], Completion] = {}
        for completion in self.stream(requests):
            done[completion.key, completion.sample] = completion
            if on_change is not None:
                on_change(completion)
        return [done[request.key, request.sample] for request in requests]

    # ---- the other ranks --------------------------------------------------------------------------------------------
    def follow(self) -> None:
        """Serve rank 0 until it closes."""
        self._loop.follow()
        self.context.destroy()

    def close(self) -> None:
        """Let the other ranks end; on rank 0, when nothing more is asked."""
        self._loop.close()
        self.context.destroy()
