"""Megatron's `--pipeline-model-parallel-layout` strings."""

from __future__ import annotations

import re

from parallel_core.errors import ConfigError


def parse_layout(text: str, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Return the decoder layers of [pipeline rank][chunk] that a layout such as `Et*3|(tt|)*6,L` describes.

    `E` is the embedding, `t` a decoder layer, `L` the loss; `|` ends a stage, `x*n` and `(...)*n` repeat, commas are
    for the eye. Stages come in pipeline order: stage = chunk x ranks + rank.

    Raises:
        ConfigError: The text is not a layout, or its stages do not fill `ranks`.
    """
    flat = text.replace(",", "").replace(" ", "").strip("'\"")
    while "(" in flat:
        flat, found = re.subn(r"\(([^()]*)\)(?:\*(\d+))?", lambda m: m[1] * int(m[2] or 1), flat)
        if not found:
            raise ConfigError("has an unclosed parenthesis")
    flat = re.sub(r"([A-Za-z|])\*(\d+)", lambda m: m[1] * int(m[2]), flat)
    if "m" in flat:
        raise ConfigError("has m, a layer of multi-token prediction, which is not built")
    strange = sorted(set(flat) - set("EtL|"))
    if strange:
        raise ConfigError(f"has {' '.join(strange)}; it is made of E, t, L, |, * and parentheses")
    stages = flat.split("|")
    if stages and not stages[-1]:
        stages.pop()
    if len(stages) % ranks:
        raise ConfigError(f"has {len(stages)} stages, not a multiple of pipeline_model_parallel_size={ranks}")
    if flat.count("E") != 1 or not stages[0].startswith("E") or flat.count("L") != 1 or not stages[-1].endswith("L"):
        raise ConfigError("must have E once, at the start of the first stage, and L once, at the end of the last")
    counts = [stage.count("t") for stage in stages]
    return tuple(tuple(counts[rank::ranks]) for rank in range(ranks))
