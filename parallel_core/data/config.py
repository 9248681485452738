"""What a GPT dataset is made from: blends, splits and the options of a sample, by Megatron's names."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from parallel_core.data.chat import ChatTemplate
from parallel_core.data.files import read_json, read_text
from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.errors import ConfigError, DataError

DEFAULT_SPLIT = "969, 30, 1"
SplitMatrix = tuple["tuple[float, float] | None", "tuple[float, float] | None", "tuple[float, float] | None"]


class Split(enum.Enum):
    """The three parts of a corpus, in Megatron's order."""

    train = 0
    valid = 1
    test = 2


class Blend(NamedTuple):
    """Path prefixes and their weights; without weights each dataset counts by its length."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None


def parse_blend(words: Sequence[str] | None, key: str = "data_path") -> Blend | None:
    """Return the blend written as `[weight prefix weight prefix ...]` or `[prefix prefix ...]`.

    As in Megatron an even number of words is read as pairs when every first word is a number, else all are prefixes.

    Raises:
        ConfigError: Only some of the pairs begin with a number, or a weight is negative or not finite.
    """
    if not words:
        return None
    names = [str(word).strip() for word in words]
    if len(names) % 2 == 1:
        return Blend(tuple(names))
    weights: list[float] = []
    for word in names[0::2]:
        try:
            weights.append(float(word))
        except ValueError:
            continue
    if not weights:
        return Blend(tuple(names))
    if len(weights) != len(names) // 2:
        raise ConfigError(
            f"{key}={' '.join(names)!r} mixes prefixes with and without a weight. "
            "Write 'weight prefix' for every dataset, or prefixes only."
        )
    if not all(np.isfinite(weight) and weight >= 0 for weight in weights) or not 0 < sum(weights) < np.inf:
        raise ConfigError(f"{key} has weights {weights}: each must be 0 or more, and their sum above 0.")
    return Blend(tuple(names[1::2]), tuple(weights))


def normalize(weights: Sequence[float]) -> list[float]:
    """Return `weights` divided by their sum, in float64."""
    values = np.array(weights, dtype=np.float64)
    return [float(value) for value in values / np.sum(values)]


def parse_and_normalize_split(split: str) -> list[float]:
    """Return the three shares of a split written as `"969,30,1"` (missing ones are 0).

    Raises:
        ConfigError: It holds no number, more than three, or only zeros.
    """
    try:
        shares = [float(number) for number in re.findall(r"[.0-9]+", split)]
    except ValueError as error:
        raise ConfigError(
            f"split={split!r} has a malformed number ({error}). Write three shares: '969,30,1'."
        ) from error
    if not 1 <= len(shares) <= 3 or not 0 < sum(shares) < np.inf:
        raise ConfigError(
            f"split={split!r} has {len(shares)} shares with sum {sum(shares):g}; it needs one to three, for train, "
            "valid and test, with a sum above 0. Write e.g. '969,30,1'."
        )
    return normalize(shares + [0.0] * (3 - len(shares)))


def split_matrix(shares: Sequence[float]) -> SplitMatrix:
    """Return the range of each split in `[0, 1]`, None for an empty one."""
    edges: list[float] = [0]  # an int: so Megatron writes it, and the name of a cache is a hash of the text
    for share in shares:
        edges.append(edges[-1] + share)
    ranges = [(low, high) if high > low else None for low, high in zip(edges[:-1], edges[1:])]
    return ranges[0], ranges[1], ranges[2]


@dataclass(frozen=True)
class GPTDatasetConfig:
    """Everything the datasets of a run are made from. Field names are Megatron's.

    Exactly one of `mock`, `blend` and `blend_per_split` says where the tokens come from.
    """

    random_seed: int
    """Seed of all three shuffles."""
    sequence_length: int
    """Tokens per sample."""
    tokenizer: MegatronTokenizer
    """Gives the end-of-document, pad and vocabulary size."""
    blend: Blend | None = None
    """Datasets that `split` divides into train, valid and test."""
    blend_per_split: tuple[Blend | None, Blend | None, Blend | None] | None = None
    """Datasets of each split on their own; `split` is not used then."""
    split: str | None = None
    """Shares of train, valid and test, `"969, 30, 1"` when None."""
    mock: bool = False
    """Use Megatron's synthetic documents."""
    path_to_cache: str | None = None
    """Folder of cached indices; `cache/GPTDataset_indices` beside the data when None."""
    mmap_bin_files: bool = True
    """Map `.bin` into memory; otherwise read each sequence from the file."""
    num_dataset_builder_threads: int = 1
    """Threads that build the datasets of a blend."""
    mid_level_dataset_surplus: float = 0.005
    """Share of further samples each dataset of a weighted blend is built with."""
    reset_position_ids: bool = False
    """Positions start at 0 again after an end of document."""
    reset_attention_mask: bool = False
    """No attention across an end of document."""
    eod_mask_loss: bool = False
    """No loss where the input is an end of document."""
    create_attention_mask: bool = False
    """Put the [1, S, S] boolean mask into samples as well (`document_start` says the same in [S])."""
    drop_last_partial_validation_sequence: bool = True
    """Leave out a last validation sample that is short; otherwise it is padded."""
    add_extra_token_to_sequence: bool = True
    """Draw one token more than `sequence_length` so that the last label is a real token."""
    allow_ambiguous_pad_tokens: bool = False
    """Take the tokenizer's pad id as padding even where it is the end-of-document id too."""
    eos_token_id: int | None = None
    """Id that ends a document; the tokenizer's when None."""
    padding_id: int | None = None
    """Id that counts as padding; the tokenizer's when None."""
    chat: ChatTemplate | None = None
    """The data are conversations, and this is how they are written; None: the data are token ids."""

    def __post_init__(self) -> None:
        sources = [name for name in ("mock", "blend", "blend_per_split") if getattr(self, name)]
        if len(sources) != 1:
            raise ConfigError(
                f"the data source must be one of mock, blend and blend_per_split, but {sources or 'none'} is given. "
                "Set --mock-data, --data-path, or --train-data-path/--valid-data-path/--test-data-path."
            )
        if self.sequence_length < 1:
            raise ConfigError(f"sequence_length={self.sequence_length} must be 1 or more.")
        if not 0 <= self.random_seed < 2**32:
            raise ConfigError(f"random_seed={self.random_seed} must be in [0, 2^32): NumPy's generator takes no other.")
        if self.blend_per_split and self.split is not None:
            raise ConfigError(
                f"split={self.split!r} divides --data-path; with data paths per split it has no meaning. Leave it out."
            )
        if not self.blend_per_split:
            parse_and_normalize_split(self.split_or_default)

    @property
    def split_or_default(self) -> str:
        """`split`, or Megatron's default."""
        return self.split if self.split is not None else DEFAULT_SPLIT

    @property
    def split_matrix(self) -> SplitMatrix | None:
        """Range of each split in `[0, 1]`; None with datasets per split."""
        return None if self.blend_per_split else split_matrix(parse_and_normalize_split(self.split_or_default))

    def identifiers(
        self, name: str, dataset_path: str | None, num_samples: int | None, index_split: Split
    ) -> dict[str, Any]:
        """Return what identifies the cached indices of any dataset, with Megatron's keys in Megatron's order.

        Args:
            name: Class of the dataset, as Megatron calls it.
            dataset_path: Path prefix of the dataset; None for mock data.
            num_samples: Samples that were asked for.
            index_split: Split of the dataset.
        """
        return {
            "class": name,
            "dataset_path": dataset_path,
            "num_samples": num_samples,
            "index_split": index_split.name,
            "random_seed": self.random_seed,
            "sequence_length": self.sequence_length,
            "split": None if self.blend_per_split else self.split_or_default,
            "split_matrix": self.split_matrix,
            "tokenizer": self.tokenizer.unique_identifiers,
        }

    @property
    def eod_token_id(self) -> int:
        """Id that ends a document."""
        return self.tokenizer.eod if self.eos_token_id is None else self.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """Id that counts as padding wherever it appears; -1 (no id at all) when the tokenizer has none of its own."""
        if self.padding_id is not None:
            return self.padding_id
        pad = self.tokenizer.pad
        if pad is None or (pad == self.eod_token_id and not self.allow_ambiguous_pad_tokens):
            return -1
        return pad


