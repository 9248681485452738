"""`python -m parallel_core.question_answering`: answers of an encoder, and how right they are.

python -m parallel_core.question_answering evaluate --load DIR --data dev-v1.1.json [--output answers.json]
python -m parallel_core.question_answering predict --load DIR "context - question" ...

With `--data-parallel-size N` N ranks share the questions, with `--tensor-model-parallel-size N` the layers. Training:
bash pretrain_bert.sh --bert-head question_answering (docs/bert.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel_core.checkpoint import find_checkpoint, open_checkpoint
from parallel_core.config.model_keys import model_of_settings
from parallel_core.errors import ParallelCoreError
from parallel_core.generate.layout import Layout, check_layout
from parallel_core.generate.starting import is_rank, open_console, start_ranks

_PROGRAM = Path(__file__).parent / "programs" / "answer_on_ranks.py"


def make_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m parallel_core.question_answering",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="task", required=True)
    evaluate = commands.add_parser("evaluate", help="exact match and F1 (SQuAD v1.1)", allow_abbrev=False)
    evaluate.add_argument("--data", required=True, metavar="FILE", help="dev-v1.1.json, or its folder")
    evaluate.add_argument("--output", metavar="FILE", help="where the answers go, by question")
    predict = commands.add_parser("predict", help="answers to given questions", allow_abbrev=False)
    predict.add_argument("input", nargs="+", help='"context - question"')
    predict.add_argument("--top-k", type=int, default=1, help="answers to each question (default: 1)")
    for one in (evaluate, predict):
        one.add_argument("--load", required=True, metavar="DIR", help="checkpoint or Hugging Face directory")
        one.add_argument("--ckpt-step", type=int, help="iteration to load (default: the latest)")
        one.add_argument("--seq-length", type=int, help="positions of a window (default: the model's, at most 384)")
        one.add_argument("--doc-stride", type=int, help="pieces between two windows (default: a third of them)")
        one.add_argument("--max-query-length", type=int, help="pieces of a question (default: a sixth of them)")
        one.add_argument("--n-best-size", type=int, default=20, help="answers that are kept (default: 20)")
        one.add_argument("--max-answer-length", type=int, default=30, help="most pieces of an answer (default: 30)")
        one.add_argument("--batch-size", type=int, default=8, help="windows at once (default: 8)")
        one.add_argument("--data-parallel-size", type=int, default=1, metavar="N", help="ranks that share questions")
        one.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="and layers")
        one.add_argument("--distributed-timeout-minutes", type=float, default=10.0, help="a rank waits so long (10)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; 2 for what cannot be, said in a sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(words)
    try:
        layout = layout_of(args)
        if layout.world_size > 1 and not is_rank():
            return start_ranks(_PROGRAM, words, args, layout)
        run_here(args)
    except (ParallelCoreError, OSError) as error:
        print(f"question_answering: {error}", file=sys.stderr)
        return 2
    return 0


def layout_of(args: argparse.Namespace) -> Layout:
    """Return the ranks that a command asks for.

    Raises:
        ConfigError: a number of ranks is none, or the checkpoint's model cannot be cut over as many.
    """
    layout = Layout(args.tensor_model_parallel_size, 1, args.data_parallel_size, args.distributed_timeout_minutes)
    if layout.world_size > 1 and not is_rank():
        source = open_checkpoint(find_checkpoint(args.load, args.ckpt_step, check=False))
        check_layout(model_of_settings(source.common.get("model_config") or {}), layout)
    return layout


def run_here(args: argparse.Namespace) -> None:
    """Run this rank's part of a command; the first rank writes the result for the user."""
    result = run(args)
    if result is not None:
        with open_console() as console:
            console.write(json.dumps(result, ensure_ascii=False) + "\n")
            console.flush()


def run_on_rank() -> None:
    """Run a rank's part; what fails is raised."""
    run_here(make_parser().parse_args(sys.argv[1:]))


def run(args: argparse.Namespace) -> object:
    """Return the scores, or the answers, of a parsed command line; on ranks but the first None."""
    from parallel_core.data.squad import DEV, read_squad
    from parallel_core.question_answering.answerer import Answerer, split_input
    from parallel_core.question_answering.answers import score

    evaluates = args.task == "evaluate"
    questions = read_squad(args.data, DEV) if evaluates else [split_input(text) for text in args.input]
    it = Answerer.load(
        args.load,
        step=args.ckpt_step,
        seq_length=args.seq_length,
        doc_stride=args.doc_stride,
        max_query_length=args.max_query_length,
        batch_size=args.batch_size,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
    )
    kept = {"n_best_size": args.n_best_size, "max_answer_length": args.max_answer_length}
    answers = it.answer(questions, **kept)
    it.context.destroy()
    if it.context.rank:
        return None
    if not evaluates:
        return [[answer.as_dict() for answer in of_one[: args.top_k]] for of_one in answers]
    texts = {question.name: of_one[0].text for question, of_one in zip(questions, answers)}
    if args.output:
        Path(args.output).write_text(json.dumps(texts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return score(questions, texts)
