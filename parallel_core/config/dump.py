"""A configuration in every written form: what was given, and what became of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import yaml

from parallel_core.config import table
from parallel_core.config.argument import LISTS, Argument
from parallel_core.config.forms import NESTED
from parallel_core.config.load import LoadedConfig
from parallel_core.config.schema import AllConfig

Arguments = dict[str, Any]

def field_value(config: AllConfig, path: str) -> Any:
    """Return the value of the field at the dotted `path`."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def given_arguments(loaded: LoadedConfig) -> Arguments:
    """Return the arguments that lead to `loaded`: those that were given, each with its value."""
    return {name: entry.value for name, entry in loaded.given.items() if name in table.BY_NAME}


def _plain(value: object) -> object:
    """Return `value` with lists in place of tuples, as YAML writes them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def to_flags(arguments: Arguments) -> list[list[str]]:
    """Return `arguments` as a command line, the words of each argument together."""
    return [_words(table.BY_NAME[name], value) for name, value in arguments.items()]


def _words(argument: Argument, value: object) -> list[str]:
    if argument.is_switch:
        if value or not argument.off_flags:
            return [argument.flags[0]] if value else [argument.flags[0], "false"]
        return [argument.off_flags[0]]
    if argument.kind in ("layers", "pattern"):
        return [argument.flag, str(_plain(value)).replace(" ", "")]
    values = value if argument.kind in LISTS and isinstance(value, (list, tuple)) else [value]
    words = [repr(each) if isinstance(each, float) else str(each) for each in values]
    if len(words) == 1 and words[0].startswith("--"):  # a value, not the next flag
        return [f"{argument.flag}={words[0]}"]
    return [argument.flag, *words]


def flags_text(arguments: Arguments) -> str:
    """Return `arguments` as a command line for a shell, one flag to a line."""
    return " \\\n    ".join(shlex.join(words) for words in to_flags(arguments)) + "\n"


class _Dumper(yaml.SafeDumper):
    """Block style for mappings, one line for a list."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _yaml_text(tree: object) -> str:
    style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "default_flow_style": False, "width": 110}
    return yaml.dump(_plain(tree), Dumper=_Dumper, **style)


def flat_yaml(arguments: Arguments) -> str:
    """Return `arguments` as flat YAML of Megatron names."""
    return _yaml_text(arguments) if arguments else "{}\n"


_LANGUAGE_MODEL = """
    num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels hidden_dropout
    attention_dropout fp32_residual_connection apply_residual_connection_post_layernorm add_bias_linear add_qkv_bias
    rotary_interleaved init_method_std apply_query_key_layer_scaling attention_softmax_in_fp32 bias_swiglu_fusion
    apply_rope_fusion recompute_granularity recompute_method recompute_num_layers
    recompute_modules normalization
"""
_MODEL_PARALLEL = """
    tensor_model_parallel_size context_parallel_size pipeline_model_parallel_size
    virtual_pipeline_model_parallel_size sequence_parallel expert_model_parallel_size fp16 bf16 params_dtype
    overlap_p2p_comm
"""


def megatron_yaml(arguments: Arguments) -> str:
    """Return `arguments` in Megatron-LM's YAML layout: `language_model`, `model_parallel`, and the rest flat."""
    tree: dict[str, Any] = {"language_model": {}, "model_parallel": {}}
    for name, value in arguments.items():
        if name == "norm_epsilon":
            tree["language_model"]["layernorm_epsilon"] = value
        elif name == "apply_layernorm_1p":
            tree["language_model"]["layernorm_zero_centered_gamma"] = value
        elif name in _LANGUAGE_MODEL.split():
            tree["language_model"][name] = value
        elif name in _MODEL_PARALLEL.split():
            tree["model_parallel"][name] = value
        else:
            tree[name] = value
    return _yaml_text({key: value for key, value in tree.items() if value != {}})


def _nested_keys() -> dict[str, str]:
    """Return argument -> nested key for the guide's keys that hold the argument's value as it is."""
    keys = {}
    for dotted, read in NESTED.items():
        values = read("word")
        if len(values) == 1 and next(iter(values.values())) == "word":
            keys[next(iter(values))] = dotted
    keys.pop("attention_type", None)
    return keys


def nested_yaml(arguments: Arguments) -> str:
    """Return `arguments` in the guide's nested layout; what it has no key for stands flat at the top level."""
    keys = _nested_keys()
    tree: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "untie_embeddings_and_output_weights":
            _put(tree, "model_config.llm.head.shared_embedding", not value)
        elif name in keys:
            _put(tree, keys[name], str(_plain(value)) if name == "num_layer_list" else value)
        elif name in ("resume_training", "wrap_with_ddp"):
            _put(tree, f"train_config.ms_training_config.{name}", value)
        else:
            tree[name] = value
    return _yaml_text(tree)


def _put(tree: dict[str, Any], dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def sections_yaml(config: AllConfig) -> str:
    """Return every field of `config` in its section: the resolved form that is saved with a run."""
    return _yaml_text(config.to_dict())


def resolved_yaml(loaded: LoadedConfig) -> str:
    """Return the resolved configuration as YAML with a comment on where its values came from; it can be loaded."""
    told = [f"# {path}: {source}" for path, source in loaded.provenance.items() if source != "default"]
    head = f"# The resolved configuration of a run on {loaded.world_size} ranks. Values that were given or derived:\n"
    return head + "\n".join(told) + "\n" + sections_yaml(loaded.config)


FORMS = ("flags", "flat", "megatron", "nested", "sections")


def write_form(loaded: LoadedConfig, form: str) -> str:
    """Return the configuration in one of `FORMS`."""
    if form == "sections":
        return sections_yaml(loaded.config)
    arguments = given_arguments(loaded)
    writers: dict[str, Callable[[Arguments], str]] = {
        "flags": flags_text, "flat": flat_yaml, "megatron": megatron_yaml, "nested": nested_yaml,
    }
    return writers[form](arguments)

