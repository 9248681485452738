"""`python -m parallel_core.report RUN [RUN2 ...]`: one HTML page about runs, without any network."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel_core.errors import ConfigError
from parallel_core.files import create_file
from parallel_core.report.page import report_page
from parallel_core.report.run_files import read_run


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and return the exit status: 0, or 2 with one line on stderr."""
    options = _parser().parse_args(argv)
    try:
        names = _names(options.runs)
        page = report_page([read_run(folder, name) for folder, name in zip(options.runs, names)])
        output = options.output or options.runs[0] / "report.html"
        try:
            with create_file(output) as file:
                file.write(page)
        except OSError as error:
            raise ConfigError(f"--output {output} cannot be written: {error.strerror or error}") from None
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{output}: {len(page) // 1024} KB; open it in a browser")
    return 0


def _names(folders: Sequence[Path]) -> list[str]:
    """Return names that tell the runs apart: the folders' last parts, as many as it takes."""
    resolved = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, resolved)) + 1):
        names = ["/".join(parts[-count:]) for parts in resolved]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=sys.argv[0] if sys.argv[0].startswith("parallel-core") else "python -m parallel_core.report",
        description="one HTML page about runs: curves, where a step's time goes, the pipeline, what differs",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="log directory of a run (LOG_DIR)")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="default: report.html in the first RUN")
    return parser


if __name__ == "__main__":
    # `-m` puts the current folder first, where a file called yaml.py would be taken for the library.
    if sys.path[0] == os.getcwd():
        del sys.path[0]
    sys.exit(main())
