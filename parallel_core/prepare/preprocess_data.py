r"""Tokenise text into the `.bin/.idx` pair that training reads; the command line is Megatron's.

    python -m parallel_core.prepare.preprocess_data --input data/corpus.jsonl --output-prefix /tmp/corpus \
        --append-eod --workers 2 --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model

writes `/tmp/corpus_text_document.bin` and `.idx`. The output does not depend on `--workers`, and appears only when it
is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from parallel_core.data.tokenizer import TokenizerSpec
from parallel_core.errors import ConfigError, ParallelCoreError, bullet_list
from parallel_core.prepare.preprocess import PreprocessOptions, PreprocessReport, preprocess
from parallel_core.prepare.text_input import INPUT_FORMATS, InputOptions, find_input_files


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Tokenise text into .bin/.idx files.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    group = parser.add_argument_group("input")
    group.add_argument("--input", nargs="+", required=True, help="JSONL or text files, .gz or not, or patterns")
    group.add_argument("--json-keys", nargs="+", default=["text"], help="fields of a JSONL line to tokenise")
    group.add_argument("--input-format", choices=[*INPUT_FORMATS, "mindrecord"], default="auto", help="see below")
    group.add_argument("--mindrecord-column", default="input_ids", help="column to read from MindRecord files")
    group.add_argument("--skip-bad-documents", action="store_true", help="count and name malformed ones, and go on")
    group.add_argument(
        "--max-document-bytes", type=int, default=InputOptions.max_document_bytes, help="longer documents are malformed"
    )
    group.add_argument("--split-sentences", action="store_true", help="store each sentence as a sequence")
    group.add_argument("--keep-newlines", action="store_true", help="keep line ends between split sentences")
    group.add_argument("--lang", choices=["english"], default="english", help="language of --split-sentences")
    group = parser.add_argument_group("tokenizer")
    TokenizerSpec.add_arguments(group, required=True)
    group.add_argument("--append-eod", action="store_true", help="end documents with the end-of-document id")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, help="output is PREFIX_KEY_document.bin and .idx")
    group.add_argument(
        "--mindrecord-length", type=int, help="write PREFIX_KEY_document.mindrecord too: records of so many ids"
    )
    group = parser.add_argument_group("running")
    group.add_argument("--workers", type=int, default=1, help="tokenising processes")
    group.add_argument("--partitions", type=int, default=1, help="shares the documents are dealt into")
    group.add_argument("--keep-sequential-samples", action="store_true", help="partitions keep the input's order")
    group.add_argument("--log-interval", type=int, default=1000, help="documents between progress lines in a log file")
    parser.epilog = (
        "Formats: jsonl is one JSON object per line; text has blank lines between documents; lines has a document per "
        "line; wikitext is cleaned WikiText, a document per section; mindrecord reads the ids of --mindrecord-column; "
        "auto is text for .txt, .text and .md, else jsonl."
    )
    return parser


class ProgressBar:
    """Shows documents, megabytes and MB/s: one line rewritten on a terminal, a line per interval in a log file.

    Args:
        total_bytes: Size of the input, or None when it is not known (.gz).
        log_interval: Documents between two lines of a log file.
    """

    def __init__(self, total_bytes: int | None, log_interval: int) -> None:
        self._total = total_bytes
        self._interval = max(1, log_interval)
        self._next = self._interval
        self._is_terminal = sys.stderr.isatty()
        self._last_time = 0.0

    def __call__(self, report: PreprocessReport) -> None:
        """Show `report` if it is time to."""
        now = time.perf_counter()
        if self._is_terminal and now - self._last_time >= 0.2:
            self._last_time = now
            print("\r" + self.line(report), end="", file=sys.stderr, flush=True)
        elif not self._is_terminal and report.documents >= self._next:
            self._next = (report.documents // self._interval + 1) * self._interval
            print(self.line(report), file=sys.stderr, flush=True)

    def line(self, report: PreprocessReport) -> str:
        """Return the state in one line."""
        megabytes = report.bytes_read / 1e6
        of_total = ""
        if self._total:
            share = min(1.0, report.bytes_read / self._total)
            filled = int(20 * share)
            of_total = f"[{'#' * filled}{'.' * (20 - filled)}] {share:4.0%}  "
        rate = megabytes / max(report.seconds, 1e-9)
        bad = f"  {report.bad_documents} bad" if report.bad_documents else ""
        return f"{of_total}{report.documents} documents  {megabytes:.1f} MB  {rate:.2f} MB/s{bad}"

    def close(self) -> None:
        """End the rewritten line."""
        if self._is_terminal and self._last_time:
            print(file=sys.stderr)


def options_from(args: argparse.Namespace) -> PreprocessOptions:
    """Return the run's options.

    Raises:
        ConfigError: An option is out of range.
    """
    if args.mindrecord_length is not None and args.mindrecord_length < 2:
        raise ConfigError(f"mindrecord_length={args.mindrecord_length} must be 2 or more.")
    return PreprocessOptions(
        input=tuple(args.input),
        output_prefix=args.output_prefix,
        tokenizer=TokenizerSpec.from_arguments(args),
        input_options=InputOptions(tuple(args.json_keys), args.input_format, args.max_document_bytes),
        append_eod=args.append_eod,
        split_sentences=args.split_sentences,
        keep_newlines=args.keep_newlines,
        workers=args.workers,
        partitions=args.partitions,
        keep_sequential_samples=args.keep_sequential_samples,
        skip_bad_documents=args.skip_bad_documents,
    )


def _total_bytes(patterns: Sequence[str]) -> int | None:
    files = find_input_files(patterns)
    return None if any(name.endswith(".gz") for name in files) else sum(map(os.path.getsize, files))


def _run_on_mindrecord(args: argparse.Namespace) -> None:
    from parallel_core.prepare.mindrecord import mindrecord_to_indexed

    asked = [
        name
        for name in ("append_eod", "split_sentences", "keep_newlines", "skip_bad_documents", "mindrecord_length")
        if getattr(args, name)
    ]
    asked += [name for name in ("workers", "partitions") if getattr(args, name) != 1]
    if asked or len(args.json_keys) > 1:
        flags = ", ".join("--" + name.replace("_", "-") for name in asked) or "a second of --json-keys"
        raise ConfigError(f"MindRecord files hold token ids already: leave out {flags}.")
    prefix = f"{args.output_prefix}_{args.json_keys[0]}_document"
    tokenizer = TokenizerSpec.from_arguments(args).build()
    records, tokens = mindrecord_to_indexed(find_input_files(args.input), prefix, tokenizer, args.mindrecord_column)
    print(f"{prefix}: {records} documents, {tokens} tokens")


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks and print a summary."""
    if args.input_format == "mindrecord":
        _run_on_mindrecord(args)
        return
    options = options_from(args)
    bar = ProgressBar(_total_bytes(options.input), args.log_interval)
    try:
        report = preprocess(options, bar)
    finally:
        bar.close()
    if report.bad_documents:
        print(f"{report.bad_documents} malformed documents were left out, the first of them:", file=sys.stderr)
        print(bullet_list(report.bad_examples), file=sys.stderr)
    for written in report.fields.values():
        prefix = written.output_prefix
        print(
            f"{prefix}.bin and .idx: {written.documents} documents ({written.empty_documents} empty), "
            f"{written.tokens} tokens"
        )
        if args.mindrecord_length is not None:
            from parallel_core.prepare.mindrecord import indexed_to_mindrecord

            path = prefix + ".mindrecord"
            records = indexed_to_mindrecord(prefix, path, args.mindrecord_length)
            print(f"{path}: {records} records of {args.mindrecord_length} ids")
    print(
        f"{report.tokens} tokens in {report.seconds:.1f} s: {report.bytes_read / 1e6 / report.seconds:.2f} MB/s, "
        f"{report.tokens / report.seconds:.0f} tokens/s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Tokenise; return the exit status (1 for a user's mistake, which is printed)."""
    args = build_parser().parse_args(arguments)
    try:
        run(args)
    except ParallelCoreError as error:
        print(f"preprocess_data: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
