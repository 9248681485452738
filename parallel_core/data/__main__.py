"""`python -m parallel_core.data inspect PREFIX`: documents, tokens, lengths, and what each rank of a run would see."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from parallel_core.data.builder import build_train_valid_test_datasets
from parallel_core.data.config import Blend, GPTDatasetConfig, Split
from parallel_core.data.data_order import data_order_fingerprint, describe_data_order
from parallel_core.data.indexed_dataset import open_token_ids
from parallel_core.data.inspection import (
    count_ids_outside,
    describe_batches,
    describe_documents,
    describe_files,
    describe_plan,
)
from parallel_core.data.tokenizer import MegatronTokenizer, NullTokenizer, TokenizerSpec
from parallel_core.errors import ParallelCoreError


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m parallel_core.data", description="Look into training data.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="show what a .bin/.idx pair holds and the first batches of a run",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    inspect.add_argument("prefix", help="path without .bin or .idx")
    inspect.add_argument("--documents", type=int, default=3, help="sequences to show")
    group = inspect.add_argument_group("tokenizer (decodes what is shown)")
    TokenizerSpec.add_arguments(group, required=False)
    run = inspect.add_argument_group("batches of a run (shown when --seq-length is given)")
    run.add_argument("--seq-length", type=int, help="tokens per sample")
    run.add_argument("--train-samples", type=int, help="samples the run asks for; one epoch when left out")
    run.add_argument("--seed", type=int, default=1234, help="seed of the shuffles")
    run.add_argument("--split", help="shares of train, valid and test; '969, 30, 1' when left out")
    run.add_argument("--micro-batch-size", type=int, default=1, help="samples per micro-batch")
    run.add_argument("--data-parallel-size", type=int, default=1, help="data parallel ranks")
    run.add_argument("--consumed-samples", type=int, default=0, help="samples seen before")
    run.add_argument("--dataloader-type", choices=["single", "cyclic"], default="single", help="order of samples")
    run.add_argument("--no-data-sharding", action="store_true", help="of cyclic: ranks take turns in one permutation")
    run.add_argument("--batches", type=int, default=2, help="micro-batches to show per rank")
    run.add_argument("--data-cache-path", help="folder of cached indices; beside the data when left out")
    for name in ("reset-position-ids", "reset-attention-mask", "eod-mask-loss"):
        run.add_argument(f"--{name}", action="store_true", help="as in training")
    return parser


def inspect(args: argparse.Namespace) -> None:
    """Print what `args.prefix` holds."""
    dataset = open_token_ids(args.prefix)
    tokenizer = None
    if args.tokenizer_type:
        tokenizer = TokenizerSpec.from_arguments(args).build()
    for line in describe_files(dataset):
        print(line)
    if tokenizer is not None:
        outside = count_ids_outside(dataset, tokenizer.vocab_size)
        verdict = "all ids are" if not outside else f"WARNING: {outside} ids are not"
        print(f"  {verdict} in the vocabulary of {tokenizer.vocab_size}")
    for line in describe_documents(dataset, tokenizer, args.documents):
        print(line)
    if args.seq_length is not None:
        _inspect_run(args, tokenizer)


def _inspect_run(args: argparse.Namespace, tokenizer: MegatronTokenizer | None) -> None:
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        # without a tokenizer every stored id is shown, and no id ends a document
        tokenizer=tokenizer if tokenizer is not None else NullTokenizer(2**31 - 2),
        blend=Blend((args.prefix,)),
        split=args.split,
        path_to_cache=args.data_cache_path,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
    )
    datasets = build_train_valid_test_datasets(config, (args.train_samples, None, None))
    for split, dataset in zip(Split, datasets):
        lines = [f"{split.name}: none"] if dataset is None else describe_plan(dataset, split.name)
        for line in lines:
            print(line)
    train = datasets[0]
    if train is None:
        return
    for line in describe_batches(
        train,
        tokenizer,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
        consumed_samples=args.consumed_samples,
        dataloader_type=args.dataloader_type,
        data_sharding=not args.no_data_sharding,
        num_batches=args.batches,
    ):
        print(line)
    order = describe_data_order(
        train,
        dataloader_type=args.dataloader_type,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
        data_sharding=not args.no_data_sharding,
    )
    print(f"data order: {data_order_fingerprint(order)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status (1 for a user's mistake, which is printed)."""
    args = build_parser().parse_args(arguments)
    try:
        inspect(args)
    except ParallelCoreError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
