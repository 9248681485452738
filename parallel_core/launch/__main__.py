"""`python -m parallel_core.launch [--plain | --bundled FILE] SCRIPT args...`: run a script on the ranks it needs.

The arguments after the script are a training configuration (`--config FILE --megatron-flag value ...`), which is
checked here, before any process exists. With `--plain` they are passed on unread, and `NPROC` must be set. With
`--bundled`, FILE is the configuration where no argument of the model, the layout or the data is given.
"""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = {"mindspore": "mindspore", "numpy": "numpy", "yaml": "pyyaml", "sentencepiece": "sentencepiece"}


def _main() -> int:
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"{sys.executable} has no {', no '.join(missing)}; activate the environment parallel_core is installed in, "
            "or run `pip install -e .` in this one",
            file=sys.stderr,
        )
        return 2
    from parallel_core.launch.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(_main())
