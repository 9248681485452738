"""Experts in Megatron's checkpoints: their names in three specifications, and the ranks that hold which of them.

A rank's experts are separate linears (SequentialMLP), linears with a weight for each expert (TEGroupedMLP), or two
matrices that are viewed as all experts' transposed weights (GroupedMLP). Here the experts of a layer are one tensor
[experts, rows, columns], as in `torch_dist`:

    decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight   SequentialMLP, number on the rank
    decoder.layers.3.mlp.experts.linear_fc1.weight1                  TEGroupedMLP, the same
    decoder.layers.3.mlp.experts.weight1                             GroupedMLP, all of the rank's first matrices
    decoder.layers.3.mlp.experts.experts.linear_fc1.weight           canonical
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel_core.checkpoint.source import Blob, Piece, TensorInfo
from parallel_core.errors import CheckpointError
from parallel_core.layout.shard import Cut, TensorShard
from parallel_core.records import Record

_OF_ONE = re.compile(r"(.*mlp\.experts)\.(?:local_experts\.(\d{1,6})\.(linear_fc[12]\.(?:weight|bias)))")
_OF_TE = re.compile(r"(.*mlp\.experts)\.(linear_fc[12]\.(?:weight|bias))(\d{1,6})")
_OF_ALL = re.compile(r"(.*mlp\.experts)\.weight([12])")
_CANONICAL = re.compile(r"(.*mlp\.experts)\.experts\.(linear_fc[12]\.(?:weight|bias))")

SEQUENTIAL, TE_GROUPED, GROUPED = "SequentialMLP", "TEGroupedMLP", "GroupedMLP"
"""Megatron's modules for the experts of a rank, by which it names their weights."""
BUFFERS = ("mlp.router.expert_bias",)
"""Names that are part of a model's state and no parameters: no optimizer knows them."""


def is_expert(name: str) -> bool:
    """Tell whether a stored name, of any specification, is of experts that ranks share out."""
    return any(pattern.fullmatch(name) for pattern in (_OF_ONE, _OF_TE, _OF_ALL, _CANONICAL))


def is_whole(name: str) -> bool:
    """Tell whether a name is no rank's: of all experts of a layer, or of no experts."""
    return not is_expert(name) or _CANONICAL.fullmatch(name) is not None


def is_buffer(name: str) -> bool:
    """Tell whether a stored name is of something that is not trained."""
    return name.endswith(BUFFERS)


def specification(args: Mapping[str, Any]) -> str:
    """Return the module that a Megatron run of these arguments has for a rank's experts."""
    if not args.get("moe_grouped_gemm"):
        return SEQUENTIAL
    te = args.get("transformer_impl") == "transformer_engine"
    return TE_GROUPED if te and not args.get("moe_use_legacy_grouped_gemm") else GROUPED


