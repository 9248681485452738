"""Which layers are on which pipeline stage, from Megatron's arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from parallel_core.errors import CheckpointError


def layers_per_chunk(args: Mapping[str, Any]) -> dict[tuple[int, int], range]:
    """Return the global layer numbers of every (virtual chunk, pipeline rank).

    Args:
        args: Megatron's arguments: `num_layers`, `pipeline_model_parallel_size`,
            `virtual_pipeline_model_parallel_size`, and those that make stages uneven.

    Raises:
        CheckpointError: the layers cannot be split the way the arguments say.
    """
    stages = int(args.get("pipeline_model_parallel_size") or 1)
    layout = args.get("pipeline_model_parallel_layout")
    if layout is not None:
        counts = _counts_of_layout(str(layout), stages)
        chunks = len(counts) // stages
    else:
        chunks = int(args.get("virtual_pipeline_model_parallel_size") or 1)
        counts = _counts(args, stages, chunks)
    if sum(counts) != args["num_layers"]:
        raise CheckpointError(f"pipeline stages of {counts} layers do not add up to num_layers={args['num_layers']}")
    result, first = {}, 0
    for index, count in enumerate(counts):  # in pipeline order: chunk v of rank p is stage v * stages + p
        result[divmod(index, stages)] = range(first, first + count)
        first += count
    return result


def _counts(args: Mapping[str, Any], stages: int, chunks: int) -> list[int]:
    """Return the number of layers of every stage, in pipeline order."""
    num_layers = int(args["num_layers"])
    first, last = (args.get(f"decoder_{end}_pipeline_num_layers") for end in ("first", "last"))
    if first is not None or last is not None:
        middle = stages - (first is not None) - (last is not None)
        left = num_layers - (first or 0) - (last or 0)
        per_stage = _divide(left, middle, num_layers) if middle else 0
        ranks = [per_stage] * stages
        if first is not None:
            ranks[0] = int(first)
        if last is not None:
            ranks[-1] = int(last)
        return [_divide(count, chunks, num_layers) for count in ranks] * chunks
    embedding = bool(args.get("account_for_embedding_in_pipeline_split"))
    loss = bool(args.get("account_for_loss_in_pipeline_split"))
    counts = [_divide(num_layers + embedding + loss, stages * chunks, num_layers)] * (stages * chunks)
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


def _divide(count: int, parts: int, num_layers: int) -> int:
    if count < 0 or count % parts:
        raise CheckpointError(
            f"num_layers={num_layers} cannot be split: {count} layers (embedding and loss included where they count) "
            f"do not divide over {parts} stages or chunks; use sizes that divide"
        )
    return count // parts


def _counts_of_layout(text: str, stages: int) -> list[int]:
    """Return the decoder layers per stage of a layout string such as `Et*3|(tt|)*29,m|L`."""
    flat = text.replace(",", "").replace(" ", "")
    for _ in range(len(flat)):
        flat, repeated = re.subn(r"\(([^()]*)\)(?:\*(\d+))?", lambda m: m[1] * int(m[2] or 1), flat, count=1)
        if not repeated:
            break
    flat = re.sub(r"([A-Za-z|])\*(\d+)", lambda m: m[1] * int(m[2]), flat)
    parts = flat.split("|")
    if not re.fullmatch(r"[EtmL|]*", flat) or len(parts) % stages:
        raise CheckpointError(
            f"pipeline_model_parallel_layout={text!r} does not give {stages} stages a whole number each"
        )
    return [part.count("t") for part in parts]
