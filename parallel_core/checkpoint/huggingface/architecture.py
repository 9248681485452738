"""An architecture of Hugging Face as data: what each key of its `config.json` means here, and the way back.

Every key is mapped (`keys`, `groups`), known to change nothing (`neutral`), or refused by name; every field that
defines a model is written, fixed by the architecture, at the value that says nothing, or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel_core.checkpoint.huggingface.tensors import TensorTable
from parallel_core.checkpoint.huggingface.values import Wrong
from parallel_core.config.bert import BertConfig
from parallel_core.config.experts import MoEConfig
from parallel_core.config.latent_attention import MLAConfig
from parallel_core.config.model_keys import DEFINING, NAME_OF, default_of, has_effect, value_of
from parallel_core.config.multi_token import MTPConfig
from parallel_core.config.schema import UNLIMITED, FlashAttentionConfig, TransformerConfig

REQUIRED = object()
"""Default of keys that must be there."""
Fields = dict[str, Any]
"""Values by the path of their field below `model_config`."""


@dataclass(frozen=True)
class Key:
    """A key that sets fields of the model.

    Attributes:
        fields: fields that get its value; more than one when the architecture has one switch for them.
        read: its value in ours; raises `Wrong`.
        write: ours in its value; raises `Wrong`.
        default: what `transformers` takes when the key is absent or null.
        aliases: other spellings of the key.
    """

    fields: tuple[str, ...]
    read: Callable[[Any], Any]
    write: Callable[[Any], Any] = lambda value: value
    default: Any = REQUIRED
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Keys that set fields together.

    Attributes:
        keys: the keys, none of which must be there.
        fields: the fields.
        read: (the whole config.json, the fields read so far) -> fields; raises `Wrong`.
        write: the model -> keys; raises `Wrong`.
    """

    keys: tuple[str, ...]
    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Fields], Fields]
    write: Callable[[TransformerConfig], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """One `model_type`.

    Attributes:
        model_type: its name.
        class_names: what `architectures` may name, the one that is written first.
        keys: keys with a meaning of their own.
        groups: keys that mean something together.
        fixed: fields every model of this architecture has, whatever its config says.
        only: keys with the values that ask for nothing; any other value is refused.
        neutral: keys that change nothing of what the model computes.
        tensors: where its tensors are.
    """

    model_type: str
    class_names: tuple[str, ...]
    keys: Mapping[str, Key]
    groups: tuple[Group, ...]
    fixed: Mapping[str, Any]
    tensors: TensorTable
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    neutral: frozenset[str] = frozenset()

    def read(self, found: Mapping[str, Any]) -> TransformerConfig:
        """Return the model that a config.json describes.

        Raises:
            Wrong: a key is missing, unknown, or asks for what is not built; all of them, a line each.
        """
        problems, fields = self._refusals(found), dict(self.fixed)
        used: set[str] = set()
        for name, key in self.keys.items():
            try:
                raw, written = _value(found, name, key)
                used.update((name, *key.aliases))
                fields.update(dict.fromkeys(key.fields, None if raw is None else key.read(raw)))
            except Wrong as error:
                problems.append(f"{error}" if f"{error}".startswith(name) else f"{written}={raw!r} {error}")
        if not problems:
            for group in self.groups:
                try:
                    fields.update(group.read(found, fields))
                except Wrong as error:
                    problems.append(str(error))
        known = used | {key for group in self.groups for key in group.keys} | self.neutral | set(self.only)
        unknown = [name for name in found if name not in known and found[name] is not None]
        problems += [f"{name}={_short(found[name])} is unknown; remove it if it changes nothing" for name in unknown]
        if problems:
            raise Wrong("\n".join(problems))
        return _model(fields)

    def _refusals(self, found: Mapping[str, Any]) -> list[str]:
        refused = [
            f"{name}={_short(found[name])} is not built; {' or '.join(map(repr, fine))} is"
            for name, fine in self.only.items()
            if found.get(name) is not None and not any(_equal(found[name], value) for value in fine)
        ]
        named = found.get("architectures")
        fits = named is None or (isinstance(named, list) and all(name in self.class_names for name in named))
        return refused if fits else [*refused, f"architectures={_short(named)} is not {' or '.join(self.class_names)}"]

    def write(self, model: TransformerConfig) -> dict[str, Any]:
        """Return the keys of config.json that say what this model is.

        Raises:
            Wrong: this architecture has no such model; every setting that it lacks, a line each.
        """
        problems: list[str] = []
        written: dict[str, Any] = {}
        said = set(self.fixed) | {name for group in self.groups for name in group.fields}
        for name, key in self.keys.items():
            said.update(key.fields)
            values = [value_of(model, path) for path in key.fields]
            try:
                if any(value != values[0] for value in values):
                    raise Wrong("has one switch there")
                written[name] = key.write(values[0])
            except Wrong as error:
                told = ", ".join(f"{NAME_OF[path]}={value!r}" for path, value in zip(key.fields, values))
                problems.append(f"{told} {error}")
        for group in self.groups:
            try:
                written.update(group.write(model))
            except Wrong as error:
                problems.append(str(error))
        for path in DEFINING:
            only = self.fixed[path] if path in self.fixed else default_of(path)
            if (path in self.fixed or path not in said) and has_effect(model, path) and value_of(model, path) != only:
                problems.append(f"{NAME_OF[path]}={value_of(model, path)!r}, {only!r} there")
        if problems:
            raise Wrong("\n".join(problems))
        return {"model_type": self.model_type, "architectures": [self.class_names[0]], **written}


def _value(found: Mapping[str, Any], name: str, key: Key) -> tuple[Any, str]:
    """Return a key's value and the spelling it has there."""
    there = [spelling for spelling in (name, *key.aliases) if found.get(spelling) is not None]
    if any(found[spelling] != found[there[0]] for spelling in there):
        raise Wrong(f"{name}: {' and '.join(f'{s}={_short(found[s])}' for s in there)} disagree")
    if there:
        return found[there[0]], there[0]
    if key.default is REQUIRED:
        raise Wrong(f"{name} is missing")
    return key.default, name


def _equal(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _model(fields: Fields) -> TransformerConfig:
    """Return the model of complete fields.

    Raises:
        Wrong: sizes that do not fit one another.
    """
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    groups = fields.get("num_query_groups") or heads
    if not fields.get("kv_channels") and hidden % heads:
        raise Wrong(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and head_dim is not given")
    if heads % groups:
        raise Wrong(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}")
    values = {name: value for name, value in fields.items() if value is not None}
    window = values.pop("fa_config.pre_tokens", UNLIMITED)
    values.update(num_query_groups=groups, group_query_attention=True)
    values.setdefault("seq_length", values["max_position_embeddings"])
    experts = MoEConfig(**{name[4:]: values.pop(name) for name in list(values) if name.startswith("moe.")})
    if experts.moe_router_topk > max(experts.num_experts, 2):
        raise Wrong(f"num_experts_per_tok={experts.moe_router_topk}, and there are {experts.num_experts} experts")
    latent = MLAConfig(**{name[4:]: values.pop(name) for name in list(values) if name.startswith("mla.")})
    bert = BertConfig(**{name[5:]: values.pop(name) for name in list(values) if name.startswith("bert.")})
    further = MTPConfig(mtp_num_layers=values.pop("mtp.mtp_num_layers", 0))
    attention = FlashAttentionConfig(pre_tokens=window)
    model = TransformerConfig(**values, fa_config=attention, moe=experts, mla=latent, mtp=further, bert=bert)
    turned = model.rotary_channels
    if model.is_rotary and (turned < 2 or turned % 2):
        raise Wrong(f"rotates {turned} channels of each head; it must be an even number")
    return model