def blends_from_arguments(
    *,
    data_path: Sequence[str] | None = None,
    train_data_path: Sequence[str] | None = None,
    valid_data_path: Sequence[str] | None = None,
    test_data_path: Sequence[str] | None = None,
    data_args_path: str | None = None,
    per_split_data_args_path: str | None = None,
) -> tuple[Blend | None, tuple[Blend | None, Blend | None, Blend | None] | None]:
    """Return `(blend, blend_per_split)` from Megatron's data arguments; at most one of them is not None.

    Args:
        data_path: Words of `--data-path`.
        train_data_path: Words of `--train-data-path`.
        valid_data_path: Words of `--valid-data-path`.
        test_data_path: Words of `--test-data-path`.
        data_args_path: File with the words of `--data-path`, separated by white space.
        per_split_data_args_path: JSON file with the lists `train`, `valid` and `test`.

    Raises:
        ConfigError: More than one of the four ways is used.
        DataError: A file cannot be read.
    """
    per_split = [train_data_path, valid_data_path, test_data_path]
    ways = {
        "data_path": bool(data_path),
        "data_args_path": data_args_path is not None,
        "train/valid/test_data_path": any(per_split),
        "per_split_data_args_path": per_split_data_args_path is not None,
    }
    used = [name for name, given in ways.items() if given]
    if len(used) > 1:
        raise ConfigError(f"{' and '.join(used)} are given together; the data can be named in one way only.")
    if data_args_path is not None:
        data_path = read_text(data_args_path).split()
        if not data_path:
            raise DataError(f"data_args_path={data_args_path!r} is empty. Write 'weight prefix' pairs or prefixes.")
    if per_split_data_args_path is not None:
        per_split = _read_per_split(per_split_data_args_path)
    if any(per_split):
        names = ("train_data_path", "valid_data_path", "test_data_path")
        blends = [parse_blend(words, name) for words, name in zip(per_split, names)]
        return None, (blends[0], blends[1], blends[2])
    return parse_blend(data_path), None


def _read_per_split(path: str) -> list[Sequence[str] | None]:
    content = read_json(path)
    if not isinstance(content, dict) or not set(content) <= {"train", "valid", "test"}:
        raise DataError(f'{path}: expected {{"train": [...], "valid": [...], "test": [...]}}, each a list of words.')
    for name, words in content.items():
        if words is not None and not (
            isinstance(words, list) and all(type(word) in (str, int, float) for word in words)
        ):
            raise DataError(f"{path}: {name!r} must be a list of weights and prefixes, not {str(words)[:60]!r}.")
    return [[str(word) for word in content[split.name]] if content.get(split.name) else None for split in Split]
