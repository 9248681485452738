"""Megatron's `torch` format: one `model_optim_rng.pt` per (tensor, pipeline) rank, as global tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from parallel_core.checkpoint.common import checked_args
from parallel_core.checkpoint.megatron.common_state import (
    common_of,
    loss_scaler_of,
    plain,
    refuse_unsupported,
    step_of,
)
from parallel_core.checkpoint.megatron.experts import ExpertGrid, is_expert
from parallel_core.checkpoint.megatron.names import (
    LAYER_PATTERN,
    OUTPUT_LAYER,
    QKV,
    WORD_EMBEDDINGS,
    canonical_name,
    flatten_names,
    is_ignored,
    layer_of,
)
from parallel_core.checkpoint.megatron.placement import Chunk, Collector, is_te_spec, old_qkv_rows
from parallel_core.checkpoint.megatron.safe_pickle import TorchTensor
from parallel_core.checkpoint.megatron.torch_optimizer import read_optimizer
from parallel_core.checkpoint.megatron.torch_zip import load_torch_zip
from parallel_core.checkpoint.source import Blob, PieceSource
from parallel_core.errors import CheckpointError
from parallel_core.records import Record

_RANK_DIR = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


class MegatronTorchCheckpoint(PieceSource):
    """A Megatron checkpoint in the `torch` format as global tensors."""

    def __init__(self, path: str | Path, allow_inert: Iterable[str] = ()) -> None:
        """Read the pickles of every rank; tensors stay on the disk.

        Args:
            path: an `iter_XXXXXXX` or `release` directory with `mp_rank_XX[_YYY]` in it.
            allow_inert: further class names to read as inert data.

        Raises:
            CheckpointError: a rank's file is missing, damaged or refused, or holds something this project has no
                counterpart of.
        """
        path = Path(path)
        self.notes: list[str] = []
        states, args = _read_ranks(path, tuple(allow_inert))
        first = states[0, 0, 0]
        refuse_unsupported(args, str(path))
        chunks = [chunk for key in sorted(states) for chunk in _chunks(path, key, states[key], self.notes)]
        _number_layers(path, chunks, args)
        gated = bool(args.get("swiglu"))
        tied = not args.get("untie_embeddings_and_output_weights")
        tp_size = 1 + max(tp for tp, _, _ in states)
        grid = ExpertGrid.of(args, str(path))
        collector = Collector(str(path), tp_size, gated, is_te_spec(args))
        facts = Record(first, str(_model_file(rank_dir(path, 0, 0, 0))), CheckpointError)
        version = float(facts.number("checkpoint_version", 0, minimum=0))
        for chunk in chunks:
            weights = [(chunk.global_name(name), tensor.blob) for name, tensor in chunk.tensors.items()]
            _place(collector, grid, chunk, chunk.ep == _first_ep(states, chunk), weights, version, args, tied)
        for (tp, pp, ep), state in states.items():
            mine = [chunk for chunk in chunks if (chunk.tp, chunk.pp, chunk.ep) == (tp, pp, ep)]
            optimizer = read_optimizer(rank_dir(path, tp, pp, ep), state, mine, args, tuple(allow_inert))
            keyed = [(f"{name}@{kind}", blob) for kind, name, blob in optimizer.tensors]
            _place(collector, grid, mine[0], ep == _first_ep(states, mine[0]), keyed, version, args, tied)
            first.setdefault("_adam_step", optimizer.step)
        iteration = facts.integer("iteration", facts.integer("total_iters", 0))
        if path.name == "release":
            iteration = 0
        common = common_of(first, args, iteration)
        if first["_adam_step"] is not None:
            common["adam_step"] = step_of(first["_adam_step"], facts.where)
        scaler = loss_scaler_of(first.get("optimizer"))
        if scaler is not None:
            common["loss_scaler"] = scaler
        self.rank0_state: dict[str, Any] = first
        super().__init__(path, "megatron torch", collector.tensors(), common)


def rank_dir(path: Path, tp: int, pp: int, ep: int = 0) -> Path:
    """Return a rank's directory; its name has no part for pipeline or experts where there is one."""
    names = [f"mp_rank_{tp:02d}_{pp:03d}_{ep:03d}"]
    if ep == 0:
        names.append(f"mp_rank_{tp:02d}_{pp:03d}")
    if pp == 0:
        names.append(f"mp_rank_{tp:02d}_{ep:03d}")
        names += [f"mp_rank_{tp:02d}"] if ep == 0 else []
    return next((path / name for name in names if (path / name).is_dir()), path / names[min(1, len(names) - 1)])


def _first_ep(states: Mapping[tuple[int, int, int], Any], chunk: Chunk) -> int:
    """Return which of the ranks that hold the same layers tells of what is no expert's."""
    return min(ep for tp, pp, ep in states if (tp, pp) == (chunk.tp, chunk.pp))


def _model_file(directory: Path) -> Path:
    for name in ("model_optim_rng.pt", "model_rng.pt"):
        if (directory / name).exists():
            return directory / name
    return directory / "model_optim_rng.pt"


