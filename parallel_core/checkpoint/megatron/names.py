"""Megatron's parameter names in every dialect, and how each parameter is cut by tensor parallelism.

The canonical names are Megatron-core's with the local spec; older and TransformerEngine names map to them:

    language_model.encoder.layers.3.self_attention.query_key_value.weight   before Megatron-core
    decoder.layers.3.self_attention.linear_qkv.layer_norm_weight            TransformerEngine: a norm inside the linear
    decoder.layers.3.input_layernorm.weight                                 canonical
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from parallel_core.checkpoint.megatron.experts import is_expert

LAYER_PATTERN = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")
PREDICTION_PATTERN = re.compile(r"mtp\.layers\.(\d{1,6})\.transformer_layer\.(.+)")
"""The layer of a depth of multi-token prediction; its number is the same in every file."""
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
QKV = "self_attention.linear_qkv"
FC1 = "mlp.linear_fc1"
TO_LATENT = ("self_attention.linear_q_down_proj", "self_attention.linear_kv_down_proj")
"""Projections of multi-latent attention to latents."""
TO_HEADS = (
    "self_attention.linear_q_proj", "self_attention.linear_q_up_proj", "self_attention.linear_kv_up_proj",
)  # fmt: skip
"""Projections of multi-latent attention to heads."""

_IGNORED = re.compile(r"(.*\.)?(_extra_state(/.*)?|inv_freq|core_attention\..*)")
_LEGACY_LAYER = {
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "attention.dense": "self_attention.linear_proj",
    "self_attention.q_layernorm": "self_attention.q_layernorm",
    "self_attention.k_layernorm": "self_attention.k_layernorm",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
    "input_norm": "input_layernorm",
    "input_layernorm": "input_layernorm",
    "post_attention_norm": "pre_mlp_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
}
_LEGACY_TOP = {
    "language_model.embedding.word_embeddings.weight": WORD_EMBEDDINGS,
    "language_model.embedding.position_embeddings.weight": "embedding.position_embeddings.weight",
    "language_model.output_layer.weight": OUTPUT_LAYER,
    "word_embeddings_for_head.weight": OUTPUT_LAYER,
    "word_embeddings.weight": OUTPUT_LAYER,
}
_TE_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
}
_TE_LATENT_NORMS = {fused: plain for fused, plain in _TE_NORMS.items() if plain != "input_layernorm."}
_EXPERTS = (
    "mlp.router",
    "mlp.experts.experts.linear_fc1",
    "mlp.experts.experts.linear_fc2",
    "mlp.shared_experts",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
)
_LAYER_PARAMETERS = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.linear_q_proj",
    "self_attention.linear_q_down_proj",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_down_proj",
    "self_attention.linear_kv_up_proj",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "self_attention.kv_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    *_EXPERTS,
)
"""Order in which Megatron's local spec registers a layer's modules: the projection comes before qkv."""
_TE_LAYER_PARAMETERS = (
    "self_attention.linear_proj",
    "input_layernorm",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    *_EXPERTS,
)
_TE_LATENT_LAYER_PARAMETERS = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_q_proj",
    "self_attention.linear_q_down_proj",
    "self_attention.q_layernorm",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_down_proj",
    "self_attention.kv_layernorm",
    "self_attention.linear_kv_up_proj",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    *_EXPERTS,
)
"""The norms of latents are part of the projections to heads; that before attention stands alone."""
_WITHOUT_KIND = ("mlp.router.expert_bias", "mlp.shared_experts.gate_weight")
_KINDS = ("weight", "bias", "expert_bias", "gate_weight")
"""Every module has the first two, a router the third, the shared expert the last."""
MEGATRON_LAYER_NAMES = frozenset(f"{module}.{kind}" for module in _LAYER_PARAMETERS for kind in ("weight", "bias"))


def flatten_names(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested model dict as one flat dict with dotted names, in order."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten_names(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def is_ignored(name: str) -> bool:
    """Tell whether a stored name holds nothing a model needs: extra state of TransformerEngine, buffers of RoPE."""
    return _IGNORED.fullmatch(name) is not None


def canonical_name(name: str) -> str | None:
    """Return the canonical name for a stored one, or None for a name of no known dialect.

    The layer number is kept as it is: local in the `torch` format, global in `torch_dist`.
    """
    name = name.removeprefix("module.")
    if name in _LEGACY_TOP:
        return _LEGACY_TOP[name]
    legacy = re.fullmatch(r"language_model\.(?:encoder|transformer)\.(.+)", name)
    if legacy:
        return _canonical_legacy(legacy[1])
    match = LAYER_PATTERN.fullmatch(name) or PREDICTION_PATTERN.fullmatch(name)
    if match is None:
        if re.fullmatch(r"mtp\.layers\.\d{1,6}\.((enorm|hnorm|final_layernorm)\.(weight|bias)|eh_proj\.weight)", name):
            return name
        known = (WORD_EMBEDDINGS, "embedding.position_embeddings.weight", OUTPUT_LAYER)
        return name if name in known or re.fullmatch(r"decoder\.final_layernorm\.(weight|bias)", name) else None
    rest = match[2]
    for fused, plain in _TE_NORMS.items():
        if rest.startswith(fused):
            rest = plain + rest.removeprefix(fused)
    known_here = rest in MEGATRON_LAYER_NAMES or rest in _WITHOUT_KIND or is_expert(rest)
    return name[: match.start(2)] + rest if known_here else None


def _canonical_legacy(rest: str) -> str | None:
    final = re.fullmatch(r"final_(?:layer)?norm\.(weight|bias)", rest)
    if final:
        return f"decoder.final_layernorm.{final[1]}"
    match = re.fullmatch(r"layers\.(\d{1,6})\.(.+)\.(weight|bias)", rest)
    if match is None or match[2] not in _LEGACY_LAYER:
        return None
    return f"decoder.layers.{match[1]}.{_LEGACY_LAYER[match[2]]}.{match[3]}"


def with_layer_offset(name: str, offset: int) -> str:
    """Return `name` with its layer number shifted; unchanged when it has none."""
    match = LAYER_PATTERN.fullmatch(name)
    return f"decoder.layers.{int(match[1]) + offset}.{match[2]}" if match else name


def layer_of(name: str) -> int | None:
    """Return the layer number in a name, or None."""
    match = LAYER_PATTERN.fullmatch(name)
    return int(match[1]) if match else None


def te_fused_name(name: str, latent: bool = False) -> str:
    """Return the name with norms named as parts of the linear after them, as TransformerEngine has them.

    So does `torch_dist` for any specification, except with multi-latent attention.

    Args:
        name: canonical name.
        latent: the model has multi-latent attention.
    """
    if not latent and ".self_attention." in name:
        return name
    for fused, plain in (_TE_LATENT_NORMS if latent else _TE_NORMS).items():
        name = name.replace(f".{plain}", f".{fused}")
    return name


def tensor_parallel_dim(name: str, te_spec: bool = False) -> int | None:
    """Return the dim a parameter is cut along under tensor parallelism; None when every rank has all of it.

    Args:
        name: canonical name.
        te_spec: TransformerEngine's specification, where projections to latents are whole on every rank.
    """
    if name in (WORD_EMBEDDINGS, OUTPUT_LAYER):
        return 0
    module, _, kind = name.rpartition(".")
    by_rows = (QKV, FC1, "eh_proj", "mlp.shared_experts.linear_fc1", *TO_HEADS)
    if module.endswith(tuple(f".{linear}" for linear in by_rows)):
        return 0
    if module.endswith(tuple(f".{to_latent}" for to_latent in TO_LATENT)):
        return None if te_spec else 0
    by_columns = (".self_attention.linear_proj", ".mlp.linear_fc2", ".mlp.shared_experts.linear_fc2")
    if kind == "weight" and module.endswith(by_columns):
        return 1
    return None


def num_stacked_parts(name: str, gated: bool) -> int:
    """Return 2 for a gated fc1, whose gates and ups are cut separately; 1 for everything else."""
    return 2 if gated and (f".{FC1}." in name or ".mlp.shared_experts.linear_fc1." in name) else 1


def is_latent(names: Iterable[str]) -> bool:
    """Tell whether a model of these parameters has multi-latent attention."""
    return any(f".{TO_LATENT[1]}." in name for name in names)


def predicts(names: Iterable[str]) -> bool:
    """Tell whether a model of these parameters predicts tokens beyond the next one."""
    return any(name.startswith("mtp.") for name in names)


def registration_order(names: set[str], layers: range, te_spec: bool = False) -> list[str]:
    """Return the parameters and buffers of one model chunk in the order Megatron registers them.

    Args:
        names: canonical names, of this chunk at least; others are left out.
        layers: numbers of the chunk's layers.
        te_spec: whether the norms sit inside the linear layers (TransformerEngine).
    """
    order = [WORD_EMBEDDINGS, "embedding.position_embeddings.weight"]
    modules: tuple[str, ...] = _LAYER_PARAMETERS
    if te_spec:
        modules = _TE_LATENT_LAYER_PARAMETERS if is_latent(names) else _TE_LAYER_PARAMETERS
    for layer in layers:
        order += [f"decoder.layers.{layer}.{m}.{kind}" for m in modules for kind in _KINDS]
    order += ["decoder.final_layernorm.weight", "decoder.final_layernorm.bias"]
    for depth in sorted({int(name.split(".")[2]) for name in names if name.startswith("mtp.")}):
        within = ("enorm", "hnorm", "eh_proj", *(f"transformer_layer.{m}" for m in modules), "final_layernorm")
        order += [f"mtp.layers.{depth}.{m}.{kind}" for m in within for kind in _KINDS]
    order.append(OUTPUT_LAYER)
    return [name for name in order if name in names]
