"""PanGu-alpha checkpoints as MindSpore's systems wrote them: published slices, merged files, pipeline slices.

A directory holds one `.ckpt` file with the whole model, or one for every rank (`NAME_R.ckpt`, as the published
`filerted_0.ckpt` to `filerted_511.ckpt` are called, or `rank_R/NAME.ckpt`) beside a strategy file, and may hold the
three tables as `word_embedding.npy`, `position_embedding.npy` and `top_query_embedding.npy`, which then stand over
those in the files. What is no weight (optimizer state, counters, key and value caches) is left out.

`pangu.json` may say what the files do not: `num_attention_heads`, `hidden_act`, `top_query_layer`, `layernorm_epsilon`,
and of models with experts `num_experts_chosen` (1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.checkpoint.huggingface.tensors import (
    FINAL_NORM,
    POSITIONS,
    QUERIES,
    WORD_EMBEDDINGS,
    Part,
    our_shapes,
)
from parallel_core.checkpoint.layout_files import os_errors_named
from parallel_core.checkpoint.mindspore.files import read_ckpt, read_strategy
from parallel_core.checkpoint.mindspore.slices import Files, Whole, placed, whole_parameters
from parallel_core.checkpoint.source import Blob, Piece, PieceSource
from parallel_core.config.experts import MoEConfig
from parallel_core.config.model_keys import model_settings
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import CheckpointError, ConfigError, bullet_list
from parallel_core.records import parse_json, show

SETTINGS_NAME = "pangu.json"
_TABLES = {
    WORD_EMBEDDINGS: ("word_embedding.embedding_table", "word_embedding_table"),
    POSITIONS: ("position_embedding.embedding_table", "position_embedding_table"),
    QUERIES: ("top_query_embedding.embedding_table", "query_embedding_table", "top_query_embedding_table"),
}  # fmt: skip
_NPY = {
    "word_embedding.npy": WORD_EMBEDDINGS, "position_embedding.npy": POSITIONS, "top_query_embedding.npy": QUERIES,
}  # fmt: skip
_LAYER = re.compile(r"(?:blocks\.(\d+)|top_query_layer)\.(.+)")
_OLDER = {"mapping_weight": "weight", "mapping_bias": "bias"}
NO_WEIGHT = re.compile(
    r"(adam_[mv]\.|accu_grads\.|moments\.|.*\.?(key_past|value_past)$|(global_step|epoch_num|step_num|loss_scale|"
    r"current_iterator_step|last_overflow_iterator_step|scale_sense|learning_rate)$)"
)
_MODULES = {
    "layernorm1": "input_layernorm", "layernorm2": "pre_mlp_layernorm", "attention.projection":
    "self_attention.linear_proj", "output.mapping": "mlp.linear_fc1", "output.projection": "mlp.linear_fc2",
    "output.ffn.mapping": "mlp.experts.experts.linear_fc1", "output.ffn.projection": "mlp.experts.experts.linear_fc2",
    "output.router.dense": "mlp.router",
}  # fmt: skip
_DENSE = {"self_attention.linear_q": (1,), "self_attention.linear_kv": (2, 3), "self_attention.linear_qkv": (1, 2, 3)}
"""Which of dense1 (queries), dense2 (keys) and dense3 (values) a module has, head by head."""
_TURNED = ("self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2", "mlp.experts.experts.linear_fc1",
           "mlp.experts.experts.linear_fc2")  # fmt: skip
"""Modules whose matrices are stored [in, out]."""
_HEADS = {1024: 16, 2560: 32, 5120: 40, 16384: 128}
"""Heads of the published sizes, by hidden size (the 1.3B preset that has 1024 and 32 heads is said in pangu.json)."""
_KINDS = {"gamma": "weight", "beta": "bias"}


def is_pangu(path: Path) -> bool:
    """Tell whether a directory holds MindSpore `.ckpt` files, whole or of ranks, and no other format's description."""
    return path.is_dir() and bool(rank_files(path))


