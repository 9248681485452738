"""Where the tensors of a Hugging Face model are, as rows of tensors here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from parallel_core.config.schema import TransformerConfig

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
QUERIES = "decoder.query_embedding.weight"
OUTPUT = "output_layer.weight"
OUTPUT_BIAS = "output_layer.bias"
SCORE = "score.weight"
TOKENTYPES = "embedding.tokentype_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm"


@dataclass(frozen=True)
class Part:
    """Rows of one of our tensors that are rows of one of theirs.

    Attributes:
        name: their tensor.
        ours: first row in our tensor.
        theirs: first row in their tensor (after `transpose`).
        rows: how many.
        transpose: whether theirs is stored [in, out], as GPT-2's are.
        expert: which matrix of ours the rows are of, where ours has one for each expert.
    """

    name: str
    ours: int
    theirs: int
    rows: int
    transpose: bool = False
    expert: int | None = None


@dataclass(frozen=True)
class TensorTable:
    """The names of an architecture's modules.

    Attributes:
        prefix: what stands before the names of the base model.
        top: our parameter -> theirs.
        layers: their name of layer `{}`, below the prefix.
        modules: our module in a layer -> theirs. Several names are stacked along the rows; for `linear_qkv` three names
            are queries, keys and values, and one name is all three, one after another; for `linear_kv` two names are
            keys and values.
        transposed: whether matrices are stored [in, out].
        interleaved_qkv: queries, keys and values of each head stand together, as they do here.
        ignored: stored buffers that are no parameters.
        experts: their modules of expert `{}` in a layer, by ours; several are stacked along the rows.
        gate: their module of the shared expert's gate.
        older: ends of older names -> what they are called now.
        behind: our modules of a depth of multi-token prediction -> theirs, in a layer that follows the model's last.
        copies: names of tensors of ours -> of the copies of them that each depth has.
    """

    prefix: str
    top: Mapping[str, str]
    layers: str
    modules: Mapping[str, tuple[str, ...]]
    transposed: bool = False
    interleaved_qkv: bool = False
    ignored: re.Pattern[str] = field(default=re.compile(r".*rotary_emb\.inv_freq"))
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gate: str = ""
    older: Mapping[str, str] = field(default_factory=dict)
    behind: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    def copied(self, model: TransformerConfig) -> dict[str, str]:
        """Return the tensors of theirs that repeat one of ours, by name, with ours."""
        bases = [self.prefix + self.layers.format(model.num_layers + k) for k in range(model.mtp.mtp_num_layers)]
        return {f"{base}.{theirs}": ours for base in bases for ours, theirs in self.copies.items()}

    def without_absent_depths(self, model: TransformerConfig, stored: Iterable[str]) -> TransformerConfig:
        """Return the model without layers that predict further tokens, where no tensor of them is stored."""
        base = self.layers.format(model.num_layers) + "."
        if any(name.removeprefix(self.prefix).startswith(base) for name in stored):
            return model
        return replace(model, mtp=replace(model.mtp, mtp_num_layers=0))

    def parts(self, model: TransformerConfig) -> dict[str, list[Part]]:
        """Return, for every tensor of `model`, which of theirs it consists of."""
        found: dict[str, list[Part]] = {}
        for name, shape in our_shapes(model).items():
            module, _, kind = name.rpartition(".")
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", _in_line(module, model.num_layers))
            if match is None:
                found[name] = [Part(self.top[name], 0, 0, shape[0])]
                continue
            base = self.prefix + self.layers.format(match[1])
            if match[2] in self.behind and module.startswith("mtp."):
                found[name] = [Part(f"{base}.{self.behind[match[2]]}.{kind}", 0, 0, shape[0])]
                continue
            if kind == "expert_bias":
                found[name] = [Part(f"{base}.{self.modules[match[2]][0]}.e_score_correction_bias", 0, 0, shape[0])]
                continue
            if kind == "gate_weight":
                found[name] = [Part(f"{base}.{self.gate}.weight", 0, 0, 1)]
                continue
            if match[2] in self.experts:
                rows = shape[1] // len(self.experts[match[2]])
                found[name] = [
                    Part(f"{base}.{theirs.format(e)}.{kind}", i * rows, 0, rows, expert=e)
                    for e in range(shape[0])
                    for i, theirs in enumerate(self.experts[match[2]])
                ]
                continue
            names = [f"{base}.{theirs}.{kind}" for theirs in self.modules[match[2]]]
            turned = self.transposed and len(shape) == 2
            if match[2] == "self_attention.linear_qkv" and not self.interleaved_qkv:
                found[name] = list(_qkv_parts(model, names, turned))
            elif match[2] == "self_attention.linear_kv":
                found[name] = list(_kv_parts(model, *names))
            else:
                rows = shape[0] // len(names)
                found[name] = [Part(theirs, i * rows, 0, rows, turned) for i, theirs in enumerate(names)]
        return found


def _in_line(module: str, num_layers: int) -> str:
    """Return a module of a layer that predicts a further token as one of a layer that follows the model's last."""
    match = re.fullmatch(r"mtp\.layers\.(\d+)\.(?:transformer_layer\.)?(.+)", module)
    return f"decoder.layers.{num_layers + int(match[1])}.{match[2]}" if match else module


