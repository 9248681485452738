"""Choosing the next token from logits whose vocabulary is cut over ranks; the logits are never gathered.

Thresholds of top-k and top-p are found digit by digit: the ranks sum 256 counts, or probabilities, of the leading byte
of the logits' order, then of the next byte under the one that the threshold is in, four times in all. What is drawn is
the token at which the running sum of probabilities, in the order of ids, passes a number that depends on the request's
seed and the answer's length alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor

from parallel_core.comm.interface import Group
from parallel_core.generate.requests import SamplingParams, TokenLogprob

_NONE = np.float32(-np.inf)
_SLACK = 1 - 1e-9
"""A sum of probabilities this near to `top_p` has reached it: the rounding of float32 logits."""


@dataclass
class Row:
    """What choosing a sequence's next token depends on beside its logits."""

    params: SamplingParams
    seed: int
    sample: int
    prompt: np.ndarray
    """int64, the prompt's tokens."""
    chosen: list[int] = field(default_factory=list)


@dataclass
class Choice:
    """A chosen token, its log-probability where that is asked for, and the likeliest tokens'."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def uniform(seed: int, sample: int, position: int) -> float:
    """Return the number in (0, 1) by which the token at a position of an answer is drawn."""
    digest = hashlib.blake2b(f"{seed},{sample},{position}".encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> 11) + 0.5) * 2.0**-53


class Sampler:
    """Chooses tokens on the ranks of a tensor parallel group; all of them call it alike and find the same.

    Args:
        group: the ranks that hold the vocabulary's parts.
        vocab_size: tokens that exist; rows of the padded vocabulary are never chosen.
        local_size: logits of this rank.
    """

    def __init__(self, group: Group, vocab_size: int, local_size: int) -> None:
        self._group, self._first = group, group.rank * local_size
        self._real = min(max(vocab_size - self._first, 0), local_size)

    # ---- the next token ---------------------------------------------------------------------------------------------
    def choose(self, logits_RV: np.ndarray, rows: Sequence[Row]) -> list[Choice]:
        """Return the next token of each row.

        Args:
            logits_RV: float32, this rank's part of the vocabulary; not changed.
            rows: what each is chosen by.
        """
        raw = self._masked(logits_RV)
        asked = max((row.params.logprobs for row in rows if row.params.logprobs is not None), default=None)
        statistics = None if asked is None else self._log_sum(raw)
        penalised = self._penalised(raw, rows)
        tokens = np.empty(len(rows), np.int64)
        greedy = [i for i, row in enumerate(rows) if row.params.temperature == 0]
        drawn = [i for i, row in enumerate(rows) if row.params.temperature != 0]
        if greedy:
            tokens[greedy] = self._largest(penalised[greedy])[1]
        if drawn:
            tokens[drawn] = self._draw(raw[drawn], penalised[drawn], [rows[i] for i in drawn])
        if statistics is None:
            return [Choice(int(token), 0.0, []) for token in tokens]
        logprobs = self._picked(raw, tokens) - statistics
        tops = self._top(raw, statistics, asked or 0)
        return [
            Choice(int(token), float(value), top[: row.params.logprobs or 0] if row.params.logprobs is not None else [])
            for token, value, top, row in zip(tokens, logprobs, tops, rows)
        ]

    def score(self, logits_TV: np.ndarray, targets_T: np.ndarray, num_top: int) -> list[TokenLogprob]:
        """Return the log-probability of given tokens, and the `num_top` likeliest ones at each place."""
        raw = self._masked(logits_TV)
        log_sum = self._log_sum(raw)
        values, tops = self._picked(raw, targets_T) - log_sum, self._top(raw, log_sum, num_top)
        return [TokenLogprob(int(t), float(v), top) for t, v, top in zip(targets_T, values, tops)]

    # ---- parts ------------------------------------------------------------------------------------------------------
    def _masked(self, logits: np.ndarray) -> np.ndarray:
        logits = np.ascontiguousarray(logits, np.float32)
        if self._real == logits.shape[1]:
            return logits
        logits = logits.copy()
        logits[:, self._real :] = _NONE
        return logits

    def _penalised(self, raw: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
        """Return the logits after penalties; the very array where there are none."""
        out = raw
        for i, row in enumerate(rows):
            params = row.params
            counts = params.frequency_penalty != 0 or params.presence_penalty != 0
            if params.repetition_penalty == 1 and not (counts and row.chosen):
                continue
            if out is raw:
                out = raw.copy()
            if params.repetition_penalty != 1:
                seen = self._own(np.unique(np.concatenate((row.prompt, np.array(row.chosen, np.int64)))))
                values, penalty = out[i, seen], np.float32(params.repetition_penalty)
                out[i, seen] = np.where(values < 0, values * penalty, values / penalty)
            if counts and row.chosen:
                ids, times = np.unique(np.array(row.chosen, np.int64), return_counts=True)
                here = (ids >= self._first) & (ids < self._first + raw.shape[1])
                less = times[here] * params.frequency_penalty + params.presence_penalty
                out[i, ids[here] - self._first] -= less.astype(np.float32)
        return out

    def _own(self, ids: np.ndarray) -> np.ndarray:
        """Return the places of those ids that are of this rank's part."""
        local = ids - self._first
        return local[(local >= 0) & (local < self._real)]

    def _draw(self, raw: np.ndarray, penalised: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
        temperatures = np.array([row.params.temperature for row in rows], np.float32)[:, None]
        z = penalised if (temperatures == 1).all() else penalised / temperatures
        top = self._largest(z)[0]
        least = np.full(len(rows), -np.inf, np.float32)  # what a kept token's z is at least
        keys = None
        ks = np.array([row.params.top_k for row in rows])
        ps = np.array([row.params.top_p for row in rows], np.float64)
        if ks.any() or (ps < 1).any():
            keys = order_keys(z)
        if keys is not None and ks.any():
            limit = self._threshold(keys, (z > _NONE).astype(np.float64), np.where(ks > 0, ks, np.inf))
            least = np.where(ks > 0, values_of(limit), least)
        weights = np.exp(z.astype(np.float64) - top[:, None])
        weights[z < least[:, None]] = 0.0
        if keys is not None and (ps < 1).any():
            total = self._sum(weights.sum(1))
            kept_mass = np.array([not row.params.renormalize for row in rows])
            if kept_mass.any():  # probabilities are those before the penalties, which take mass and give it to none
                plain = raw if (temperatures == 1).all() else raw / temperatures
                with np.errstate(over="ignore"):
                    total = np.where(kept_mass, np.exp(self._log_sum(plain) - top), total)
            limit = self._threshold(keys, weights / total[:, None], np.where(ps < 1, ps * _SLACK, np.inf))
            least = np.where(ps < 1, np.maximum(least, values_of(limit)), least)
        floors = np.array([np.log(row.params.min_p) if row.params.min_p else -np.inf for row in rows])
        least = np.maximum(least, (top + floors).astype(np.float32))
        weights[z < least[:, None]] = 0.0
        us = np.array([uniform(row.seed, row.sample, len(row.chosen)) for row in rows])
        return self._at(weights, us)

    def _at(self, weights: np.ndarray, us: np.ndarray) -> np.ndarray:
        """Return the first token at which the running sum of weights passes u of the whole sum."""
        running = np.cumsum(weights, 1)
        sums = self._gathered(running[:, -1])
        before = sums[: self._group.rank].sum(0)
        goal = us * sums.sum(0)
        found = np.full(len(us), 2**31 - 1, np.int64)
        for i, (row, want) in enumerate(zip(running, goal - before)):
            place = int(np.searchsorted(row, want, "right"))
            inside = place < len(row) and weights[i, place] > 0 and want >= 0
            if want < 0 and running[i, -1] > 0:  # rounding on the border to the rank before: the first of mine
                place, inside = int(np.argmax(weights[i] > 0)), True
            if inside:
                found[i] = place + self._first
        last = np.array([int(np.flatnonzero(w)[-1]) + self._first if w.any() else -1 for w in weights], np.int64)
        found = self._gathered(found).min(0)
        return np.where(found < 2**31 - 1, found, self._gathered(last).max(0))

    def _threshold(self, keys: np.ndarray, weights: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Return of each row the largest key t at which the weights of keys >= t sum up to `wanted`; 0 for infinity."""
        R = len(keys)
        prefix, above = np.zeros(R, np.uint32), np.zeros(R)
        active = np.isfinite(wanted)
        members = [np.flatnonzero(weights[i]) if active[i] else np.empty(0, np.int64) for i in range(R)]
        for step in range(4):
            shift = np.uint32(24 - 8 * step)
            histogram = np.zeros((R, 256))
            for i, ids in enumerate(members):
                digits = (keys[i, ids] >> shift) & np.uint32(255)
                histogram[i] = np.bincount(digits, weights=weights[i, ids], minlength=256)
            histogram = self._sum(histogram)
            down = above[:, None] + np.cumsum(histogram[:, ::-1], 1)
            for i in np.flatnonzero(active):
                enough = down[i] >= wanted[i]
                # Less than is wanted in all, by rounding or because so few are left: everything is kept.
                bucket = int(np.argmax(enough)) if enough.any() else 255 - int(np.argmax(histogram[i] > 0))
                digit = np.uint32(255 - bucket)
                above[i] = down[i, bucket] - histogram[i, digit]
                prefix[i] |= digit << shift
                members[i] = members[i][((keys[i, members[i]] >> shift) & np.uint32(255)) == digit]
        return np.where(active, prefix, np.uint32(0)).astype(np.uint32)

    def _largest(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the largest value of each row, and the lowest id that has it."""
        places = z.argmax(1)
        values, ids = z[np.arange(len(z)), places], places + self._first
        if self._group.size == 1:
            return values, ids
        values, ids = self._gathered(values), self._gathered(ids)
        best = values.argmax(0)  # the first rank that has it, which is the one with lower ids
        every = np.arange(values.shape[1])
        return values[best, every], ids[best, every]

    def _log_sum(self, raw: np.ndarray) -> np.ndarray:
        top = self._largest(raw)[0].astype(np.float64)
        return top + np.log(self._sum(np.exp(raw.astype(np.float64) - top[:, None]).sum(1)))

    def _picked(self, raw: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        local = tokens - self._first
        here = (local >= 0) & (local < raw.shape[1])
        values = raw[np.arange(len(raw)), np.where(here, local, 0)].astype(np.float64)
        return self._sum(np.where(here, values, 0.0))

    def _top(self, raw: np.ndarray, log_sum: np.ndarray, count: int) -> list[list[tuple[int, float]]]:
        if not count:
            return [[] for _ in raw]
        count_here = min(count, raw.shape[1])
        ids = np.stack([_highest(row, count_here) for row in raw])
        values = np.take_along_axis(raw, ids, 1)
        if self._group.size > 1:
            pad = count - count_here
            ids, values = np.pad(ids, ((0, 0), (0, pad))), np.pad(values, ((0, 0), (0, pad)), constant_values=_NONE)
            gathered = self._gathered(values), self._gathered(ids + self._first)
            values, ids = (np.concatenate(list(x), 1) for x in gathered)
        order = np.lexsort((ids, -values), axis=1)[:, :count]
        rows = np.arange(len(raw))[:, None]
        return [
            [(int(i), float(v)) for i, v in zip(of_ids, of_values) if v > -np.inf]
            for of_ids, of_values in zip(ids[rows, order], values[rows, order].astype(np.float64) - log_sum[:, None])
        ]

    # ---- ranks ------------------------------------------------------------------------------------------------------
    def _gathered(self, x: np.ndarray) -> np.ndarray:
        """Return the ranks' arrays, stacked; every bit of them."""
        if self._group.size == 1:
            return x[None]
        # As words: the backends reduce and gather float32 and int32 everywhere, 64 bits not.
        words = np.ascontiguousarray(x).view(np.int32).reshape(-1)
        rows = self._group.all_gather(Tensor.from_numpy(words.copy())).asnumpy().reshape(self._group.size, -1)
        return np.ascontiguousarray(rows).view(x.dtype).reshape(self._group.size, *x.shape)

    def _sum(self, x: np.ndarray) -> np.ndarray:
        """Return the sum over the ranks in float64, in the order of ranks, so that all of them find the same."""
        return x.copy() if self._group.size == 1 else self._gathered(x.astype(np.float64)).sum(0)


def _highest(row: np.ndarray, count: int) -> np.ndarray:
    """Return the places of the `count` largest values, in no order; of equal ones the first."""
    least = np.partition(row, len(row) - count)[len(row) - count]
    above, equal = np.flatnonzero(row > least), np.flatnonzero(row == least)
    return np.concatenate((above, equal[: count - len(above)]))


def order_keys(z: np.ndarray) -> np.ndarray:
    """Return uint32 that are ordered as the float32 `z` are, equal where those are equal."""
    bits = (z + np.float32(0.0)).view(np.uint32)  # -0.0 becomes 0.0
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(0x80000000))


def values_of(keys: np.ndarray) -> np.ndarray:
    """Return the float32 whose `order_keys` these are; what lies under all of them is -infinity."""
    bits = np.where(keys >> np.uint32(31), keys & np.uint32(0x7FFFFFFF), ~keys).astype(np.uint32)
    values = bits.view(np.float32)
    return np.where(np.isnan(values), np.float32(-np.inf), values).astype(np.float32)
