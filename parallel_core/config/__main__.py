"""`python -m parallel_core.config`: show, convert, explain, diff and plan configurations, without any device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from parallel_core.config.dump import FORMS, field_value, write_form
from parallel_core.config.explain import explain
from parallel_core.config.failures import failures_text
from parallel_core.config.load import LoadedConfig, load_config
from parallel_core.config.plan import make_plan
from parallel_core.config.plan_text import plan_text
from parallel_core.config.table import DIRECT
from parallel_core.errors import ParallelCoreError

_USAGE = """usage: python -m parallel_core.config COMMAND ...

  show FILE | FLAGS        the resolved configuration, with where each value came from
  convert --to FORM FILE | FLAGS
                           the same configuration in another form: flags, flat, megatron, nested, sections
  explain NAME ...         what an argument does, its default, its field, and what Megatron's is
  diff A B                 fields in which two files differ
  plan FILE | FLAGS [--world-size N] [--every-rank]
                           ranks, layers, schedule, memory, parameters and operations
       [--simulate-failures MTBF_HOURS --save-seconds S --restart-seconds S [--step-seconds S]]
                           goodput, and how often to save, where a rank fails every MTBF_HOURS; the seconds are measured
  plan FILE | FLAGS --world-size N --search [--device ascend910b | cpu | FILE.yaml] [--memory-gb GIB] [--top 10]
                           the fastest layouts of N ranks that fit, why, and their command lines; and what of FILE's own
  calibrate [--output device.yaml] [--ranks R]
                           measures this machine's kernels, transfers and dispatch for --device: about a minute
  docs                     docs/arguments.md

FILE is a YAML file in any of the known layouts; FLAGS are Megatron-LM's, which may follow a FILE.
"""


def main(argv: Sequence[str]) -> int:
    """Run one command and return the exit code: 0, or 1 after a message about a wrong configuration."""
    commands = {
        "show": _show, "convert": _convert, "explain": _explain, "diff": _diff, "plan": _plan, "calibrate": _calibrate,
        "docs": _docs,
    }
    if not argv or argv[0] not in commands:
        print(_USAGE, end="", file=sys.stderr if argv and argv[0] not in ("-h", "--help") else sys.stdout)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        return commands[argv[0]](list(argv[1:]))
    except ParallelCoreError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0


def _load(words: Sequence[str], world_size: int | None = None) -> LoadedConfig:
    """Read a file name, flags, or both."""
    words = list(words)
    if words and not words[0].startswith("--"):
        words = ["--config", *words]
    return load_config(words, world_size=world_size)


def _options(words: Sequence[str], **options: type) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="python -m parallel_core.config")
    for name, kind in options.items():
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=kind)
    return parser.parse_known_args(list(words))


def _show(words: list[str]) -> int:
    options, rest = _options(words, world_size=int)
    loaded = _load(rest, options.world_size)
    width = max(map(len, DIRECT))
    for path, source in sorted(loaded.provenance.items()):
        print(f"{path:{width}}  {_shown(field_value(loaded.config, path)):<24} {source}")
    for note in loaded.notes:
        print(f"note: {note}")
    return 0


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return str([list(item) if isinstance(item, tuple) else item for item in value])
    return repr(value) if isinstance(value, str) else str(value)


def _convert(words: list[str]) -> int:
    options, rest = _options(words, to=str, world_size=int)
    if options.to not in FORMS:
        print(f"convert: --to takes one of {', '.join(FORMS)}", file=sys.stderr)
        return 2
    loaded = _load(rest, options.world_size)
    print(write_form(loaded, options.to), end="")
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _explain(words: list[str]) -> int:
    if not words:
        print("explain: which argument?", file=sys.stderr)
        return 2
    texts = [explain(word) for word in words]
    print("\n\n".join(texts))
    return 0


def _diff(words: list[str]) -> int:
    if len(words) != 2:
        print("diff: takes two files", file=sys.stderr)
        return 2
    first, second = (_load([word]) for word in words)
    same = True
    for path in sorted(DIRECT):
        values = [field_value(loaded.config, path) for loaded in (first, second)]
        if values[0] != values[1]:
            same = False
            print(f"{path}: {_shown(values[0])} ({first.provenance[path]}) | "
                  f"{_shown(values[1])} ({second.provenance[path]})")
    if same:
        print("the same configuration")
    return 0


def _plan(words: list[str]) -> int:
    options, rest = _options(words, world_size=int, every_rank=bool, simulate_failures=float, save_seconds=float,
                             restart_seconds=float, step_seconds=float, search=bool, device=str, memory_gb=float,
                             top=int)
    if options.search:
        return _search(options, rest)
    unread = [f"--{name.replace('_', '-')}" for name in ("device", "memory_gb", "top") if getattr(options, name)]
    if unread:
        print(f"plan: without --search, no {', '.join(unread)}", file=sys.stderr)
        return 2
    seconds = {name: getattr(options, name) for name in ("save_seconds", "restart_seconds", "step_seconds")}
    needed = [] if options.simulate_failures is None else [n for n in list(seconds)[:2] if seconds[n] is None]
    unused = [n for n, value in seconds.items() if value is not None] if options.simulate_failures is None else []
    for names, text in ((needed, "plan: --simulate-failures needs"), (unused, "plan: without --simulate-failures, no")):
        if names:
            print(text, ", ".join("--" + name.replace("_", "-") for name in names), file=sys.stderr)
            return 2
    loaded = _load(rest, options.world_size)
    if options.simulate_failures is not None:
        every = loaded.config.training_config.save_interval
        print(failures_text(options.simulate_failures, loaded.world_size, options.save_seconds,
                            options.restart_seconds, step=options.step_seconds, save_interval=every), end="")
        return 0
    print(plan_text(make_plan(loaded.config, loaded.world_size), options.every_rank), end="")
    return 0


def _search(options: argparse.Namespace, rest: list[str]) -> int:
    others = [name for name in ("simulate_failures", "every_rank") if getattr(options, name)]
    if others or options.world_size is None:
        wrong = f"no --{others[0].replace('_', '-')}" if others else "--world-size N"
        print(f"plan: with --search, {wrong}", file=sys.stderr)
        return 2
    from parallel_core.planner.command import search_text

    asked = {name: getattr(options, name) for name in ("device", "memory_gb", "top")}
    words = rest if not rest or rest[0].startswith("--") else ["--config", *rest]
    print(search_text(words, options.world_size, **{k: v for k, v in asked.items() if v is not None}), end="")
    return 0


def _calibrate(words: list[str]) -> int:
    from parallel_core.planner.calibrate import main

    return main(words)


def _docs(words: list[str]) -> int:
    from parallel_core.config.reference import arguments_page

    print(arguments_page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
