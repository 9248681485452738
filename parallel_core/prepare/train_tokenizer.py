r"""Train a SentencePiece model on text or JSONL files.

The bundled `data/tokenizer.model` comes from:

    python -m parallel_core.prepare.train_tokenizer --input data/corpus.jsonl --vocab-size 2048 \
        --output data/tokenizer.model
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence

import sentencepiece

from parallel_core.data.files import atomic_write
from parallel_core.errors import ParallelCoreError
from parallel_core.prepare.text_input import Document, InputOptions, read_documents

# Megatron's legacy SentencePieceTokenizer looks these up by name; inside the model they cost no rows after it
CONTROL_SYMBOLS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
_MAX_SENTENCE_BYTES = 4096


def training_lines(documents: Iterator[Document]) -> Iterator[str]:
    """Yield the lines of all documents, none longer than SentencePiece takes."""
    for document in documents:
        for text in document.texts.values():
            for line in (text if isinstance(text, str) else "\n".join(text)).split("\n"):
                while line:
                    yield line[: _MAX_SENTENCE_BYTES // 4]
                    line = line[_MAX_SENTENCE_BYTES // 4 :]


def train_tokenizer(lines: Iterator[str], vocab_size: int, model_type: str = "bpe") -> bytes:
    """Return a SentencePiece model that gives back every text it encodes.

    Text is not normalised, line ends and runs of spaces are kept, and characters outside the vocabulary become bytes.

    Args:
        lines: Training text.
        vocab_size: Number of ids, including 256 bytes and the special tokens.
        model_type: `bpe` or `unigram`.
    """
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=output,
        vocab_size=vocab_size,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        max_sentence_length=_MAX_SENTENCE_BYTES,
        user_defined_symbols=["\n"],
        control_symbols=list(CONTROL_SYMBOLS),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,  # several threads may order equal scores differently
        minloglevel=2,
    )
    return output.getvalue()


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Train a SentencePiece model.")
    parser.add_argument("--input", nargs="+", required=True, help="text, JSONL or .gz files, or patterns")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="fields of a JSONL line (default: text)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="number of ids (default: 2048)")
    parser.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe", help="kind of model (default: bpe)")
    parser.add_argument("--output", required=True, help="the .model file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write the model; return the exit status."""
    args = build_parser().parse_args(arguments)
    try:
        documents = read_documents(args.input, InputOptions(json_keys=tuple(args.json_keys)))
        model = train_tokenizer(training_lines(documents), args.vocab_size, args.model_type)
        atomic_write(args.output, model)
    except (ParallelCoreError, RuntimeError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {args.vocab_size} ids, {len(model)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