@dataclass(frozen=True)
class StoredExperts:
    """One tensor of a rank's file that holds experts.

    Attributes:
        name: what it is called there.
        canonical: the tensor of all experts it is a part of.
        first: its first expert, counted on the rank.
        count: how many experts it holds.
        shape: its shape on a rank.
    """

    name: str
    canonical: str
    first: int
    count: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ExpertGrid:
    """How a Megatron run shares experts out.

    Attributes:
        experts: experts of a layer.
        tp: tensor parallel ranks.
        ep: ranks that share a layer's experts.
        etp: ranks that share each expert.
        gated: whether the first matrix holds [gate ; up].
        hidden: width of the residual stream.
        module: which of its modules holds a rank's experts.
    """

    experts: int
    tp: int
    ep: int
    etp: int
    gated: bool
    hidden: int
    module: str = SEQUENTIAL

    @classmethod
    def of(cls, args: Mapping[str, Any], where: str) -> ExpertGrid:
        """Return the grid of a run's arguments.

        Raises:
            CheckpointError: the experts are not a whole number on each rank.
        """
        facts = Record(args, where, CheckpointError)

        def size(name: str, otherwise: int) -> int:
            return otherwise if args.get(name) is None else facts.integer(name, minimum=0, maximum=1 << 20)

        tp, ep = size("tensor_model_parallel_size", 1), size("expert_model_parallel_size", 1)
        experts = size("num_experts", 0)
        etp = size("expert_tensor_parallel_size", 0) or tp
        if not (tp and ep) or experts % ep:
            raise CheckpointError(f"{where}: {experts} experts cannot be shared out to {ep} ranks")
        gated, hidden = bool(args.get("swiglu")), size("hidden_size", 0)
        return cls(experts, tp, ep, etp, gated, hidden, specification(args))

    def rank(self, tp: int, ep: int) -> int | None:
        """Return the first rank of a stage that is `tp` and `ep`, whose file it is; None where no rank is both."""
        ranks = range(self.tp * self.etp * self.ep)
        return next((rank for rank in ranks if rank % self.tp == tp and rank // self.etp % self.ep == ep), None)

    def etp_rank(self, tp: int, ep: int) -> int | None:
        """Return the rank among those of an expert of the file of (tp, ep); None where no rank is both."""
        rank = self.rank(tp, ep)
        return None if rank is None else rank % self.etp

    def files(self) -> list[tuple[int, int]]:
        """Return the (tp, ep) of each file of a stage in the `torch` format.

        Raises:
            CheckpointError: several ranks with different parts of experts would write the same file.
        """
        places = [(rank % self.tp, rank // self.etp % self.ep, rank % self.etp)
                  for rank in range(self.tp * self.etp * self.ep)]  # fmt: skip
        files = sorted({(tp, ep) for tp, ep, _ in places})
        if len(set(places)) > len(files):
            raise CheckpointError(
                f"expert_tensor_parallel_size={self.etp} with tensor_model_parallel_size={self.tp} and "
                f"expert_model_parallel_size={self.ep}: ranks with different parts of an expert have the same file in "
                "Megatron's torch format; choose an expert_tensor_parallel_size that divides "
                "tensor_model_parallel_size, or use torch_dist"
            )
        return files

    def stored(self, infos: Mapping[str, TensorInfo], canonical: Sequence[str]) -> list[StoredExperts]:
        """Return the tensors in which a rank holds its experts of one layer, in the order of registration.

        Args:
            infos: shapes of the tensors of all experts.
            canonical: those of the layer: weights, and biases where there are any, of both linears.

        Raises:
            CheckpointError: the module has no biases, or ranks cannot share the experts.
        """
        own, found = self.experts // self.ep, []
        for name in canonical:
            match, (count, *shape) = _CANONICAL.fullmatch(name), infos[name].shape
            if match is None or count != self.experts or not own:
                raise CheckpointError(f"{name} of shape {list(infos[name].shape)} is not of {self.experts} experts")
            dim = self._cut_dim(name)
            if dim is not None and (shape[dim] % (self.etp * self._parts(name))):
                raise CheckpointError(f"{name}: {self.etp} ranks cannot share {shape[dim]} rows or columns")
            if dim is not None:
                shape[dim] //= self.etp
            which, kind = match[2].split(".")
            if self.module == GROUPED and kind == "bias":
                raise CheckpointError(f"{name}: Megatron's {GROUPED} has no biases; leave moe_grouped_gemm out")
            if self.module == GROUPED:
                rows, columns = shape
                whole = (columns, own * rows) if which == "linear_fc1" else (own * columns, rows)
                found.append((0, StoredExperts(f"{match[1]}.weight{which[-1]}", name, 0, own, whole)))
                continue
            for number in range(own):
                # One module after another holds both linears of an expert, or one linear of all.
                by_expert = f"{match[1]}.local_experts.{number}.{match[2]}"
                name_there = by_expert if self.module == SEQUENTIAL else f"{match[1]}.{match[2]}{number}"
                order = number if self.module == SEQUENTIAL else int(which[-1]) * own + number
                found.append((order, StoredExperts(name_there, name, number, 1, tuple(shape))))
        return [tensor for _, tensor in sorted(found, key=lambda pair: pair[0])]

    def shard(self, tensor: StoredExperts, info: TensorInfo, ep: int, etp: int, dtype: str) -> TensorShard:
        """Return a rank's part of the tensor of all experts, [experts, rows, columns] or [experts, rows]."""
        number = ep * (self.experts // self.ep) + tensor.first
        cuts = [Cut("ep", 0, number // tensor.count, self.experts // tensor.count)]
        dim = self._cut_dim(tensor.canonical)
        if dim is not None:
            cuts.append(Cut("etp", dim + 1, etp, self.etp, self._parts(tensor.canonical)))
        return TensorShard.cut(tensor.canonical, info.shape, *cuts, dtype=dtype)

    def arranged(self, tensor: StoredExperts, array: np.ndarray) -> np.ndarray:
        """Return the array of a `shard` as it is stored."""
        return (array.transpose(0, 2, 1) if self.module == GROUPED else array).reshape(tensor.shape)

    def flat_pieces(
        self, tensor: StoredExperts, info: TensorInfo, ep: int, etp: int, flat: Any, first: int
    ) -> list[Piece]:
        """Return where elements of a stored tensor, one after another, belong in the tensor of all experts.

        Args:
            tensor: the stored tensor.
            info: of the tensor of all experts.
            ep: rank among those that share the layer's experts.
            etp: rank among those that share an expert.
            flat: the elements, unread, [N].
            first: which element of the stored tensor the first of them is.
        """
        shard, stop = self.shard(tensor, info, ep, etp, flat.dtype), first + flat.shape[0]
        if self.module != GROUPED:
            boxes = shard.flat_range(first, stop).boxes
            return [Piece(_starts(box.globe), box.shape, flat.crop(box.local).reshape(box.shape)) for box in boxes]
        swapped = [Cut(cut.axis, (0, 2, 1)[cut.dim], cut.rank, cut.size, cut.parts) for cut in shard.cuts]
        E, R, C = info.shape
        memory, pieces = TensorShard.cut(tensor.canonical, (E, C, R), *swapped, dtype=flat.dtype), []
        for box in memory.flat_range(first, stop).boxes:
            (number, column, row), (count, columns, rows) = _starts(box.globe), box.shape
            blob = flat.crop(box.local).reshape(box.shape).transposed()
            pieces.append(Piece((number, row, column), (count, rows, columns), blob))
        return pieces

    def _cut_dim(self, name: str) -> int | None:
        """Return the dim of one expert's matrix or bias that ranks share; None where each has all."""
        if name.endswith(".bias"):
            return 0 if ".linear_fc1." in name else None
        return 0 if ".linear_fc1." in name else 1

    def _parts(self, name: str) -> int:
        return 2 if self.gated and ".linear_fc1." in name else 1

    def parts(self, name: str, blob: Blob, ep: int) -> Iterator[tuple[str, int, Blob]]:
        """Yield (canonical name, number, matrix or bias) of each expert in a stored tensor.

        Args:
            name: as stored, with the global layer number.
            blob: its array on the rank.
            ep: the rank.

        Raises:
            CheckpointError: the array's shape is not that of whole experts.
        """
        own = self.experts // self.ep
        one, te, every = _OF_ONE.fullmatch(name), _OF_TE.fullmatch(name), _OF_ALL.fullmatch(name)
        if one:
            yield f"{one[1]}.experts.{one[3]}", ep * own + int(one[2]), blob
        elif te:
            yield f"{te[1]}.experts.{te[2]}", ep * own + int(te[3]), blob
        elif every:
            rows, columns = blob.shape if len(blob.shape) == 2 else (0, 0)
            wide = columns if every[2] == "1" else rows
            if not own or wide % own or self.hidden not in (rows, columns):
                raise CheckpointError(f"{name} of shape {list(blob.shape)}: no {own} experts of width {self.hidden}")
            shape = (own, rows, columns // own) if every[2] == "1" else (own, rows // own, columns)
            for number in range(own):
                matrix = blob.reshape(shape).pick(number).transposed()
                yield f"{every[1]}.experts.linear_fc{every[2]}.weight", ep * own + number, matrix

    def place(self, name: str, matrix: Blob, number: int, etp: int) -> tuple[TensorInfo, list[Piece]]:
        """Return the whole tensor that one expert's part on one rank belongs to, and where."""
        if number >= self.experts:
            raise CheckpointError(f"{name}: expert {number} of {self.experts}")
        dim = self._cut_dim(name)
        if dim is None or self.etp == 1:
            shard = TensorShard.full(name, matrix.shape, matrix.dtype)
        else:
            shape = [n * self.etp if i == dim else n for i, n in enumerate(matrix.shape)]
            shard = TensorShard.split(name, shape, matrix.dtype, dim, etp, self.etp, self._parts(name))
        pieces = []
        for box in shard.boxes:
            part = matrix.crop(box.local)
            one = Blob(part.path, part.offset, part.dtype, (1, *part.shape), (0, *part.strides))
            pieces.append(Piece((number, *(first for first, _ in box.globe)), one.shape, one))
        return TensorInfo((self.experts, *shard.global_shape), matrix.dtype), pieces


def _starts(ranges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(first for first, _ in ranges)
