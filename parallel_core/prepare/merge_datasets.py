r"""Merge `.bin/.idx` pairs into one, in the order given.

For example:

    python -m parallel_core.prepare.merge_datasets --input part0_text_document part1_text_document \
        --output-prefix all_text_document
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel_core.data.indexed_dataset import IndexedDataset, merge_indexed_datasets
from parallel_core.errors import DataError, ParallelCoreError


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Merge .bin/.idx pairs into one.")
    parser.add_argument("--input", nargs="+", required=True, help="path prefixes, or one folder (all in it, sorted)")
    parser.add_argument("--output-prefix", required=True, help="path prefix to write")
    parser.add_argument("--multimodal", action="store_true", help="the pairs have a mode per sequence")
    return parser


def prefixes_from(names: Sequence[str]) -> list[str]:
    """Return the path prefixes that `names` stand for: themselves, or the pairs of a single folder."""
    if len(names) == 1 and os.path.isdir(names[0]):
        found = sorted(str(path)[:-4] for path in Path(names[0]).glob("*.idx"))
        if not found:
            raise DataError(f"the folder {names[0]!r} holds no .idx file.")
        return found
    return list(names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge; return the exit status (1 for a user's mistake, which is printed)."""
    args = build_parser().parse_args(arguments)
    try:
        prefixes = prefixes_from(args.input)
        merge_indexed_datasets(prefixes, args.output_prefix, args.multimodal)
        merged = IndexedDataset(args.output_prefix, args.multimodal)
    except ParallelCoreError as error:
        print(f"merge_datasets: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    counts = f"{merged.num_documents} documents, {merged.num_tokens} tokens"
    print(f"{args.output_prefix}: {counts} of {len(prefixes)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
