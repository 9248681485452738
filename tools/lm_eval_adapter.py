"""lm-evaluation-harness on a model of a checkpoint, in this process: any of its tasks, no server.

    python tools/lm_eval_adapter.py --load DIR --tasks lambada_openai,arc_easy [--limit 100] [--num-fewshot 0]

Needs `pip install lm_eval "numpy<2" "pyarrow<22"` beside MindSpore. The server (`python -m parallel_core.serve`) does
the same over HTTP, with the harness in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from parallel_core.data.chat import special_tokens
from parallel_core.evaluate.score import logprobs_of
from parallel_core.generate.generator import Generator
from parallel_core.generate.loading import template_of
from parallel_core.generate.requests import SamplingParams


class ParallelCoreLM(TemplateLM):  # type: ignore[misc]
    """The harness's view of a `Generator`.

    Args:
        it: the model, with a tokenizer.
        max_gen_toks: of an answer, where a task does not say.
    """

    def __init__(self, it: Generator, max_gen_toks: int = 256) -> None:
        super().__init__()
        if it.tokenizer is None:
            raise ValueError(it.described.why_no_tokenizer)
        self._it, self._tokenizer, self._most = it, it.tokenizer, max_gen_toks
        begins = special_tokens(it.described.tokenizer_folders).get("bos_token")
        # As the harness does for other models: what begins texts, else what ends documents.
        ids = it.tokens_of(begins) if begins else []
        self._prefix = ids[-1] if ids and self._tokenizer.detokenize(ids[-1:]) == begins else self._tokenizer.eod
        self._template = template_of(it.described)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text of which every token is scored."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its answers under."""
        return str(self._it.described.path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation."""
        if self._template is None:
            raise ValueError("this model has no chat template")
        return self._template.text(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, **options: Any) -> list[int]:
        """Return the ids of a text."""
        return self._it.tokens_of(string)

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        rows = [[*context, *continuation][-self._it.max_length :] for _, context, continuation in requests]
        found = logprobs_of(self._it, rows, num_top=1)
        out = []
        for (_, _, continuation), logprobs in zip(requests, found):
            own = logprobs[-len(continuation) :]
            out.append((sum(x.logprob for x in own), all(x.top[0][1] <= x.logprob for x in own)))
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
            most = min(int(options.get("max_gen_toks", self._most)), self._it.max_length - 1)
            sampled = bool(options.get("do_sample", False))
            prompts.append(self.tok_encode(context)[most - self._it.max_length :] or [self.prefix_token_id])
            params.append(
                SamplingParams(
                    max_new_tokens=most,
                    temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
                    top_p=float(options.get("top_p", 1.0)),
                    top_k=int(options.get("top_k", 0)),
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
    parser.add_argument("--include-path", metavar="DIR", help="tasks of one's own, as the harness reads them")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--apply-chat-template", action="store_true", help="write prompts as conversations")
    args = parser.parse_args()
    it = Generator(args.load)
    found = simple_evaluate(
        model=ParallelCoreLM(it),
        tasks=args.tasks.split(","),
        task_manager=TaskManager(include_path=args.include_path),
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
    )
    print(json.dumps(found["results"], indent=2, default=str))
    it.close()


if __name__ == "__main__":
    main()
