"""The models of MindFormers: each family's keywords, with their defaults and what they mean here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel_core.config.bert import BertConfig
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError

ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_erf": "gelu", "fast_gelu": "fast_gelu", "relu": "relu", "silu": "silu"}
"""Theirs -> ours; their gelu is the tanh form."""
GENERATION: dict[str, Any] = {
    "do_sample": True, "top_k": 5, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0,
    "max_decode_length": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
"""How a model continues texts where a call does not say, with their defaults."""


def number_or_word(value: object) -> Any:
    """Return a word that YAML 1.1 reads as text, such as 1e-5, as a number, `None` as none, and others as they are."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return None if value == "None" else value


def _same(value: Any) -> Any:
    return value


def _activation(value: Any) -> str:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={value!r}: give one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def _dtype(value: Any) -> str:
    word = str(value).lower().replace("mindspore.", "")
    if word not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"{value!r} is no type of parameters; give float32, float16 or bfloat16")
    return word


@dataclass(frozen=True)
class Setting:
    """A keyword of theirs: its default, the fields of ours that it sets, and how its value is read."""

    default: Any
    fields: tuple[str, ...] = ()
    read: Callable[[Any], Any] = _same
    back: Callable[[Any], Any] = _same


@dataclass(frozen=True)
class Family:
    """A class of configurations.

    Attributes:
        name: of the class, as YAML's `type` says it.
        settings: its keywords.
        fixed: fields that all of its models have.
        derived: from the values by keyword, fields that follow from several.
        ignored: further keywords that change nothing of what is computed.
        architectures: what `arch.type` may be, with the head that it has here.
        aliases: further spellings of keywords in files.
    """

    name: str
    settings: Mapping[str, Setting]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    derived: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda values: {}
    ignored: frozenset[str] = frozenset()
    architectures: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def fields_of(self, given: Mapping[str, Any]) -> dict[str, tuple[Any, tuple[str, ...]]]:
        """Return every field of ours with its value, and the keywords that it comes from.

        Args:
            given: values by keyword; the others have their defaults.

        Raises:
            ConfigError: a value cannot be, or several do not fit one another.
        """
        values = {**{name: setting.default for name, setting in self.settings.items()}, **given}
        self._check_numbers(values)
        found: dict[str, tuple[Any, tuple[str, ...]]] = {}
        for name, setting in self.settings.items():
            if values[name] is not None:
                found.update({path: (setting.read(values[name]), (name,)) for path in setting.fields})
        found.update({path: (value, ()) for path, value in self.fixed.items()})
        from_several = self.derived(values)
        found.update({path: (value, tuple(self.settings)) for path, value in from_several.items() if value is not None})
        if values["hidden_size"] % values["num_heads"]:
            raise ConfigError(
                f"hidden_size={values['hidden_size']} is not a multiple of num_heads={values['num_heads']}"
            )
        return found

    def _check_numbers(self, values: Mapping[str, Any]) -> None:
        """Refuse what is no number where one belongs, so that values can be computed with."""
        for name, value in values.items():
            usual = self.settings[name].default if name in self.settings else ""
            if isinstance(usual, (str, bool)) or (usual is None and value is None):
                continue
            whole = isinstance(usual, int) or name in _WHOLE
            fits = isinstance(value, int) if whole else isinstance(value, (int, float))
            if not fits or isinstance(value, bool) or not 0 <= value < float("inf") or (whole and value == 0):
                raise ConfigError(f"{name}={value!r}: give a {'whole number above zero' if whole else 'number'}")

    def model(self, given: Mapping[str, Any]) -> TransformerConfig:
        """Return the model of values by keyword.

        Raises:
            ConfigError: as `fields_of`.
        """
        return TransformerConfig(**{path: value for path, (value, _) in self.fields_of(given).items()})


_WHOLE = ("ffn_hidden_size", "n_kv_heads", "intermediate_size", "max_position_embeddings")
"""Keywords of whole numbers that have none where nothing is said."""


def _act(default: str) -> Setting:
    words = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return Setting(default, ("hidden_act",), _activation, lambda value: words.get(value, value))


_SIZES = {
    "num_layers": Setting(12, ("num_layers",)),
    "hidden_size": Setting(768, ("hidden_size",)),
    "num_heads": Setting(12, ("num_attention_heads",)),
    "seq_length": Setting(1024, ("seq_length", "max_position_embeddings")),
    "param_init_type": Setting("float32", ("params_dtype",), _dtype),
    "compute_dtype": Setting("float32", ("compute_dtype",), _dtype),
}
_SOFTMAX = Setting(
    "float32", ("attention_softmax_in_fp32",), lambda value: _dtype(value) == "float32",
    lambda value: "float32" if value else "float16",
)  # fmt: skip
_DROPOUT = {
    "hidden_dropout_rate": Setting(0.1, ("hidden_dropout_rate",)),
    "attention_dropout_rate": Setting(0.1, ("attention_dropout_rate",)), "softmax_compute_type": _SOFTMAX,
}  # fmt: skip


