"""From the config tree back to arguments, and to every written form."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import yaml

from parallel_core.config import table
from parallel_core.config.argument import LISTS
from parallel_core.config.forms import NESTED, says_nothing
from parallel_core.config.load import LoadedConfig, required_world_size
from parallel_core.config.rules import build_config, run_rules
from parallel_core.config.schema import AllConfig
from parallel_core.config.values import Given

Arguments = dict[str, Any]

_ALWAYS = (
    "num_layers", "hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings",
    "padded_vocab_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size",
    "global_batch_size", "lr",
)


def field_value(config: AllConfig, path: str) -> Any:
    """Return the value of the field at the dotted `path`."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _dtype_flags(config: AllConfig) -> Arguments:
    flag = {"bfloat16": "bf16", "float16": "fp16"}.get(config.model_config.compute_dtype)
    return {flag: True} if flag else {"compute_dtype": config.model_config.compute_dtype}


def _activation(config: AllConfig) -> Arguments:
    act = config.model_config.hidden_act
    if act in ("swiglu", "squared_relu", "openai_gelu"):
        return {act: True}
    return {"bias_gelu_fusion": False} if act == "gelu" else {"hidden_act": act}


def _betas(config: AllConfig) -> Arguments:
    first, second = config.optimizer_config.betas
    return {"adam_beta1": first, "adam_beta2": second}


_MEGATRON_WORDS: dict[str, Callable[[AllConfig], Arguments]] = {
    "model_config.compute_dtype": _dtype_flags,
    "training_config.bf16": _dtype_flags,
    "training_config.fp16": _dtype_flags,
    "model_config.hidden_act": _activation,
    "model_config.qkv_has_bias": lambda c: {"add_qkv_bias": True} if c.model_config.qkv_has_bias else {},
    "optimizer_config.betas": _betas,
}
"""How fields that Megatron says with other arguments are written first; what that misses is written directly."""


def config_to_arguments(config: AllConfig, world_size: int | None = None) -> Arguments:
    """Return the shortest set of Megatron-named values that resolves to `config`, each with its value.

    Args:
        config: A resolved configuration.
        world_size: Ranks it was resolved for; None: `required_world_size(config)`.

    Raises:
        ValueError: The configuration cannot be reached from arguments: it breaks a rule.
    """
    world_size = world_size or required_world_size(config)
    paths = {argument.name: path for path, argument in table.DIRECT.items()}
    arguments: Arguments = {name: field_value(config, paths[name]) for name in _ALWAYS}
    tried: set[str] = set()
    for _ in range(8):
        different = _differences(arguments, config, world_size)
        if not different:
            return _shortest(arguments, config, world_size)
        for path in different:
            argument = table.DIRECT[path]
            if path in _MEGATRON_WORDS and path not in tried:
                arguments.update(_MEGATRON_WORDS[path](config))
                tried.add(path)
            else:
                arguments[argument.name] = field_value(config, path)
    raise ValueError(f"no arguments lead to {', '.join(_differences(arguments, config, world_size))} of this config")


def _shortest(arguments: Arguments, config: AllConfig, world_size: int) -> Arguments:
    """Leave out what other arguments imply, latest first."""
    for name in [name for name in reversed(arguments) if name not in _ALWAYS]:
        without = {other: value for other, value in arguments.items() if other != name}
        if not _differences(without, config, world_size, quiet=False):
            arguments = without
    return {name: _written(value) for name, value in arguments.items()}


def _differences(arguments: Arguments, config: AllConfig, world_size: int, quiet: bool = True) -> list[str]:
    """Return the fields of `config` that `arguments` do not lead to, or what is wrong with the arguments."""
    given = {
        name: Given(name, value, "config", name, value)
        for name, value in arguments.items()
        if not (table.BY_NAME[name].direct and says_nothing(table.BY_NAME[name].fields[0], value))
    }
    resolution = run_rules(given, world_size, quiet=quiet)
    if resolution.problems and not quiet:
        return resolution.problems
    resolved = build_config(resolution)
    return [path for path in table.DIRECT if field_value(resolved, path) != field_value(config, path)]


def _written(value: object) -> object:
    if isinstance(value, tuple):
        return [_written(item) for item in value]
    return value


def to_flags(arguments: Arguments) -> list[str]:
    """Return `arguments` as words of a command line."""
    words: list[str] = []
    for name, value in arguments.items():
        argument = table.BY_NAME[name]
        if value is None:
            continue
        if argument.is_switch:
            words.append(argument.flags[0] if value else argument.off_flags[0])
        elif argument.kind in ("layers", "pattern"):
            words += [argument.flag, str(value).replace(" ", "")]
        elif argument.kind in LISTS:
            words += [argument.flag, *map(str, value)]
        else:
            words += [argument.flag, _number_word(value)]
    return words


def _number_word(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def flags_text(arguments: Arguments) -> str:
    """Return `arguments` as a command line, one flag to a line."""
    lines: list[list[str]] = []
    for word in to_flags(arguments):
        if word.startswith("--"):
            lines.append([word])
        else:
            lines[-1].append(shlex.quote(word))
    return " \\\n    ".join(" ".join(line) for line in lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Block style for mappings, one line for a list."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _yaml_text(tree: object) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110)


def flat_yaml(arguments: Arguments) -> str:
    """Return `arguments` as flat YAML of Megatron names."""
    return _yaml_text(arguments) if arguments else "{}\n"


_LANGUAGE_MODEL = """
    num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels hidden_dropout
    attention_dropout fp32_residual_connection apply_residual_connection_post_layernorm add_bias_linear add_qkv_bias
    rotary_interleaved init_method_std apply_query_key_layer_scaling attention_softmax_in_fp32 bias_swiglu_fusion
    apply_rope_fusion recompute_granularity recompute_method recompute_num_layers normalization
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
            _put(tree, keys[name], str(value) if name == "num_layer_list" else value)
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

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return _written(value)

    return _yaml_text(plain(config.to_dict()))


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
    arguments = config_to_arguments(loaded.config, loaded.world_size)
    writers: dict[str, Callable[[Arguments], str]] = {
        "flags": flags_text, "flat": flat_yaml, "megatron": megatron_yaml, "nested": nested_yaml,
    }
    return writers[form](arguments)

