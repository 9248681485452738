"""Arguments that the commands of generation share: which model, in which layout, how texts are continued."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from parallel_core.errors import ConfigError
from parallel_core.generate.layout import ANY_LAYOUT, Layout
from parallel_core.generate.requests import SamplingParams

_HELP: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (int, "tokens to add at most (default 64)"),
    "temperature": (float, "logits are divided by it; 0 is greedy (default 1)"),
    "top_k": (int, "keep the k likeliest tokens; 0: all (default)"),
    "top_p": (float, "of those keep the fewest whose probabilities reach this sum (default 1)"),
    "min_p": (float, "of those keep tokens with this share of the likeliest one's probability (default 0)"),
    "repetition_penalty": (float, "of tokens in prompt and answer, as transformers does it; 1: none (default)"),
    "frequency_penalty": (float, "subtracted from a logit for each time that the token is in the answer (default 0)"),
    "presence_penalty": (float, "subtracted once from logits of tokens in the answer (default 0)"),
    "seed": (int, "the same answers again, in any batch and layout (default: others each time)"),
    "n": (int, "answers to each prompt (default 1)"),
    "logprobs": (int, "give log-probabilities of the new tokens, and of this many likeliest ones"),
}
_REFUSED = ("context_parallel_size", "virtual_pipeline_model_parallel_size")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model is used and in which layout."""
    group = parser.add_argument_group("model")
    group.add_argument("--load", required=True, metavar="DIR", help="checkpoint: native, Megatron's, or Hugging Face's")
    group.add_argument("--ckpt-step", type=int, help="the iteration to load (default: the latest)")
    group.add_argument("--base", default="", metavar="MODEL", help="of adapters: the model they are on, if moved")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="any, whatever DIR has")
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="any, whatever DIR has")
    for name in _REFUSED:
        group.add_argument("--" + name.replace("_", "-"), type=int, default=1, help=argparse.SUPPRESS)
    group.add_argument("--max-batch-size", type=int, default=32, metavar="N", help="answers under way (default 32)")
    group.add_argument("--max-length", type=int, metavar="N", help="tokens of a prompt with its answer")
    group.add_argument(
        "--kernels", default="auto", choices=("auto", "local"), help="local: plain MindSpore operators"
    )
    group.add_argument("--distributed-timeout-minutes", type=float, default=10.0, help="a rank waits so long (10)")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how texts are continued; one that is not given is None."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in _HELP.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind, help=text)
    group.add_argument("--stop", action="append", help="text that ends an answer (\\n is a new line); may be repeated")
    group.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help="tokens that end an answer")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the end of document")
    group.add_argument("--prompt-logprobs", action="store_true", default=None, help="log-probabilities of the prompt")
    group.add_argument(
        "--no-renormalize",
        dest="renormalize",
        action="store_false",
        default=None,
        help="top-p counts probabilities from before the penalties, as PanGu-Alpha's prediction does",
    )


def sampling_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was given of `SamplingParams`, checked.

    Raises:
        ConfigError: a value is out of its range.
    """
    given = {f.name: getattr(args, f.name) for f in fields(SamplingParams) if getattr(args, f.name, None) is not None}
    if "stop" in given:
        given["stop"] = [unescaped(text) for text in given["stop"]]
    SamplingParams.of(given)
    return given


def unescaped(text: str) -> str:
    r"""Return `text` with \n, \t, \r and \\ as what they stand for."""
    signs = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    out, i = [], 0
    while i < len(text):
        pair = text[i] == "\\" and text[i + 1 : i + 2] in signs and i + 1 < len(text)
        out.append(signs[text[i + 1]] if pair else text[i])
        i += 2 if pair else 1
    return "".join(out)


def layout_of(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Layout:
    """Return the layout that is asked for; `NPROC` or the job's ranks say how many models there are.

    Raises:
        ConfigError: it cannot be.
    """
    for name in _REFUSED:
        if getattr(args, name) > 1:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise ConfigError(f"{flag}: texts are not continued so; {ANY_LAYOUT}")
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    for name, size in (("tensor", tp), ("pipeline", pp)):
        if size < 1:
            raise ConfigError(f"--{name}-model-parallel-size {size}: give 1 or more")
    text = environment.get("MS_WORKER_NUM") or environment.get("NPROC") or str(tp * pp)
    ranks = int(text) if text.isdigit() else 0
    if not ranks or ranks % (tp * pp):
        raise ConfigError(f"NPROC={text}: the layout needs {tp * pp} rank(s), or a multiple of it")
    return Layout(tp, pp, ranks // (tp * pp), args.distributed_timeout_minutes)
