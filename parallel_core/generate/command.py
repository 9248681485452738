"""`python -m parallel_core.generate`: continue prompts with the model of a checkpoint.

    python -m parallel_core.generate --load DIR --prompt "Once upon" --max-new-tokens 64 --temperature 0.8 --stream
    python -m parallel_core.generate --load DIR --prompts-file F.jsonl --output O.jsonl --tensor-model-parallel-size 2

A line of the prompts file is a JSON object with `prompt` (a text) or `tokens` (ids), and what it wants of its own:
`id`, `max_new_tokens`, `temperature`, `seed`, `stop`, ... A line of the output has `id, text, tokens, logprobs,
finish_reason, prompt_tokens`. NPROC in the environment asks for more models that share the prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from parallel_core.errors import ConfigError
from parallel_core.files import create_file, read_regular
from parallel_core.generate.arguments import add_model_arguments, add_sampling_arguments, layout_of, sampling_values
from parallel_core.generate.requests import Completion, SamplingParams, TokenLogprob
from parallel_core.generate.starting import open_console, run_or_start
from parallel_core.records import parse_json

_LARGEST_FILE = 1 << 30
_PROGRAM = Path(__file__).parent / "programs" / "generate_on_ranks.py"


@dataclass(frozen=True)
class Asked:
    """One prompt of the command line or the file."""

    id: Any
    prompt: Any
    """A text, or a list of token ids."""
    params: SamplingParams


def make_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name if "parallel-core" in sys.argv[0] else "python -m parallel_core.generate",
        description=(__doc__ or "").split("\n\n", 1)[0],
        epilog=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    group.add_argument("--prompts-file", metavar="F.jsonl", help="prompts, a JSON object a line")
    group.add_argument("--output", metavar="O.jsonl", help="write answers there, a JSON object a line")
    group.add_argument(
        "--total-length", type=int, metavar="N", help="tokens of a prompt with its answer, instead of --max-new-tokens"
    )
    group.add_argument("--stream", action="store_true", help="print text as it comes (one prompt, one answer)")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; 2 for what cannot be, said in a sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(words)
    return run_or_start(_PROGRAM, words, args, run, checked=lambda: read_prompts(args))


def run_on_rank() -> None:
    """Run a rank's part; what fails is raised."""
    run(make_parser().parse_args(sys.argv[1:]))


# ---- prompts --------------------------------------------------------------------------------------------------------
def read_prompts(args: argparse.Namespace) -> list[Asked]:
    """Return what is asked, checked as far as it can be without the model.

    Raises:
        ConfigError: there is nothing, or something of it cannot be.
    """
    common = sampling_values(args)
    if args.total_length is not None and (args.total_length < 1 or "max_new_tokens" in common):
        raise ConfigError(f"--total-length {args.total_length}: give 1 or more, and no --max-new-tokens")
    if (args.prompt is None) == (args.prompts_file is None):
        raise ConfigError("give --prompt TEXT or --prompts-file FILE, one of them")
    if args.prompt is not None:
        asked = [Asked(i, prompt, SamplingParams.of(common)) for i, prompt in enumerate(args.prompt)]
    else:
        asked = list(_prompts_of(Path(args.prompts_file), common))
        if not asked:
            raise ConfigError(f"--prompts-file {args.prompts_file}: has no prompts")
    if args.stream and (len(asked) > 1 or asked[0].params.n > 1 or args.output):
        raise ConfigError("--stream prints one answer to one prompt: leave it out, or the others and --output")
    return asked


