"""lm-evaluation-harness on a model of a checkpoint, in this process: any of its tasks, no server.

    python tools/lm_eval_adapter.py --load DIR --tasks lambada_openai,arc_easy [--limit 100] [--num-fewshot 0]

Needs `pip install "lm_eval[api]"`. The server (`python -m parallel_core.serve`) does the same over HTTP.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM

from parallel_core.evaluate.score import logprobs_of
from parallel_core.generate.generator import Generator
from parallel_core.generate.requests import SamplingParams


class ParallelCoreLM(TemplateLM):  # type: ignore[misc]
    """The harness's view of a `Generator`."""

    def __init__(self, it: Generator, max_gen_toks: int = 256) -> None:
        super().__init__()
        if it.tokenizer is None:
            raise ValueError(it.described.why_no_tokenizer)
        self._it, self._tokenizer, self._most = it, it.tokenizer, max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._tokenizer.eod

    def tok_encode(self, string: str, **options: Any) -> list[int]:
        """Return the ids of a text."""
        return self._it.tokens_of(string)

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        rows = [[*context, *continuation][-self._it.max_length :] for _, context, continuation in requests]
        found = logprobs_of(self._it, rows, num_top=1)
        out = []
        for (_, _, continuation), logprobs in zip(requests, found):
            own = logprobs[-len(continuation) :]
            out.append((sum(x.logprob for x in own), all(x.top[0][0] == x.token for x in own)))
        return out

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, in windows of the model's length."""
        out = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._it.max_length - 1, context_len=1
            )
            pairs = [("", *utils.make_disjoint_window(window)) for window in windows]
            out.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return out

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuations of texts up to a stop text."""
        prompts, params = [], []
        for context, options in (request.args for request in requests):
            until = options.get("until") or []
            most = int(options.get("max_gen_toks", self._most))
            sampled = bool(options.get("do_sample", False))
            room = max(1, self._it.max_length - most)
            prompts.append(self.tok_encode(context)[-room:])
            params.append(
                SamplingParams(
                    max_new_tokens=min(most, self._it.max_length - len(prompts[-1])),
                    temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
                    stop=tuple([until] if isinstance(until, str) else until),
                    seed=1234,
                )
            )
        return [answer.text for answer in self._it.generate(prompts, params)]


def main() -> None:
    """Run tasks and print their results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, metavar="DIR", help="checkpoint")
    parser.add_argument("--tasks", required=True, help="names, with commas between them")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--limit", type=float)
    args = parser.parse_args()
    it = Generator(args.load)
    found = simple_evaluate(
        model=ParallelCoreLM(it), tasks=args.tasks.split(","), num_fewshot=args.num_fewshot, limit=args.limit
    )
    print(json.dumps(found["results"], indent=2, default=str))
    it.close()


if __name__ == "__main__":
    main()
