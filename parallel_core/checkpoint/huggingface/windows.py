"""Attention windows: Hugging Face counts the position itself, this project the positions before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel_core.checkpoint.huggingface.architecture import Fields, Group
from parallel_core.checkpoint.huggingface.values import Wrong, count, flag
from parallel_core.config.schema import UNLIMITED, TransformerConfig

_FIELDS = ("fa_config.pre_tokens", "window_attn_skip_freq")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def everywhere(default: int | None) -> Group:
    """Return the group of one window in all layers.

    Args:
        default: the window of this architecture when the key is absent.
    """

    def read(found: Mapping[str, Any], fields: Fields) -> Fields:
        size = _size(found.get("sliding_window", default))
        kinds = _layer_types(found, fields["num_layers"])
        if kinds is not None and any((kind == _SLIDING) != (size is not None) for kind in kinds):
            raise Wrong(f"layer_types and sliding_window={size} disagree")
        return _window(size, None)

    def write(model: TransformerConfig) -> dict[str, Any]:
        size = _size_of(model)
        if size is not None and model.window_attn_skip_freq:
            raise Wrong(f"window_attn_skip_freq={list(model.window_attn_skip_freq)}, one window in all layers there")
        return {"sliding_window": size}

    return Group(("sliding_window", "layer_types"), _FIELDS, read, write)


def by_layer() -> Group:
    """Return the group of Qwen: a switch, a window, and the layers that have it."""

    def read(found: Mapping[str, Any], fields: Fields) -> Fields:
        layers = fields["num_layers"]
        kinds = _layer_types(found, layers)
        if not _flag(found, "use_sliding_window"):
            if kinds is not None and _SLIDING in kinds:
                raise Wrong("layer_types has sliding_attention, and use_sliding_window is false")
            return _window(None, None)
        size = _size(found.get("sliding_window", 4096))
        first = found.get("max_window_layers")
        first = 28 if first is None else first
        if type(first) is not int or first < 0:
            raise Wrong(f"max_window_layers={first!r} takes a number of layers")
        if kinds is None:
            kinds = [_SLIDING if i >= first and size else _FULL for i in range(layers)]
        return _window(size, [int(kind == _SLIDING) for kind in kinds])

    def write(model: TransformerConfig) -> dict[str, Any]:
        size, layers = _size_of(model), model.num_layers
        pattern = list(model.window_attn_skip_freq) or [1] * layers
        if size is None:
            pattern = [0] * layers
        first = pattern.index(1) if 1 in pattern else layers
        return {
            "use_sliding_window": size is not None,
            "sliding_window": size,
            "max_window_layers": first,
            "layer_types": [_SLIDING if windowed else _FULL for windowed in pattern],
        }

    return Group(("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), _FIELDS, read, write)


def _window(size: int | None, pattern: list[int] | None) -> Fields:
    if size is None or (pattern is not None and not any(pattern)):
        return {"fa_config.pre_tokens": UNLIMITED, "window_attn_skip_freq": ()}
    return {"fa_config.pre_tokens": size - 1, "window_attn_skip_freq": tuple(pattern or ())}


def _size(value: Any) -> int | None:
    try:
        return None if value is None else count(value)
    except Wrong as error:
        raise Wrong(f"sliding_window={value!r} {error}") from None


def _size_of(model: TransformerConfig) -> int | None:
    window = model.fa_config.pre_tokens
    return None if window >= UNLIMITED else window + 1


def _flag(found: Mapping[str, Any], name: str) -> bool:
    try:
        return False if found.get(name) is None else flag(found[name])
    except Wrong as error:
        raise Wrong(f"{name}={found[name]!r} {error}") from None


def _layer_types(found: Mapping[str, Any], layers: int) -> list[str] | None:
    kinds = found.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise Wrong(f"layer_types takes a list of {layers}, one word for each layer")
    strange = [kind for kind in kinds if kind not in (_FULL, _SLIDING)]
    if strange:
        raise Wrong(f"layer_types has {strange[0]!r}, which is not built; {_FULL} and {_SLIDING} are")
    return kinds