def _gpt2_width(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the width of the MLP; refuse a dropout of the embedding's own."""
    if values["embedding_dropout_prob"] != values["hidden_dropout_rate"]:
        raise ConfigError(
            f"embedding_dropout_prob={values['embedding_dropout_prob']} is another than hidden_dropout_rate="
            f"{values['hidden_dropout_rate']}; there is one rate for both, give them alike"
        )
    return {"ffn_hidden_size": values["expand_ratio"] * values["hidden_size"]}


GPT2 = Family(
    "GPT2Config",
    {
        **_SIZES, **_DROPOUT, "vocab_size": Setting(50257, ("vocab_size",)), "hidden_act": _act("gelu"),
        "expand_ratio": Setting(4), "embedding_dropout_prob": Setting(0.1), "num_labels": Setting(2),
    },
    {"normalization": "LayerNorm", "position_embedding_type": "learned_absolute"},
    _gpt2_width,
    architectures={"GPT2LMHeadModel": "none", "GPT2WithLora": "none", "GPT2ForSequenceClassification": "classes"},
)  # fmt: skip

PANGU_ALPHA = Family(
    "PanguAlphaConfig",
    {
        **_SIZES, **_DROPOUT, "vocab_size": Setting(40000, ("vocab_size",)), "hidden_act": _act("fast_gelu"),
        "hidden_size": Setting(2560, ("hidden_size",)), "num_layers": Setting(32, ("num_layers",)),
        "num_heads": Setting(32, ("num_attention_heads",)), "ffn_hidden_size": Setting(None, ("ffn_hidden_size",)),
    },
    {"top_query_layer": "norm_before"},
    architectures={"PanguAlphaHeadModel": "none"},
)  # fmt: skip


def _llama_width(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the width of the MLP, two thirds of four widths rounded up, and the groups."""
    heads, groups = values["num_heads"], values["n_kv_heads"] or values["num_heads"]
    base, more = 4 * values["hidden_size"], values["ffn_dim_multiplier"]
    width = int(2 * (int((more + 0.01) * base) if more else base) / 3)  # their rounding
    rounded = -(-width // values["multiple_of"]) * values["multiple_of"]
    return {
        "ffn_hidden_size": values["intermediate_size"] or rounded,
        "num_query_groups": groups, "group_query_attention": groups != heads,
    }  # fmt: skip


LLAMA = Family(
    "LlamaConfig",
    {
        **_SIZES, "seq_length": Setting(2048, ("seq_length", "max_position_embeddings")),
        "hidden_size": Setting(4096, ("hidden_size",)), "num_layers": Setting(32, ("num_layers",)),
        "num_heads": Setting(32, ("num_attention_heads",)), "vocab_size": Setting(32000, ("vocab_size",)),
        "n_kv_heads": Setting(None, ("num_query_groups",)), "rms_norm_eps": Setting(1e-5, ("norm_epsilon",)),
        "multiple_of": Setting(256), "ffn_dim_multiplier": Setting(None), "theta": Setting(10000.0, ("rotary_base",)),
        "intermediate_size": Setting(None, ("ffn_hidden_size",)), "softmax_compute_type": _SOFTMAX,
    },
    {
        "normalization": "RMSNorm", "position_embedding_type": "rope", "hidden_act": "swiglu", "add_bias_linear": False,
        "qkv_has_bias": False, "out_proj_has_bias": False, "untie_embeddings_and_output_weights": True,
        "hidden_dropout_rate": 0.0, "attention_dropout_rate": 0.0,
    },
    _llama_width,
    frozenset({"rotary_dtype", "qkv_concat", "block_size", "num_blocks", "fine_grain_interleave"}),
    {"LlamaForCausalLM": "none", "LlamaForCausalLMWithLora": "none"},
)  # fmt: skip


def _bert_head(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the head and its segments, and the width of the MLP where it is a multiple."""
    width = values["intermediate_size"] or values["expand_ratio"] * values["hidden_size"]
    head = BertConfig(bert_head=values["head"], num_tokentypes=values["type_vocab_size"])
    return {"ffn_hidden_size": width, "bert": head}


BERT = Family(
    "BertConfig",
    {
        **_SIZES, **_DROPOUT, "vocab_size": Setting(30522, ("vocab_size",)),
        "seq_length": Setting(512, ("seq_length", "max_position_embeddings")),
        "max_position_embeddings": Setting(None, ("max_position_embeddings",)),
        "hidden_act": Setting("gelu", ("hidden_act",)), "intermediate_size": Setting(None, ("ffn_hidden_size",)),
        "layernorm_epsilon": Setting(1e-12, ("norm_epsilon",)), "type_vocab_size": Setting(2),
        "head": Setting("encoder"), "expand_ratio": Setting(4),
    },
    {},
    _bert_head,
    frozenset({
        "use_one_hot_embeddings", "dropout_prob", "num_labels", "dtype", "layernorm_dtype", "model_type",
        "assessment_method",
    }),
    {"BertForPreTraining": "pretraining", "BertForQuestionAnswering": "question_answering"},
    aliases={"embedding_size": "hidden_size", "hidden_dropout_prob": "hidden_dropout_rate",
             "attention_probs_dropout_prob": "attention_dropout_rate", "num_hidden_layers": "num_layers",
             "num_attention_heads": "num_heads", "softmax_dtype": "softmax_compute_type"},
)  # fmt: skip

FAMILIES = {family.name: family for family in (GPT2, PANGU_ALPHA, LLAMA, BERT)}
IGNORED = frozenset({
    "batch_size", "use_past", "layernorm_compute_type", "bos_token_id", "unk_token_id", "is_dynamic", "offset",
})  # fmt: skip
"""Keywords of all families without effect: batches have the size they come in, a cache is always kept, norms are of
float32."""
