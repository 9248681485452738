"""BERT's samples: one or two runs of sentences with some of their words masked, in Megatron's order.

Documents are those of `tools/preprocess_data.py --split-sentences`, a sequence for each sentence. A sample is a run of
sentences of one document, cut in two where the order of segments is asked for, and swapped in half of the cases.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel_core.data.config import GPTDatasetConfig, Split
from parallel_core.data.index_cache import Described, IndexCache
from parallel_core.data.indexed_dataset import IndexedDataset
from parallel_core.data.mersenne import Mersenne32, Mersenne64
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import ConfigError, DataError

_LONGEST_SENTENCE = 512
_MAX_NGRAM = 3
_AROUND = 3  # [CLS], and [SEP] after each segment


@dataclass(frozen=True)
class MaskedWordsConfig(GPTDatasetConfig):
    """What BERT's datasets are made from. Field names are Megatron's."""

    masking_probability: float = 0.15
    """Share of a sample's tokens that are asked for."""
    short_sequence_probability: float = 0.1
    """Share of samples that are cut short at random."""
    classification_head: bool = True
    """Samples are of two segments, and whether the second follows the first is asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tokenizer, BertWordPieceTokenizer):
            raise ConfigError(
                f"an encoder masks words of WordPiece, not of {type(self.tokenizer).__name__}; write --tokenizer-type "
                "BertWordPieceLowerCase --vocab-file vocab.txt"
            )
        if self.sequence_length < 8:
            raise ConfigError(f"sequence_length={self.sequence_length} has no room for two segments; give at least 8")

    @property
    def wordpiece(self) -> BertWordPieceTokenizer:
        """The tokenizer."""
        if not isinstance(self.tokenizer, BertWordPieceTokenizer):
            raise ConfigError(f"{type(self.tokenizer).__name__} is no WordPiece")
        return self.tokenizer


class MaskedWordsDataset(Described):
    """Samples of `sequence_length` tokens with masked words; arguments as `GPTDataset`'s, indices of documents.

    Raises:
        DataError: no document of the split has the sentences for a sample.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        dataset_path: str,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: MaskedWordsConfig,
    ) -> None:
        self.dataset, self.dataset_path, self.indices = dataset, dataset_path, indices
        self.num_samples, self.index_split, self.config = num_samples, index_split, config
        self.sample_index, self.built_anew_on_cache_miss = self._load_or_build()
        if not len(self.sample_index) and num_samples != 0:
            least = 2 if config.classification_head else 1
            raise DataError(
                f"{dataset_path} ({index_split.name}): no document has {least} sentences of at most "
                f"{_LONGEST_SENTENCE} tokens; make the data with --split-sentences"
                + (", or give --bert-no-binary-head" if least == 2 else "")
            )

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What identifies the cached index."""
        config = self.config
        return {
            **config.identifiers(
                "BERTMaskedWordPieceDataset", self.dataset_path, self.num_samples, self.index_split
            ),
            "masking_probability": config.masking_probability,
            "short_sequence_probability": config.short_sequence_probability,
            "classification_head": config.classification_head,
        }

    def __len__(self) -> int:
        return len(self.sample_index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return sample `index`.

        Returns:
            int32 [S] `tokens`, `attention_mask` (0 where there is padding), `tokentype_ids`, `labels` (-1 where nothing
            is asked); float32 [S] `loss_mask`; int32 scalar `is_random`, 1 where the second segment does not follow.

        Raises:
            DataError: a token id is outside the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        begin, end, target = map(int, self.sample_index[index])
        config, tokenizer = self.config, self.config.wordpiece
        random = np.random.RandomState((config.random_seed + index) % 2**32)
        sentences = [self._sentence(number) for number in range(begin, end)]
        pivot, is_random = len(sentences), False
        if config.classification_head:
            pivot = int(random.randint(low=1, high=len(sentences))) if len(sentences) >= 3 else 1
            is_random = bool(random.random_sample() < 0.5)
        parts = [[token for sentence in part for token in sentence] for part in (sentences[:pivot], sentences[pivot:])]
        first, second = parts[::-1] if is_random else parts
        _trim(first, second, target, random)
        tokens = [tokenizer.cls, *first, tokenizer.sep, *second, *([tokenizer.sep] if second else [])]
        masked, positions = mask_words(tokens, target, random, tokenizer, config.masking_probability)
        S, count = config.sequence_length, len(tokens)
        sample = {name: np.zeros(S, np.int32) for name in ("tokens", "attention_mask", "tokentype_ids")}
        sample["tokens"][:] = tokenizer.pad
        sample["tokens"][:count] = masked
        # A piece of text that is the padding's own is seen by nobody, as in Megatron.
        sample["attention_mask"][:] = sample["tokens"] != tokenizer.pad
        sample["tokens"][sample["tokens"] == tokenizer.pad] = 0
        sample["tokentype_ids"][len(first) + 2 : count] = 1
        sample["labels"], sample["loss_mask"] = np.full(S, -1, np.int32), np.zeros(S, np.float32)
        sample["labels"][positions], sample["loss_mask"][positions] = [tokens[p] for p in positions], 1.0
        sample["labels"][sample["labels"] == tokenizer.pad] = 0
        sample["is_random"] = np.array(is_random, np.int32)
        return sample

    def _sentence(self, number: int) -> list[int]:
        tokens, size = self.dataset.get(number), self.config.tokenizer.vocab_size
        if tokens.size and (int(tokens.max()) >= size or int(tokens.min()) < 0):
            raise DataError(
                f"{self.dataset_path}: sentence {number} has a token id outside the vocabulary of {size} ids. The data "
                "was made with another tokenizer than this run's: give the one it was preprocessed with."
            )
        return tokens.tolist()

    def _load_or_build(self) -> tuple[np.ndarray, bool]:
        folder = self.config.path_to_cache
        if folder is None:
            folder = os.path.join(os.path.dirname(self.dataset_path), "cache", f"{type(self).__name__}_indices")
        base = os.path.join(folder, f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}")
        lengths = np.ascontiguousarray(self.dataset.sequence_lengths)
        bounds = np.ascontiguousarray(self.dataset.document_indices)
        source = hashlib.sha256(lengths.tobytes() + bounds.tobytes()).hexdigest()
        cache = IndexCache(base, self.unique_description, source, ("sample_index",))
        arrays, built = cache.get(lambda: {"sample_index": self._build()})
        return arrays["sample_index"], built

    def _build(self) -> np.ndarray:
        bounds = np.append(self.indices, self.indices[-1] + 1)
        return build_mapping(
            self.dataset.document_indices[bounds],
            self.dataset.sequence_lengths,
            num_samples=self.num_samples,
            longest=self.config.sequence_length - _AROUND,
            short_sequence_probability=self.config.short_sequence_probability,
            seed=self.config.random_seed,
            least_sentences=2 if self.config.classification_head else 1,
        )


def build_mapping(
    bounds: np.ndarray,
    lengths: np.ndarray,
    *,
    num_samples: int | None,
    longest: int,
    short_sequence_probability: float,
    seed: int,
    least_sentences: int,
) -> np.ndarray:
    """Return for each sample its first sentence, the one after its last, and how many tokens it may have.

    Whole epochs, shuffled; the same as Megatron's `helpers.build_mapping`.

    Args:
        bounds: [D + 1] first sentence of each document.
        lengths: tokens of each sentence.
        num_samples: samples to have at least; None: one epoch.
        longest: most tokens of a sample.
        short_sequence_probability: share of samples that may have fewer.
        seed: of both generators.
        least_sentences: fewest sentences of a sample.
    """
    draws = Mersenne32(seed)
    ratio = round(1.0 / short_sequence_probability) if short_sequence_probability > 0 else 0

    def target() -> int:
        if not ratio:
            return longest
        number = draws.next()
        return 2 + number % (longest - 1) if number % ratio == 0 else longest

    usable = []
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        sizes = lengths[first:last]
        short = last - first < 2 or int(sizes.max()) <= _LONGEST_SENTENCE
        if last - first >= max(1, least_sentences) and short:
            usable.append((first, sizes.tolist()))
    found: list[tuple[int, int, int]] = []
    while usable and (not found if num_samples is None else len(found) < num_samples):
        for first, sizes in usable:
            begin, wanted, tokens, count, left = first, target(), 0, 0, len(sizes)
            for offset, size in enumerate(sizes):
                tokens, count, left = tokens + size, count + 1, left - 1
                if left == 0 or (tokens >= wanted and left > 1 and count >= least_sentences):
                    found.append((begin, first + offset + 1, wanted))
                    begin, wanted, tokens, count = first + offset + 1, target(), 0, 0
    return _shuffled(np.array(found, np.int64).reshape(-1, 3), seed + 1)


def _shuffled(rows: np.ndarray, seed: int) -> np.ndarray:
    """Return the rows in the order of Fisher and Yates, by C++'s 64-bit generator."""
    draws, order = Mersenne64(seed), list(range(len(rows)))
    for i in range(len(rows) - 1, 0, -1):
        j = draws.next() % (i + 1)
        order[i], order[j] = order[j], order[i]
    return rows[order]