class PanguCheckpoint(PieceSource):
    """A PanGu-alpha model as global tensors; iteration 0, no optimizer state."""

    def __init__(self, path: str | Path) -> None:
        """Read where the tensors are.

        Raises:
            CheckpointError: a file is damaged, a slice or a table is missing, or a tensor has no known place.
        """
        path = Path(path)
        with os_errors_named(path):
            found = _named(path, whole_parameters(*stored_slices(path), str(path)))
        model = _model(path, found)
        shapes = our_shapes(model)
        sources = {name: sources_of(name, shape, model) for name, shape in shapes.items()}
        _refuse_unknown(path, found, {source.name for parts in sources.values() for source in parts})
        tensors = placed(path, shapes, sources, found, _spelled)
        common = {
            "iteration": 0,
            "consumed_train_samples": 0,
            "consumed_valid_samples": 0,
            "model_config": {**model_settings(model), "vocab_size": model.vocab_size},
        }
        super().__init__(path, "pangu-alpha", tensors, common)


# ---- files ----------------------------------------------------------------------------------------------------------
def rank_files(path: Path) -> dict[int, Path]:
    """Return the files of the ranks; a file that is alone is rank 0's.

    Raises:
        CheckpointError: two files are the same rank's.
    """
    files = [file for file in sorted(path.glob("*.ckpt")) if "strategy" not in file.name]
    files += sorted(path.glob("rank_*/*.ckpt"))
    if len(files) == 1:
        return {0: files[0]}
    found: dict[int, Path] = {}
    for file in files:
        number = re.fullmatch(r"rank_(\d+)", file.parent.name) or re.search(r"(\d+)\.ckpt$", file.name)
        if number is None or len(number[1]) > 6:
            raise CheckpointError(f"{file}: whose slice is it? Name it NAME_RANK.ckpt, or put it into rank_RANK/")
        rank = int(number[1])
        if rank in found:
            raise CheckpointError(f"{found[rank]} and {file} are both rank {rank}'s; leave one")
        found[rank] = file
    return found


def stored_slices(path: Path) -> tuple[Files, dict[str, Any]]:
    """Return what each rank's file holds, and how the parameters are cut.

    Raises:
        CheckpointError: a file is damaged, or there are slices without one strategy file.
    """
    files = {rank: read_ckpt(file) for rank, file in rank_files(path).items()}
    strategies = [file for file in sorted(path.glob("*.ckpt")) if "strategy" in file.name]
    if len(strategies) > 1:
        raise CheckpointError(f"{path} holds {len(strategies)} strategy files; leave the one of these slices")
    if len(files) > 1 and not strategies:
        raise CheckpointError(f"{path} holds slices of {len(files)} ranks and no strategy.ckpt, which says their cuts")
    strategy = read_strategy(strategies[0]) if strategies and len(files) > 1 else {}
    return files, strategy


def _named(path: Path, stored: Mapping[str, Whole]) -> dict[str, Whole]:
    """Return the parameters by one spelling: `LAYER.MODULE.KIND`, and our names for the tables and the final norm."""
    found: dict[str, Whole] = {}
    strange: list[str] = []
    last = -1
    for full, whole in stored.items():
        name = full.removeprefix("backbone.")
        if NO_WEIGHT.match(full) or NO_WEIGHT.match(name):
            continue
        for ours, spellings in _TABLES.items():
            if name in spellings or name.removeprefix("embedding.") in spellings:
                name = ours
        match = _LAYER.fullmatch(name)
        if match is not None:
            last = max(last, int(match[1] or -1))
            if re.fullmatch(r"output\.ffn\.\w+\.bias", match[2]):
                whole = _bias_of_experts(path, full, whole)
            head, _, tail = match[2].rpartition(".")
            name = f"{'top' if match[1] is None else int(match[1])}.{head}.{_OLDER.get(tail, tail)}"
        elif name in ("layernorm.gamma", "layernorm.beta"):
            name = f"{FINAL_NORM}.{_KINDS[name.rpartition('.')[2]]}"
        elif name not in _TABLES:
            strange.append(full)
            continue
        if name in found:
            raise CheckpointError(f"{path}: {show(full)} is stored twice, under two spellings")
        found[name] = whole
    _refuse_unknown(path, strange)
    # The first implementation calls the query layer a block like the others.
    top = last + 1 if any(name.startswith("top.") for name in found) else last
    named = {re.sub(r"^top\.", f"{top}.", name): whole for name, whole in found.items()}
    for file, ours in _NPY.items():
        if (path / file).exists():
            named[ours] = _table(path / file)
    return named


