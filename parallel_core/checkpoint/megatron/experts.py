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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parallel_core.checkpoint.source import Blob, Piece, TensorInfo
from parallel_core.errors import CheckpointError
from parallel_core.layout.shard import TensorShard
from parallel_core.records import Record

_OF_ONE = re.compile(r"(.*mlp\.experts)\.(?:local_experts\.(\d{1,6})\.(linear_fc[12]\.(?:weight|bias)))")
_OF_TE = re.compile(r"(.*mlp\.experts)\.(linear_fc[12]\.(?:weight|bias))(\d{1,6})")
_OF_ALL = re.compile(r"(.*mlp\.experts)\.weight([12])")
_CANONICAL = re.compile(r"(.*mlp\.experts)\.experts\.(linear_fc[12]\.(?:weight|bias))")

BUFFERS = ("mlp.router.expert_bias",)
"""Names that are part of a model's state and no parameters: no optimizer knows them."""


def is_expert(name: str) -> bool:
    """Tell whether a stored name, of any specification, is of experts that ranks share out."""
    return any(pattern.fullmatch(name) for pattern in (_OF_ONE, _OF_TE, _OF_ALL, _CANONICAL))


def is_buffer(name: str) -> bool:
    """Tell whether a stored name is of something that is not trained."""
    return name.endswith(BUFFERS)


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
    """

    experts: int
    tp: int
    ep: int
    etp: int
    gated: bool
    hidden: int

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
        return cls(experts, tp, ep, etp, bool(args.get("swiglu")), size("hidden_size", 0))

    def etp_rank(self, tp: int, ep: int) -> int | None:
        """Return the rank among those of an expert of the file of (tp, ep); None where no rank is both."""
        for rank in range(self.tp * self.etp * self.ep):
            if rank % self.tp == tp and rank // self.etp % self.ep == ep:
                return rank % self.etp
        return None

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
        dim = 0 if ".linear_fc1." in name else 1
        if name.endswith(".bias") and dim == 1 or self.etp == 1:
            shard = TensorShard.full(name, matrix.shape, matrix.dtype)
        else:
            shape = [n * self.etp if i == dim else n for i, n in enumerate(matrix.shape)]
            parts = 2 if self.gated and dim == 0 else 1
            shard = TensorShard.split(name, shape, matrix.dtype, dim, etp, self.etp, parts)
        pieces = []
        for box in shard.boxes:
            part = matrix.crop(box.local)
            one = Blob(part.path, part.offset, part.dtype, (1, *part.shape), (0, *part.strides))
            pieces.append(Piece((number, *(first for first, _ in box.globe)), one.shape, one))
        return TensorInfo((self.experts, *shard.global_shape), matrix.dtype), pieces
