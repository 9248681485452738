"""`--use-checkpoint-args`: model arguments from the checkpoint that `load` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from parallel_core.config import table
from parallel_core.config.forms import says_nothing
from parallel_core.config.model_keys import FIELD_OF
from parallel_core.config.values import Given
from parallel_core.errors import ConfigError, ParallelCoreError

MODEL_NAMES = frozenset({*FIELD_OF, "group_query_attention", "seq_length"})
"""Arguments that a checkpoint gives, whatever it is."""
_RUN_NAMES = (
    "seq_length", "attention_dropout", "hidden_dropout", "apply_query_key_layer_scaling",
    "make_vocab_size_divisible_by", "vocab_size",
)  # fmt: skip
_LAYOUT_NAMES = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
)  # fmt: skip
_TOKENIZER_NAMES = (
    "tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "legacy_tokenizer", "vocab_extra_ids",
)  # fmt: skip
_ASKING = ("use_checkpoint_args", "use_mp_args_from_checkpoint_args", "use_tokenizer_model_from_checkpoint_args")
NEEDS_CHECKPOINT = ("ckpt_step", "finetune", "skip_train", "exit_on_missing_checkpoint")
"""What makes a `load` without a checkpoint an error: arguments, and fields of `training_config` of the same names."""
_OLDER_WORDS = {"swiglu": "hidden_act", "add_qkv_bias": "qkv_has_bias"}
"""What checkpoints without the newer setting say instead."""


def checkpoint_values(given: Mapping[str, Given]) -> list[Given]:
    """Return the values that the checkpoint in `load` was trained with, as far as the user asks for them.

    None at all where no checkpoint has been written yet and the run may begin without one: then the values are those
    given, so that one command starts a run and restarts it, as in Megatron-LM.

    Raises:
        ConfigError: `load` is not given, or is no checkpoint that can be read.
    """
    if "load" not in given:
        raise ConfigError(f"{given['use_checkpoint_args'].terms}: needs load, the checkpoint to take them from")
    root = str(given["load"].value)
    # Only this option needs the checkpoint readers.
    from parallel_core.checkpoint.native import find_checkpoint, holds_checkpoint
    from parallel_core.checkpoint.opening import open_checkpoint

    step = given["ckpt_step"].value if "ckpt_step" in given else None
    try:
        if not any(name in given and given[name].value for name in NEEDS_CHECKPOINT) and not holds_checkpoint(root):
            return []
        common = open_checkpoint(find_checkpoint(root, step, check=False)).common  # type: ignore[arg-type]
    except ParallelCoreError as error:
        raise ConfigError(str(error)) from None
    settings = common.get("model_config")
    if not isinstance(settings, Mapping) or not settings:
        raise ConfigError(f"{given['load'].terms}: has no arguments in it")
    names = list(_RUN_NAMES)
    if "use_mp_args_from_checkpoint_args" in given:
        names += _LAYOUT_NAMES
    keep = given.get("use_tokenizer_model_from_checkpoint_args")
    if keep is None or keep.value:
        names += _TOKENIZER_NAMES
    found = {**_of_the_model(settings), **dict(_of_the_run(common, names))}
    if "padded_vocab_size" in given:  # padding belongs to the layout; the real rows are checked where they are loaded
        found.pop("padded_vocab_size", None)
    if "bert_head" in given and given["bert_head"].source != "args_defaults":  # --finetune puts it on the encoder
        found.pop("bert_head", None)
    if "num_labels" in given:
        found.pop("num_labels", None)
    return [Given(name, value, f"checkpoint {root}", name, value) for name, value in found.items() if value is not None]


def superseded(given: Mapping[str, Given], stored: Mapping[str, Given]) -> dict[str, str]:
    """Return the given arguments that say in other words what the checkpoint says, each with what it says."""
    paths = {table.BY_NAME[name].fields[0]: name for name in stored}
    replaced: dict[str, str] = {}
    for name in given:
        argument = table.BY_NAME.get(name)
        if argument is None or argument.direct or not argument.fields or name in stored or name in _ASKING:
            continue
        if all(path in paths for path in argument.fields):
            told = paths[argument.fields[0]]
            replaced[name] = f"{told}={stored[told].value}"
    return replaced


def _of_the_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        name: value
        for name, value in settings.items()
        if name in FIELD_OF and not says_nothing(table.BY_NAME[name].fields[0], value)
    }
    for word, newer in _OLDER_WORDS.items():
        if newer not in found and settings.get(word) is not None:
            found[word] = settings[word]
    groups, heads = found.get("num_query_groups"), found.get("num_attention_heads")
    if groups is not None and heads is not None:
        found["group_query_attention"] = groups != heads
    return found


def _of_the_run(common: Mapping[str, Any], names: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield what is known of the run: Megatron's arguments, or the tree that this program writes."""
    args, tree = common.get("megatron_args"), common.get("config")
    for name in names:
        argument = table.BY_NAME[name]
        if isinstance(args, Mapping):
            written = [key for key in (name, *argument.aliases) if args.get(key) is not None]
            if written:
                yield name, args[written[0]]
            continue
        value: Any = tree
        for part in argument.fields[0].split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and not says_nothing(argument.fields[0], value):
            yield name, value
