"""`python -m parallel_core.launch [--plain | --bundled FILE] SCRIPT args...`: run a script on the ranks it needs.

The arguments after the script are a training configuration (`--config FILE --megatron-flag value ...`), which is
checked here, before any process exists. With `--plain` they are passed on unread, and `NPROC` must be set. With
`--bundled`, FILE is the configuration where no argument of the model, the layout or the data is given.

`python -m parallel_core.launch rank-table FILE...` and `hostfile FILE` print the launch line of each node,
`run-distribute` that of one node for the arguments of MindFormers' script.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

_NEEDED = {"mindspore": "mindspore", "numpy": "numpy", "yaml": "pyyaml", "sentencepiece": "sentencepiece"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher if what it needs is installed, and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["rank-table"]:
        from parallel_core.launch import rank_table

        return rank_table.main(words[1:])
    if words[:1] == ["run-distribute"]:
        from parallel_core.launch import run_distribute

        return run_distribute.main(words[1:])
    if words[:1] == ["hostfile"]:
        from parallel_core.launch import cluster

        return cluster.main(words[1:])
    if lacks_packages():
        return 2
    from parallel_core.launch import cli

    return cli.main(words, _find_layouts)


def _find_layouts(*about: Any) -> Sequence[Any]:
    from parallel_core.planner.fewer_ranks import find_layouts  # only after a node is lost

    return find_layouts(*about)


def lacks_packages() -> bool:
    """Return whether this Python lacks a package that the launcher needs, and say which; to be asked before imports."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"{sys.executable} has no {', no '.join(missing)}; activate the environment parallel_core is installed in, "
            "or run `pip install -e .` in this one",
            file=sys.stderr,
        )
    return bool(missing)


if __name__ == "__main__":
    # `-m` puts the current folder first, where a file called yaml.py would be taken for the library.
    if sys.path[0] == os.getcwd():
        del sys.path[0]
    sys.exit(main())
