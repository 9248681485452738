"""Rotary positions in both spellings: transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from parallel_core.checkpoint.huggingface.architecture import Fields, Group
from parallel_core.checkpoint.huggingface.values import Wrong, count, flag, number
from parallel_core.config.schema import TransformerConfig

_THETA = "rotary_base"
_FACTORS: dict[str, dict[str, tuple[str, Callable[[Any], Any], Any]]] = {
    "default": {},
    "linear": {"factor": ("rotary_seq_len_interpolation_factor", number, None)},
    "dynamic": {
        "factor": ("rope_dynamic_factor", number, None),
        "original_max_position_embeddings": ("rope_original_max_position_embeddings", count, "max"),
    },
    "llama3": {
        "factor": ("rope_scaling_factor", number, None),
        "low_freq_factor": ("rope_low_freq_factor", number, None),
        "high_freq_factor": ("rope_high_freq_factor", number, None),
        "original_max_position_embeddings": ("rope_original_max_position_embeddings", count, "max"),
    },
    "yarn": {
        "original_max_position_embeddings": ("rope_original_max_position_embeddings", count, "max"),
        "factor": ("yarn_rotary_scaling_factor", number, "ratio"),
        "beta_fast": ("yarn_beta_fast", number, 32.0),
        "beta_slow": ("yarn_beta_slow", number, 1.0),
        "attention_factor": ("yarn_attention_factor", number, 0.0),
        "mscale": ("yarn_mscale", number, 0.0),
        "mscale_all_dim": ("yarn_mscale_all_dim", number, 0.0),
        "truncate": ("yarn_correction_range_round_to_int", flag, True),
    },
}
"""rope_type -> number -> (field, reader, what `transformers` takes without it: None is an error)."""
_SETS: dict[str, Fields] = {"llama3": {"use_rope_scaling": True}, "yarn": {"position_embedding_type": "yarn"}}
_FIELDS = (
    "position_embedding_type", _THETA, "rotary_percent", "use_rope_scaling",
    *sorted({field for numbers in _FACTORS.values() for field, _, _ in numbers.values()}),
)  # fmt: skip


def rope(
    theta: float = 10000.0, percent: float = 1.0, older: Mapping[str, str] | None = None, trained: int | None = None
) -> Group:
    """Return the group of rotary positions.

    Args:
        theta: what the architecture takes without a base.
        percent: its share of rotated channels without the key.
        older: this architecture's own names in transformers 4 of `rope_theta` and `partial_rotary_factor`.
        trained: what it takes without `original_max_position_embeddings`; None: `max_position_embeddings`.
    """
    names = {"rope_theta": ["rope_theta"], "partial_rotary_factor": ["partial_rotary_factor"]}
    for name, spelling in (older or {}).items():
        names[name].append(spelling)
    keys = ("rope_parameters", "rope_scaling", "original_max_position_embeddings", *sum(names.values(), []))

    def read(found: Mapping[str, Any], fields: Fields) -> Fields:
        params = _parameters(found)
        kind = _kind(params)
        result: Fields = {"position_embedding_type": "rope", **_SETS.get(kind, {})}
        result[_THETA] = number_of(found, params, "rope_theta", names["rope_theta"], theta)
        share = number_of(found, params, "partial_rotary_factor", names["partial_rotary_factor"], percent)
        if share > 1:
            raise Wrong(f"partial_rotary_factor={share} is above 1")
        result["rotary_percent"] = share
        result.update(_numbers(kind, params, found, fields["max_position_embeddings"], trained))
        _check(kind, result)
        return result

    def write(model: TransformerConfig) -> dict[str, Any]:
        scaling = _scaling(model)
        shared = {"rope_theta": float(model.rotary_base)}
        if model.rotary_percent != percent or percent != 1.0:
            shared["partial_rotary_factor"] = model.rotary_percent
        written: dict[str, Any] = {}
        if scaling["rope_type"] == "dynamic":  # there the trained length has no key of its own
            written["max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
        written["rope_parameters"] = {**shared, **scaling}
        for name, value in shared.items():
            written.update(dict.fromkeys(names[name], value))
        if scaling["rope_type"] != "default":
            written["rope_scaling"] = scaling
        if trained is not None and "original_max_position_embeddings" in scaling:
            written["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        return written

    return Group(keys, (*_FIELDS,), read, write)


def number_of(
    found: Mapping[str, Any], params: Mapping[str, Any], name: str, spellings: list[str], default: float
) -> float:
    """Return a number that may stand in `rope_parameters` or beside it; where both have it they must agree."""
    given = {f"rope_parameters.{name}": params.get(name), **{spelling: found.get(spelling) for spelling in spellings}}
    told = {spelling: value for spelling, value in given.items() if value is not None}
    if not told:
        return default
    if any(value != next(iter(told.values())) for value in told.values()):
        raise Wrong(f"{' and '.join(f'{key}={value!r}' for key, value in told.items())} disagree")
    spelling, value = next(iter(told.items()))
    return _read(spelling, value, number)


def _read(name: str, value: Any, reader: Callable[[Any], Any]) -> Any:
    try:
        return reader(value)
    except Wrong as error:
        raise Wrong(f"{name}={value!r} {error}") from None


def _parameters(found: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: found[name] for name in ("rope_parameters", "rope_scaling") if found.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise Wrong(f"{name}={value!r} takes an object")
        if any(isinstance(inner, (Mapping, list)) for inner in value.values()):
            kinds = [key for key, inner in value.items() if isinstance(inner, (Mapping, list))]
            raise Wrong(f"{name}.{kinds[0]}: several kinds of rotary positions, or a number per channel, are not built")
    merged: dict[str, Any] = {}
    for name, value in given.items():
        for key, inner in value.items():
            key = "rope_type" if key == "type" else key
            if inner is not None and merged.setdefault(key, inner) != inner:
                raise Wrong(f"{name}.{key}={inner!r} and {merged[key]!r} disagree")
    return merged


def _kind(params: Mapping[str, Any]) -> str:
    kind = params.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _FACTORS:
        raise Wrong(f"rope_type={kind!r} is not built; {', '.join(_FACTORS)} are")
    foreign = set(params) - set(_FACTORS[kind]) - {"rope_type", "rope_theta", "partial_rotary_factor"}
    if foreign:
        raise Wrong(f"rope_type={kind!r} does not have {', '.join(f'{k}={params[k]!r}' for k in sorted(foreign))}")
    return kind


def _numbers(
    kind: str, params: Mapping[str, Any], found: Mapping[str, Any], longest: int, assumed: int | None
) -> Fields:
    result: Fields = {}
    trained = found.get("original_max_position_embeddings")
    if kind == "dynamic":  # which counts from max_position_embeddings, whatever the others count from
        trained = assumed = None
    for name, (field, reader, default) in _FACTORS[kind].items():
        value = params.get(name)
        if name == "original_max_position_embeddings" and trained is not None:
            if value not in (None, trained):
                raise Wrong(f"original_max_position_embeddings={trained!r} and {value!r} disagree")
            value = trained
        if value is not None:
            result[field] = _read(name, value, reader)
        elif default == "max":
            result[field] = assumed or longest
        elif default == "ratio":
            result[field] = longest / result.get("rope_original_max_position_embeddings", longest)
        elif default is None:
            raise Wrong(f"rope_type={kind!r} needs {name}")
        else:
            result[field] = default
    if kind == "dynamic" and result["rope_original_max_position_embeddings"] != longest:
        raise Wrong(f"rope_type='dynamic' counts from max_position_embeddings={longest}, not from "
                    f"{result['rope_original_max_position_embeddings']}")  # fmt: skip
    return result


def _check(kind: str, fields: Fields) -> None:
    if kind == "llama3" and fields["rope_high_freq_factor"] <= fields["rope_low_freq_factor"]:
        raise Wrong("high_freq_factor must be above low_freq_factor")
    if kind == "yarn" and (fields[_THETA] <= 1 or fields["yarn_beta_fast"] < fields["yarn_beta_slow"]):
        raise Wrong("rope_type='yarn' needs rope_theta above 1 and beta_fast not below beta_slow")
    if kind == "dynamic" and fields["rope_dynamic_factor"] < 1:
        raise Wrong("rope_type='dynamic' needs a factor of at least 1")


def _scaling(model: TransformerConfig) -> dict[str, Any]:
    """Return `rope_scaling` of a model."""
    kinds = {
        "yarn": model.position_embedding_type == "yarn",
        "llama3": model.use_rope_scaling,
        "dynamic": model.rope_dynamic_factor != 1.0,
        "linear": model.rotary_seq_len_interpolation_factor != 1.0,
    }
    chosen = [kind for kind, there in kinds.items() if there]
    if model.position_embedding_type not in ("rope", "yarn"):
        raise Wrong(f"position_embedding_type={model.position_embedding_type!r}, 'rope' there")
    if len(chosen) > 1:
        raise Wrong(f"rotary frequencies scaled in several ways ({', '.join(chosen)}), in one there")
    kind = chosen[0] if chosen else "default"
    scaling: dict[str, Any] = {"rope_type": kind}
    for name, (field, _, default) in _FACTORS[kind].items():
        value = getattr(model, field)
        if default in (None, "max", "ratio") or value != default:
            scaling[name] = value
    return scaling
