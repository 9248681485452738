"""Command line of the converter."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from parallel_core.checkpoint import TensorSource, find_checkpoint, open_checkpoint
from parallel_core.checkpoint.megatron.export import Target
from parallel_core.convert.comparison import compare
from parallel_core.convert.convert import to_hugging_face, to_megatron, to_mindspore, to_native, to_peft
from parallel_core.convert.inspection import describe
from parallel_core.errors import CheckpointError, ParallelCoreError

_EPILOG = """examples:
  python -m parallel_core.convert --load MEGATRON_DIR --save NATIVE_DIR
  python -m parallel_core.convert --to megatron --load NATIVE_DIR --save MEGATRON_DIR \\
         --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2
  python -m parallel_core.convert --inspect DIR
  python -m parallel_core.convert verify A B
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the converter and return the exit status: 0 done or equal, 1 different, 2 refused.

    Args:
        argv: arguments without the program's name; the process's when None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["verify"]:
            return _verify(_verify_parser().parse_args(arguments[1:]))
        return _convert(_parser().parse_args(arguments))
    except ParallelCoreError as error:
        print(f"convert_megatron: {error}", file=sys.stderr)
        return 2


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "convert_megatron verify", description="compare two checkpoints tensor by tensor", allow_abbrev=False
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--no-optim", action="store_true", help="compare parameters only")
    _add_reading(parser)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "convert_megatron",
        description="convert checkpoints between Megatron-LM, parallel_core and Hugging Face, without torch",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--load", type=Path, help="checkpoint to read; its format is recognised")
    parser.add_argument("--save", type=Path, help="directory to write the result into")
    formats = ("native", "megatron", "hf", "peft", "mindspore")
    parser.add_argument("--to", choices=formats, default="native", help="format to write")
    parser.add_argument(
        "--base", default="", metavar="DIR", help="of adapters: their base model, where it is not where they say"
    )
    parser.add_argument("--inspect", type=Path, metavar="DIR", help="print what a checkpoint holds; nothing is written")
    parser.add_argument("--ckpt-step", type=int, help="iteration to read (default: the latest)")
    parser.add_argument("--no-optim", action="store_true", help="convert parameters only")
    parser.add_argument("--processes", type=int, default=1, help="how many processes write (default 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_reading(parser)
    group = parser.add_argument_group("--to megatron: the run that will load the result (default: the source's layout)")
    group.add_argument("--target-format", choices=("torch", "torch_dist"), default="torch")
    group.add_argument("--target-tensor-parallel-size", type=int)
    group.add_argument("--target-pipeline-parallel-size", type=int)
    group.add_argument("--target-virtual-pipeline-parallel-size", type=int, help="model chunks per stage")
    group.add_argument("--target-decoder-first-pipeline-num-layers", type=int)
    group.add_argument("--target-decoder-last-pipeline-num-layers", type=int)
    group.add_argument("--target-expert-model-parallel-size", type=int)
    group.add_argument("--target-expert-tensor-parallel-size", type=int)
    for name in ("--target-moe-grouped-gemm", "--target-moe-use-legacy-grouped-gemm"):
        group.add_argument(name, action=argparse.BooleanOptionalAction, default=None)
    group.add_argument("--target-transformer-impl", choices=("local", "transformer_engine"))
    group.add_argument("--target-use-distributed-optimizer", action=argparse.BooleanOptionalAction, default=None)
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-inert",
        action="append",
        default=[],
        metavar="CLASS",
        help="let a pickle mention this class, read as inert data (may be repeated)",
    )


def _open(path: Path, allow_inert: Sequence[str], step: int | None = None, base: str = "") -> TensorSource:
    report = partial(print, file=sys.stderr)
    found = find_checkpoint(path, step, report=report, allow_inert=allow_inert)
    return open_checkpoint(found, tuple(allow_inert), base)


def _verify(args: argparse.Namespace) -> int:
    result = compare(_open(args.first, args.allow_inert), _open(args.second, args.allow_inert), not args.no_optim)
    print(result.text())
    return 0 if result.same else 1


def _convert(args: argparse.Namespace) -> int:
    if args.inspect is not None:
        print(describe(_open(args.inspect, args.allow_inert, args.ckpt_step, args.base)))
        return 0
    if args.load is None or args.save is None:
        raise CheckpointError("give --load DIR and --save DIR, or --inspect DIR, or `verify A B`; --help explains")
    if args.load.resolve() == args.save.resolve():
        raise CheckpointError(f"--load and --save are the same directory, {args.load}; --save another one")
    if args.processes < 1:
        raise CheckpointError(f"--processes {args.processes} must be at least 1")
    if args.to != "megatron":
        _refuse_target(args)
    source = _open(args.load, args.allow_inert, args.ckpt_step, args.base)
    how = {"processes": args.processes, "quiet": args.quiet, "allow_inert": tuple(args.allow_inert)}
    if args.to == "native":
        path = to_native(source, args.save, with_optimizer=not args.no_optim, **how)
    elif args.to == "megatron":
        path = to_megatron(source, args.save, _target(args), target_format=args.target_format, **how)
        print("random number generator states are not carried over: load it with --no-load-rng", file=sys.stderr)
    elif args.to == "peft":
        path = to_peft(source, args.save)
    elif args.to == "mindspore":
        path = to_mindspore(source, args.save, quiet=args.quiet)
    else:
        path = to_hugging_face(source, args.save, quiet=args.quiet)
    print(path)
    return 0


def _refuse_target(args: argparse.Namespace) -> None:
    """Refuse what only Megatron's files could follow: other formats have no layout."""
    default = _parser().parse_args([])
    given = [name for name in vars(args) if name.startswith("target_") and vars(args)[name] != vars(default)[name]]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise CheckpointError(f"{flags} belong to --to megatron; with --to {args.to} any layout loads the result")


def _target(args: argparse.Namespace) -> Target:
    for name, value in vars(args).items():
        if name.startswith("target_") and isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise CheckpointError(f"--{name.replace('_', '-')} {value} must be at least 1")
    return Target(
        tensor_parallel=args.target_tensor_parallel_size,
        pipeline_parallel=args.target_pipeline_parallel_size,
        virtual_pipeline=args.target_virtual_pipeline_parallel_size,
        first_stage_layers=args.target_decoder_first_pipeline_num_layers,
        last_stage_layers=args.target_decoder_last_pipeline_num_layers,
        distributed_optimizer=args.target_use_distributed_optimizer,
        transformer_engine=None
        if args.target_transformer_impl is None
        else args.target_transformer_impl == "transformer_engine",
        with_optimizer=not args.no_optim,
        expert_parallel=args.target_expert_model_parallel_size,
        expert_tensor_parallel=args.target_expert_tensor_parallel_size,
        grouped_gemm=args.target_moe_grouped_gemm,
        legacy_grouped_gemm=args.target_moe_use_legacy_grouped_gemm,
    )