def _read_ranks(
    path: Path, allow_inert: tuple[str, ...]
) -> tuple[dict[tuple[int, int, int], dict[str, Any]], dict[str, Any]]:
    """Return every rank's top-level dict by (tp, pp, ep), and the arguments."""
    found = sorted(p for p in path.iterdir() if _RANK_DIR.fullmatch(p.name) and p.is_dir())
    if not found:
        raise CheckpointError(f"{path} holds no mp_rank_XX directory")
    zero = [p for p in found if set(p.name.removeprefix("mp_rank_")) <= {"0", "_"}]
    if not zero:
        raise CheckpointError(f"{path} lacks rank 0's directory; it holds {', '.join(p.name for p in found[:10])}")
    rank0 = _load_state(_model_file(zero[0]), allow_inert)
    if "args" not in rank0:
        raise CheckpointError(f"{_model_file(zero[0])} holds no `args`: not a training checkpoint of Megatron-LM")
    args = checked_args(plain(rank0["args"]), str(_model_file(zero[0])))
    grid = ExpertGrid.of(args, str(path))
    tp_size = int(args.get("tensor_model_parallel_size") or args.get("model_parallel_size") or 1)
    pp_size = int(args.get("pipeline_model_parallel_size") or 1)
    states = {}
    places = itertools.product(range(tp_size), range(pp_size), range(grid.ep))
    for tp, pp, ep in places:
        if grid.ep > 1 and grid.etp_rank(tp, ep) is None:
            continue  # no rank is both
        directory = rank_dir(path, tp, pp, ep)
        if not directory.is_dir():
            experts = f" ep{grid.ep}" if grid.ep > 1 else ""
            raise CheckpointError(
                f"{directory} is missing; the checkpoint was written with tp{tp_size} pp{pp_size}{experts}"
            )
        states[tp, pp, ep] = rank0 if directory == zero[0] else _load_state(_model_file(directory), allow_inert)
    return states, args


def _load_state(file: Path, allow_inert: tuple[str, ...]) -> dict[str, Any]:
    state = load_torch_zip(file, allow_inert=allow_inert)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not Megatron's dict")
    return state


def _chunks(path: Path, key: tuple[int, int, int], state: Mapping[str, Any], notes: list[str]) -> list[Chunk]:
    models = [name for name in state if isinstance(name, str) and re.fullmatch(r"model\d{0,4}", name)]
    names = sorted(models, key=lambda name: int(name[5:] or 0))
    if not names or not all(isinstance(state[name], Mapping) for name in names):
        raise CheckpointError(f"{rank_dir(path, *key)}: the file holds no model")
    chunks = []
    for index, model in enumerate(names):
        tensors: dict[str, TorchTensor] = {}
        for stored, value in flatten_names(state[model]).items():
            if is_ignored(stored) or not isinstance(value, TorchTensor):
                continue
            name = canonical_name(stored)
            if name is None:
                raise CheckpointError(f"{rank_dir(path, *key)}: parameter {stored} has no counterpart here")
            tensors[name] = value
        layers = sorted({n for n in map(layer_of, tensors) if n is not None})
        if layers != list(range(len(layers))):
            raise CheckpointError(f"{rank_dir(path, *key)}: {model} has layers {layers}, not 0 to {len(layers) - 1}")
        chunks.append(Chunk(key[0], key[1], index, tensors, len(layers), ep=key[2]))
    return chunks


def _number_layers(path: Path, chunks: list[Chunk], args: Mapping[str, Any]) -> None:
    """Give every chunk its first layer's global number: stages follow one another in pipeline order.

    The counts are those of the files themselves, which holds for every way to make stages uneven.
    """
    total = 0
    for index, pp in sorted({(chunk.index, chunk.pp) for chunk in chunks}):
        same = [chunk for chunk in chunks if (chunk.index, chunk.pp) == (index, pp)]
        if len({chunk.num_layers for chunk in same}) > 1:
            raise CheckpointError(f"{path}: tensor parallel ranks of stage {pp} disagree about the number of layers")
        for chunk in same:
            chunk.first_layer = total
        total += same[0].num_layers
    if total != args.get("num_layers", total):
        raise CheckpointError(
            f"{path}: the files hold {total} layers, its arguments say num_layers={args['num_layers']}"
        )


def _place(
    collector: Collector,
    grid: ExpertGrid,
    chunk: Chunk,
    tells: bool,
    tensors: Iterable[tuple[str, Blob]],
    version: float,
    args: Mapping[str, Any],
    tied: bool,
) -> None:
    """Say where a rank's tensors belong: `NAME` or `NAME@kind`, with global layer numbers.

    Args:
        collector: takes them.
        grid: how experts are shared out.
        chunk: the rank and chunk they are of.
        tells: whether this is the rank that tells of what is no expert's.
        tensors: keys and arrays.
        version: of the checkpoint.
        args: Megatron's arguments.
        tied: the output layer is the word embedding.

    Of word embeddings that another stage has too, the first one's count.
    """
    for key, blob in tensors:
        name = key.partition("@")[0]
        if is_expert(name):
            collector.add_expert(grid, key, chunk, blob)
        elif tells and not (name == OUTPUT_LAYER and tied) and not (name == WORD_EMBEDDINGS and chunk.pp):
            collector.add(key, chunk.tp, blob, _old_rows(name, blob.shape, version, args))


def _old_rows(name: str, shape: tuple[int, ...], version: float, args: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    if version >= 2 or not LAYER_PATTERN.fullmatch(name) or f".{QKV}." not in name:
        return []
    sizes = Record(args, "`args` of a checkpoint before version 2", CheckpointError)
    heads, hidden = sizes.integer("num_attention_heads", minimum=1), sizes.integer("hidden_size", minimum=1)
    if not shape or hidden % heads or shape[0] % (3 * hidden // heads):
        raise CheckpointError(f"{name} of shape {list(shape)} holds no whole heads of {hidden} / {heads} rows")
    return old_qkv_rows(shape[0], heads, hidden, version)