def _prompts_of(path: Path, common: dict[str, Any]) -> Iterator[Asked]:
    try:
        lines = read_regular(path, _LARGEST_FILE).split(b"\n")
    except OSError as error:
        raise ConfigError(f"--prompts-file {path}: {error.strerror or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        values = parse_json(line, where, ConfigError)
        if not isinstance(values, dict):
            raise ConfigError(f'{where}: give a JSON object, such as {{"prompt": "Once upon"}}')
        own = dict(values)
        prompt, tokens = own.pop("prompt", None), own.pop("tokens", None)
        if (prompt is None) == (tokens is None):
            raise ConfigError(f'{where}: give "prompt" (a text) or "tokens" (ids), one of them')
        if prompt is not None and not isinstance(prompt, str):
            raise ConfigError(f'{where}: "prompt" is a {type(prompt).__name__}; give a text')
        if tokens is not None and not (isinstance(tokens, list) and all(type(t) is int for t in tokens)):
            raise ConfigError(f'{where}: "tokens" is no list of whole numbers')
        key = own.pop("id", number - 1)
        try:
            yield Asked(key, prompt if tokens is None else tokens, SamplingParams.of({**common, **own}))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


# ---- a rank ---------------------------------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> None:
    """Continue the prompts on this rank.

    Raises:
        ConfigError: a setting, a prompt or the layout cannot be.
        CheckpointError: the checkpoint cannot be read.
    """
    from parallel_core.generate.generator import Generator
    from parallel_core.generate.loading import checked_length, describe

    asked = read_prompts(args)
    described = describe(args.load, args.ckpt_step, args.base)
    longest = checked_length(described, args.max_length)
    it = Generator(
        described,
        layout=layout_of(args),
        max_batch_size=min(args.max_batch_size, sum(one.params.n for one in asked)),
        max_length=longest,
        kernels=args.kernels,
    )
    if it.context.rank:
        it.follow()
        return
    requests = []
    for i, one in enumerate(asked):
        try:
            params = one.params
            if args.total_length is not None:
                params = replace(params, max_new_tokens=max(0, args.total_length - len(it.tokens_of(one.prompt))))
            requests.append(it.requests(one.prompt, params, str(i)))
        except ConfigError as error:
            it.close()
            raise ConfigError(f"prompt {one.id}: {error}") from None
    every = [request for own in requests for request in own]
    shown = ""
    done: dict[tuple[str, int], Completion] = {}
    with open_console() as console, _lines(args, console) as lines:
        for change in it.stream(every):
            if args.stream:
                ids = "".join(f"{token} " for token in change.tokens)
                certain = ids if it.tokenizer is None else change.text[: change.certain]
                console.write(certain[len(shown) :])
                console.flush()
                shown = certain
            if change.finish_reason is None:
                continue
            done[change.key, change.sample] = change
            while every and (every[0].key, every[0].sample) in done:
                request = every.pop(0)
                answer = done.pop((request.key, request.sample))
                _write(lines, asked[int(request.key)], answer, console, args, it.tokenizer is not None)
        if args.stream:
            console.write("\n")
    it.close()


def _write(
    lines: TextIO | None, asked: Asked, answer: Completion, console: TextIO, args: argparse.Namespace, is_text: bool
) -> None:
    if lines is not None:
        lines.write(json.dumps(as_line(asked, answer), ensure_ascii=False) + "\n")
        lines.flush()
    elif not args.stream:
        if args.prompt is not None and (len(args.prompt) > 1 or asked.params.n > 1):
            console.write(f"--- prompt {asked.id}, answer {answer.sample}\n")
        console.write((answer.text if is_text else " ".join(map(str, answer.tokens))) + "\n")
        console.flush()


def as_line(asked: Asked, answer: Completion) -> dict[str, Any]:
    """Return what a line of the output says."""
    line: dict[str, Any] = {"id": asked.id, "text": answer.text, "tokens": answer.tokens}
    line["logprobs"] = [x.logprob for x in answer.logprobs] if asked.params.logprobs is not None else None
    if asked.params.logprobs:
        line["top_logprobs"] = _tops(answer.logprobs)
    if asked.params.prompt_logprobs:
        line["prompt_logprobs"] = [None, *(x.logprob for x in answer.prompt_logprobs)]
    if asked.params.n > 1:
        line["sample"] = answer.sample
    return {**line, "finish_reason": answer.finish_reason, "prompt_tokens": answer.prompt_tokens}


def _tops(entries: Sequence[TokenLogprob]) -> list[list[list[Any]]]:
    return [[[token, value] for token, value in entry.top] for entry in entries]


@contextmanager
def _lines(args: argparse.Namespace, console: TextIO) -> Iterator[TextIO | None]:
    """Give where lines of JSON go: the output file, else the console with a prompts file, else nowhere."""
    if not args.output:
        yield console if args.prompts_file else None
        return
    try:
        file = create_file(args.output)
    except OSError as error:
        raise ConfigError(f"--output {args.output}: {error.strerror or error}") from None
    with file:
        yield file