def _trim(first: list[int], second: list[int], target: int, random: np.random.RandomState) -> None:
    """Take tokens from either end of the longer segment until both together have `target`."""
    while len(first) + len(second) > target:
        longer = first if len(first) > len(second) else second
        del longer[0 if random.random_sample() < 0.5 else -1]


def mask_words(
    tokens: list[int],
    target: int,
    random: np.random.RandomState,
    tokenizer: BertWordPieceTokenizer,
    probability: float,
) -> tuple[list[int], list[int]]:
    """Return the tokens with some whole words replaced, and the positions that are asked for, in order.

    Runs of one to three words, of which 80 % of the tokens become `[MASK]`, 10 % a random token, and 10 % stay.

    Args:
        tokens: with `[CLS]` and `[SEP]`, which are never masked.
        target: the sample's length, by which the share counts.
        random: drawn from in Megatron's order.
        tokenizer: which pieces continue a word.
        probability: share of tokens that are asked for.
    """
    words: list[list[int]] = []
    for position, token in enumerate(tokens):
        if token in (tokenizer.cls, tokenizer.sep):
            continue
        if words and tokenizer.continues[token]:
            words[-1].append(position)
        else:
            words.append([position])
    most = min(probability * target, max(1, int(round(len(tokens) * probability))))
    shares = 1.0 / np.arange(1, _MAX_NGRAM + 1)
    shares /= shares.sum(keepdims=True)
    starts = [[words[i : i + n] for n in range(1, _MAX_NGRAM + 1)] for i in range(len(words))]
    random.shuffle(starts)  # type: ignore[arg-type]
    masked = list(tokens)
    asked: set[int] = set()
    sizes = np.arange(1, _MAX_NGRAM + 1)
    for runs in starts:
        if len(asked) >= most:
            break
        n = int(random.choice(sizes, p=shares / shares.sum(keepdims=True)))
        while n and len(asked) + sum(map(len, runs[n - 1])) > most:
            n -= 1
        chosen = [position for word in runs[n - 1] for position in word] if n else []
        if not n or asked.intersection(chosen):
            continue
        for position in chosen:
            asked.add(position)
            if random.random_sample() < 0.8:
                masked[position] = tokenizer.mask
            elif random.random_sample() >= 0.5:
                masked[position] = int(random.randint(0, tokenizer.vocab_size))
    return masked, sorted(asked)
