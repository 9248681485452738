"""`python -m parallel_core.evaluate`: what the model of a checkpoint says of given text.

python -m parallel_core.evaluate perplexity --load DIR --data FILE.jsonl [--rolling] [--stride 256]
python -m parallel_core.evaluate c3 --load DIR --data c3-d-dev.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel_core.generate.arguments import add_model_arguments, layout_of
from parallel_core.generate.starting import open_console, run_or_start

_PROGRAM = Path(__file__).parent / "programs" / "evaluate_on_ranks.py"


def make_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m parallel_core.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="task", required=True)
    ppl = commands.add_parser("perplexity", help="perplexity of a file", allow_abbrev=False)
    c3 = commands.add_parser("c3", help="choices among answers (C3)", allow_abbrev=False)
    for one in (ppl, c3):
        one.add_argument("--data", required=True, metavar="FILE", help="what is judged")
        add_model_arguments(one)
    ppl.add_argument("--json-key", default="text", help="where a line of JSON has its text (default: text)")
    ppl.add_argument("--rolling", action="store_true", help="all documents as one text")
    ppl.add_argument("--stride", type=int, help="tokens that each further window counts (default: all but one)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; 2 for what cannot be, said in a sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(words)
    return run_or_start(_PROGRAM, words, args, run)


def run_on_rank() -> None:
    """Run a rank's part; what fails is raised."""
    run(make_parser().parse_args(sys.argv[1:]))


def run(args: argparse.Namespace) -> None:
    """Evaluate on this rank, and print the result as JSON on rank 0.

    Raises:
        ConfigError: a setting, the data or the layout cannot be.
        CheckpointError: the checkpoint cannot be read.
    """
    from parallel_core.evaluate import c3, perplexity
    from parallel_core.generate.generator import Generator

    it = Generator(
        args.load,
        step=args.ckpt_step,
        base=args.base,
        layout=layout_of(args),
        max_batch_size=args.max_batch_size,
        max_length=args.max_length,
        kernels=args.kernels,
    )
    if it.context.rank:
        it.follow()
        return
    try:
        if args.task == "c3":
            result = c3.evaluate(it, c3.read_questions(Path(args.data)))
        else:
            documents = perplexity.read_documents(Path(args.data), args.json_key)
            result = perplexity.perplexity(it, documents, rolling=args.rolling, stride=args.stride)
    finally:
        it.close()
    with open_console() as console:
        console.write(json.dumps(result) + "\n")