def _bias_of_experts(path: Path, name: str, whole: Whole) -> Whole:
    """Return the bias that is stored [1, E, 1, F] as [E, F]."""
    if len(whole.shape) != 4 or whole.shape[0] != 1 or whole.shape[2] != 1:
        raise CheckpointError(f"{path}: {show(name)} has shape {list(whole.shape)} instead of [1, experts, 1, width]")
    pieces = []
    for piece in whole.pieces:
        if not isinstance(piece.blob, Blob):
            raise CheckpointError(f"{path}: {show(name)} is stored in several parts, which is not read of a bias")
        shape = piece.shape[1], piece.shape[3]
        pieces.append(Piece((piece.start[1], piece.start[3]), shape, piece.blob.reshape(shape)))
    return Whole((whole.shape[1], whole.shape[3]), whole.dtype, tuple(pieces))


def _refuse_unknown(path: Path, names: Iterable[str], known: Set[str] = frozenset()) -> None:
    strange = [show(_spelled(name)) for name in names if name not in known]
    if strange:
        raise CheckpointError(f"{path}: {len(strange)} tensors of no known place:\n{bullet_list(strange, 20)}")


def _table(file: Path) -> Whole:
    """Return a `.npy` table, unread.

    Raises:
        CheckpointError: it is no table of numbers.
    """
    try:
        with file.open("rb") as handle:
            version = np.lib.format.read_magic(handle)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(handle)
            offset = handle.tell()
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        raise CheckpointError(f"{file} is no NumPy file: {str(error)[:200]}") from None
    if fortran or len(shape) != 2 or dtype.str not in ("<f4", "<f2"):
        raise CheckpointError(f"{file} holds {dtype.str} of shape {list(shape)}; a table of float32 or float16 is read")
    tag = {"<f4": "float32", "<f2": "float16"}[dtype.str]
    return Whole(shape, tag, (Piece((0, 0), shape, Blob.contiguous(file, offset, tag, shape)),))


# ---- the model ------------------------------------------------------------------------------------------------------
def _model(path: Path, found: Mapping[str, Whole]) -> TransformerConfig:
    for ours in (*_TABLES, f"{FINAL_NORM}.weight", f"{FINAL_NORM}.bias"):
        if ours not in found:
            spelled = _TABLES.get(ours, (ours,))[0]
            file = next((npy for npy, name in _NPY.items() if name == ours), "")
            raise CheckpointError(
                f"{path}: {spelled} is in no file{f', nor is {file} there' if file else ''} (another model of "
                "MindFormers has its .yaml beside it, with model.model_config)"
            )
    numbers = {int(name.partition(".")[0]) for name in found if name[0].isdigit()}
    num_layers = max(numbers, default=-1) + 1
    missing = sorted(set(range(num_layers)) - numbers)
    if missing or not numbers:
        raise CheckpointError(f"{path}: layers {missing or 'of any number'} are in no file")
    told = _settings(path / SETTINGS_NAME)
    vocab, hidden = found[WORD_EMBEDDINGS].shape
    mapping = found.get(f"{num_layers - 1}.output.mapping.weight")
    if mapping is None or len(mapping.shape) != 2:
        raise CheckpointError(f"{path}: the query layer's output.mapping.weight is in no file, or no matrix")
    heads = told.pop("num_attention_heads", _HEADS.get(hidden))
    if heads is None:
        raise CheckpointError(
            f"{path}: of hidden size {hidden} the files do not say how many heads there are; write "
            f'{{"num_attention_heads": N}} into {path / SETTINGS_NAME}'
        )
    positions = found[POSITIONS].shape[0]
    try:
        told["moe"] = _experts(path, found, num_layers, told.pop("num_experts_chosen", 1))
        return _config(num_layers, hidden, heads, vocab, positions, mapping.shape[1], told)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _experts(path: Path, found: Mapping[str, Whole], num_layers: int, chosen: int) -> MoEConfig:
    routers = {n: found[f"{n}.output.router.dense.weight"] for n in range(num_layers)
               if f"{n}.output.router.dense.weight" in found}  # fmt: skip
    if not routers:
        return MoEConfig()
    number, router = next(iter(routers.items()))
    wide = found.get(f"{number}.output.ffn.mapping.weight")
    if wide is None or len(wide.shape) != 3 or len(router.shape) != 2 or chosen > router.shape[0]:
        raise CheckpointError(
            f"{path}: blocks.{number}.output.ffn.mapping.weight is in no file, or the router's {list(router.shape)} is "
            f"of fewer experts than the {chosen} that are chosen"
        )
    pattern = tuple(int(n in routers) for n in range(num_layers))
    return _rounds(router.shape[0], pattern, wide.shape[2], chosen)