def our_shapes(model: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of `model`, by name and in the order of the layers."""
    H, D, F, V = model.hidden_size, model.kv_channels, model.ffn_hidden_size, model.vocab_size
    N, G = model.num_attention_heads, model.num_query_groups
    norm = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    shapes: dict[str, tuple[int, ...]] = {WORD_EMBEDDINGS: (V, H)}
    if model.position_embedding_type == "learned_absolute":
        shapes[POSITIONS] = (model.max_position_embeddings, H)
    linears = {
        "self_attention.linear_qkv": ((N + 2 * G) * D, H, model.qkv_has_bias),
        "self_attention.linear_proj": (H, N * D, model.out_proj_has_bias),
        "mlp.linear_fc1": ((2 if model.is_gated else 1) * F, H, model.add_bias_linear),
        "mlp.linear_fc2": (H, F, model.add_bias_linear),
    }
    norms = {"input_layernorm": H, "pre_mlp_layernorm": H}
    if model.bert.is_encoder:
        shapes.update({TOKENTYPES: (model.bert.num_tokentypes, H), **_norm_shapes("embedding.layernorm", H)})
        norms = {"post_attention_layernorm": H, "post_mlp_layernorm": H}
    if model.qk_layernorm:
        norms.update({"self_attention.q_layernorm": D, "self_attention.k_layernorm": D})
    asking = {
        "self_attention.linear_q": (N * D, H, model.qkv_has_bias),
        "self_attention.linear_kv": (2 * G * D, H, model.qkv_has_bias),
    }
    if model.mla.multi_latent_attention:
        linears = {**_latent_linears(model), **{name: linears[name] for name in ("mlp.linear_fc1", "mlp.linear_fc2")}}
        norms = {"input_layernorm": H, "pre_mlp_layernorm": H, **_latent_norms(model)}
    depths = model.mtp.mtp_num_layers
    for i in range(model.num_layers + depths):
        layer, blocks = f"decoder.layers.{i}", dict(linears)
        if i >= model.num_layers:
            depth = f"mtp.layers.{i - model.num_layers}"
            layer = f"{depth}.transformer_layer"
            ends = ("enorm", "hnorm", "final_layernorm")
            shapes.update({f"{depth}.{name}.{kind}": (H,) for name in ends for kind in norm})
            shapes[f"{depth}.eh_proj.weight"] = (H, 2 * H)
        if i == model.num_layers - 1 and model.top_query_layer != "none":
            del blocks["self_attention.linear_qkv"]
            blocks = {**asking, **blocks}
        if model.moe.has_experts(i):
            del blocks["mlp.linear_fc1"], blocks["mlp.linear_fc2"]
            shapes.update({f"{layer}.mlp.{name}": shape for name, shape in _expert_shapes(model).items()})
        for module, (rows, columns, has_bias) in blocks.items():
            shapes[f"{layer}.{module}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{layer}.{module}.bias"] = (rows,)
        shapes.update({f"{layer}.{name}.{kind}": (size,) for name, size in norms.items() for kind in norm})
    if model.top_query_layer != "none":
        shapes[QUERIES] = (model.max_position_embeddings, H)
    if model.bert.is_encoder:
        return {**shapes, **_head_shapes(model)}
    shapes.update({f"{FINAL_NORM}.{kind}": (H,) for kind in norm})
    if model.num_labels:
        shapes[SCORE] = (model.num_labels, H)
    elif model.untie_embeddings_and_output_weights:
        shapes[OUTPUT] = (V, H)
    return shapes


def _norm_shapes(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _head_shapes(model: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an encoder's head."""
    H, V, bert = model.hidden_size, model.vocab_size, model.bert
    shapes: dict[str, tuple[int, ...]] = {}
    if bert.predicts_words:
        shapes.update({"lm_head.dense.weight": (H, H), "lm_head.dense.bias": (H,)})
        shapes.update({**_norm_shapes("lm_head.layernorm", H), OUTPUT_BIAS: (V,)})
        if model.untie_embeddings_and_output_weights:
            shapes[OUTPUT] = (V, H)
    if bert.has_pooler:
        shapes.update({"pooler.dense.weight": (H, H), "pooler.dense.bias": (H,)})
    pairs = {"pretraining": "binary_head", "question_answering": "qa_outputs"}
    if bert.bert_head in pairs:
        shapes.update({f"{pairs[bert.bert_head]}.weight": (2, H), f"{pairs[bert.bert_head]}.bias": (2,)})
    return shapes


def _latent_linears(model: TransformerConfig) -> dict[str, tuple[int, int, bool]]:
    """Return (rows, columns, whether it has a bias) of the projections of multi-latent attention."""
    mla, H, N = model.mla, model.hidden_size, model.num_attention_heads
    queries = {"linear_q_proj": (N * mla.head_size, H)}
    if mla.q_lora_rank:
        queries = {
            "linear_q_down_proj": (mla.q_lora_rank, H), "linear_q_up_proj": (N * mla.head_size, mla.q_lora_rank)
        }  # fmt: skip
    keys = {
        "linear_kv_down_proj": (mla.kv_lora_rank + mla.qk_pos_emb_head_dim, H),
        "linear_kv_up_proj": (N * (mla.qk_head_dim + mla.v_head_dim), mla.kv_lora_rank),
    }
    found = {f"self_attention.{name}": (*shape, False) for name, shape in {**queries, **keys}.items()}
    return {**found, "self_attention.linear_proj": (H, N * mla.v_head_dim, model.out_proj_has_bias)}


def _latent_norms(model: TransformerConfig) -> dict[str, int]:
    """Return the widths of the norms of latents."""
    widths = {"q_layernorm": model.mla.q_lora_rank, "kv_layernorm": model.mla.kv_lora_rank}
    there = {f"self_attention.{name}": width for name, width in widths.items() if width}
    return there if model.qk_layernorm else {}


def _expert_shapes(model: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's router, experts and shared expert."""
    moe, H, parts = model.moe, model.hidden_size, 2 if model.is_gated else 1
    E, F, wide = moe.num_experts, moe.moe_ffn_hidden_size, moe.moe_shared_expert_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"router.weight": (E, H)}
    shapes["experts.experts.linear_fc1.weight"] = (E, parts * F, H)
    shapes["experts.experts.linear_fc2.weight"] = (E, H, F)
    if model.add_bias_linear:
        shapes["experts.experts.linear_fc1.bias"], shapes["experts.experts.linear_fc2.bias"] = (E, parts * F), (E, H)
        if not moe.moe_router_rounds:
            shapes["router.bias"] = (E,)
    if wide:
        shapes["shared_experts.linear_fc1.weight"] = (parts * wide, H)
        shapes["shared_experts.linear_fc2.weight"] = (H, wide)
    if moe.moe_router_enable_expert_bias:
        shapes["router.expert_bias"] = (E,)
    if moe.moe_shared_expert_gate:
        shapes["shared_experts.gate_weight"] = (1, H)
    return shapes


def is_norm(name: str) -> bool:
    """Tell whether a tensor of ours is the weight of a norm."""
    return name.endswith("layernorm.weight")


def _qkv_parts(model: TransformerConfig, names: list[str], transpose: bool) -> Iterator[Part]:
    """Yield the parts of a group-interleaved qkv: per group its query heads, its key, its value."""
    size, groups = model.kv_channels, model.num_query_groups
    queries, all_queries = model.num_attention_heads // groups * size, model.num_attention_heads * size
    begins = (0, 0, 0) if len(names) == 3 else (0, all_queries, all_queries + groups * size)
    three = names if len(names) == 3 else names * 3
    at = 0
    for group in range(groups):
        for name, begin, rows in zip(three, begins, (queries, size, size)):
            yield Part(name, at, begin + group * rows, rows, transpose)
            at += rows


def _kv_parts(model: TransformerConfig, keys: str, values: str) -> Iterator[Part]:
    """Yield the parts of a query layer's keys and values: per head its key, its value."""
    size = model.kv_channels
    for group in range(model.num_query_groups):
        for i, name in enumerate((keys, values)):
            yield Part(name, (2 * group + i) * size, group * size, size)
