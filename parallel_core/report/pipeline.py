"""`python -m parallel_core.report.pipeline draw`: a pipeline schedule as text and as a picture, without any device."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel_core.errors import ConfigError
from parallel_core.pipeline.schedule import SCHEDULES, make_schedule
from parallel_core.report.draw import describe_schedule, svg_timeline
from parallel_core.report.simulate import simulate, uniform_durations

_EXAMPLE = """example:
  python -m parallel_core.report.pipeline draw --pipeline-model-parallel-size 4 \\
      --virtual-pipeline-model-parallel-size 2 --num-microbatches 8 --output schedule.svg"""


def main(argv: Sequence[str]) -> int:
    """Run the command and return the exit status: 0, or 2 with one line on stderr for wrong arguments."""
    options = _parser().parse_args(argv)
    try:
        _draw(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Nobody reads any more (`| head`), and what is left in the buffer must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def _draw(options: argparse.Namespace) -> None:
    ranks, chunks = options.pipeline_model_parallel_size, options.virtual_pipeline_model_parallel_size
    microbatches = options.num_microbatches
    for name in ("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "num_microbatches"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: use 1 or more")
    if chunks > 1 and ranks < 2:
        raise ConfigError(
            f"--virtual-pipeline-model-parallel-size {chunks} needs --pipeline-model-parallel-size of 2 or more"
        )
    steps = make_schedule(
        ranks,
        chunks,
        microbatches,
        name=options.pipeline_schedule,
        group_size=options.microbatch_group_size_per_virtual_pipeline_stage,
        forward_only=options.forward_only,
    )
    timeline = simulate(
        steps,
        uniform_durations(options.forward_time, options.backward_time, options.weight_grad_time),
        transfer_time=options.transfer_time,
        wait_late=not options.no_overlap_p2p_communication,
    )
    if options.output is not None:
        _write(options.output, svg_timeline(steps, timeline, chunks, microbatches))
    print(describe_schedule(steps, timeline, chunks, microbatches, with_exchanges=options.exchanges))
    if options.output is not None:
        print(f"\nthe timeline is in {options.output}")


def _write(path: Path, picture: str) -> None:
    if path.suffix.lower() != ".svg":
        raise ConfigError(f"--output {path}: the picture is SVG; give a file name that ends in .svg")
    try:
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parallel_core.report.pipeline",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EXAMPLE,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser(
        "draw",
        help="tick by rank, bubble share, peak in-flight microbatches; with --output a picture",
        allow_abbrev=False,
    )
    draw.add_argument("--pipeline-model-parallel-size", type=int, required=True, metavar="P", help="pipeline ranks")
    draw.add_argument(
        "--virtual-pipeline-model-parallel-size", type=int, default=1, metavar="V", help="model chunks on each rank"
    )
    draw.add_argument("--num-microbatches", type=int, required=True, metavar="M", help="microbatches in an iteration")
    draw.add_argument(
        "--microbatch-group-size-per-virtual-pipeline-stage",
        type=int,
        default=0,
        metavar="G",
        help="microbatches run on one chunk before the next (default: P)",
    )
    draw.add_argument(
        "--pipeline-schedule", choices=("auto", *SCHEDULES), default="auto", help="the order (default: auto)"
    )
    draw.add_argument("--forward-time", type=float, default=1.0, help="time of one chunk's forward pass (default: 1)")
    draw.add_argument("--backward-time", type=float, default=2.0, help="time of its backward pass (default: 2)")
    draw.add_argument(
        "--weight-grad-time", type=float, help="part of it for the weights, where it is split (default: half)"
    )
    draw.add_argument("--transfer-time", type=float, default=0.0, help="time of one transfer (default: 0)")
    draw.add_argument("--forward-only", action="store_true", help="the schedule of an evaluation")
    draw.add_argument(
        "--no-overlap-p2p-communication",
        action="store_true",
        help="wait for a tensor when it is announced, not when it is used",
    )
    draw.add_argument("--exchanges", action="store_true", help="list the transfers of every tick, too")
    draw.add_argument("--output", type=Path, metavar="FILE.svg", help="write the timeline as a picture")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