def _rounds(number: int, pattern: tuple[int, ...], width: int, chosen: int) -> MoEConfig:
    return MoEConfig(
        num_experts=number,
        moe_layer_freq=pattern,
        moe_ffn_hidden_size=width,
        moe_router_topk=chosen,
        moe_router_rounds=True,
    )


def _config(
    num_layers: int, hidden: int, heads: int, vocab: int, positions: int, width: int, told: Mapping[str, Any]
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        vocab_size=vocab,
        seq_length=positions,
        max_position_embeddings=positions,
        ffn_hidden_size=width,
        **{"hidden_act": "fast_gelu", "top_query_layer": "norm_before", **told},
    )


def described_model(model: TransformerConfig) -> TransformerConfig:
    """Return the model that is read from files of this form which were written of `model`."""
    told: dict[str, Any] = {
        "top_query_layer": model.top_query_layer,
        "norm_epsilon": model.norm_epsilon,
        "hidden_act": model.hidden_act if model.hidden_act in _TOLD["hidden_act"] else "fast_gelu",
    }
    if (moe := model.moe).num_experts:
        pattern = tuple(int(moe.has_experts(layer)) for layer in range(model.num_layers))
        told["moe"] = _rounds(moe.num_experts, pattern, moe.moe_ffn_hidden_size, moe.moe_router_topk)
    sizes = model.num_layers, model.hidden_size, model.num_attention_heads
    return _config(*sizes, model.vocab_size, model.max_position_embeddings, model.ffn_hidden_size, told)


_TOLD: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("fast_gelu", "gelu_tanh", "gelu"),
    "top_query_layer": ("norm_before", "norm_after"),
}


def _settings(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    told = parse_json(file.read_bytes()[: 1 << 20], str(file), CheckpointError)
    wrong = None
    if not isinstance(told, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    settings: dict[str, Any] = {}
    for key, value in told.items():
        count = key in ("num_attention_heads", "num_experts_chosen") and type(value) is int and 0 < value < 1 << 20
        if count or (key in _TOLD and value in _TOLD[key]):
            settings[key] = value
        elif key == "layernorm_epsilon" and type(value) in (int, float) and 0 < value < 1:
            settings["norm_epsilon"] = float(value)
        else:
            wrong = f"{show(key)}: {show(json.dumps(value))[:100]}"
    if wrong:
        known = ", ".join(f"{key} ({', '.join(values)})" for key, values in _TOLD.items())
        raise CheckpointError(f"{file} has {wrong}; it may hold {known}, num_attention_heads, num_experts_chosen, "
                              "layernorm_epsilon")  # fmt: skip
    return settings


def sources_of(name: str, shape: tuple[int, ...], model: TransformerConfig) -> list[Part]:
    """Return which rows of theirs one of our tensors consists of."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return [Part(name, 0, 0, shape[0])]
    number, module, kind = match.groups()
    D, N = model.kv_channels, model.num_attention_heads
    if module in _DENSE:
        which = _DENSE[module]
        return [
            Part(f"{number}.attention.dense{j}.{kind}", (head * len(which) + i) * D, head * D, D)
            for head in range(N)
            for i, j in enumerate(which)
        ]
    theirs = next(old for old, new in _MODULES.items() if new == module)
    if module.endswith("layernorm"):
        kind = {"weight": "gamma", "bias": "beta"}[kind]
    return [Part(f"{number}.{theirs}.{kind}", 0, 0, shape[0], module in _TURNED and kind == "weight")]


def stored_name(theirs: str, model: TransformerConfig) -> str:
    """Return the released models' name of one of the tensors that `sources_of` names."""
    if theirs in _TABLES:
        return f"backbone.{'' if theirs == QUERIES else 'embedding.'}{_TABLES[theirs][0]}"
    number, _, rest = theirs.partition(".")
    if not number.isdigit():
        kind = {ours: old for old, ours in _KINDS.items()}[theirs.rpartition(".")[2]]
        return f"backbone.layernorm.{kind}"
    return f"backbone.top_query_layer.{rest}" if int(number) == model.num_layers - 1 else _spelled(theirs)


def _spelled(theirs: str) -> str:
    return f"backbone.blocks.{theirs}" if theirs[0].isdigit() else theirs
