"""Every layout that a configuration can have on so many ranks, by the rules that a run is checked by. Pure Python."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from parallel_core.config import table
from parallel_core.config.dump import to_flags
from parallel_core.config.load import LoadedConfig
from parallel_core.config.resolution import Resolution
from parallel_core.config.rules import build_config, run_rules
from parallel_core.config.schema import AllConfig
from parallel_core.config.values import Given
from parallel_core.layout.stages import Placement

SEARCHED = (
    "tensor_model_parallel_size", "sequence_parallel", "context_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "num_layer_list", "pipeline_schedule", "micro_batch_size", "recompute_granularity", "recompute_method",
    "recompute_num_layers", "use_distributed_optimizer",
)  # fmt: skip
"""What the search decides, by the arguments' names."""

REPLACED = (
    "micro_batch_num", "num_layers_per_virtual_pipeline_stage", "microbatch_group_size_per_vp_stage",
    "pipeline_model_parallel_layout", "enable_zero_bubble", "recompute_activations", "recompute", "select_recompute",
    "select_comm_recompute", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "standalone_embedding_stage",
)  # fmt: skip
"""What belongs to one layout and says again, or elsewhere, what the search decides."""

_MODEL_AXES = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")

RECOMPUTATION: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}

Values = dict[str, Any]
"""Argument -> value; what is not there is not given."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A legal layout.

    Attributes:
        values: what the search decided, of `SEARCHED`.
        config: the run with it.
    """

    values: Values
    config: AllConfig


class Layouts:
    """The legal layouts of one configuration on `world_size` ranks.

    Layer counts that the chunks of a pipeline do not divide are dealt out nearly evenly, the shorter chunks at the end,
    where the output layer is, and then at the beginning; there with 1, 2 or 4 chunks on a rank.

    Args:
        loaded: the user's configuration; its samples of an iteration stay the same in every layout.
        world_size: ranks.
        fused_attention: attention keeps no scores, so there is nothing to recompute selectively.
        said: arguments of a layout that the user's words have and `loaded` has not.
    """

    def __init__(
        self, loaded: LoadedConfig, world_size: int, fused_attention: bool, said: frozenset[str] = frozenset()
    ) -> None:
        drop = {*SEARCHED, *REPLACED}
        given = {name: entry for name, entry in loaded.given.items() if name in table.BY_NAME}
        model = loaded.config.model_config
        self.world_size, self.global_batch_size = world_size, loaded.config.dataset_config.global_batch_size
        self.said = said
        self.replaced = [name for name in REPLACED if name in given or name in said]
        self._kept = {name: entry for name, entry in given.items() if name not in drop}
        self._kept["global_batch_size"] = _given("global_batch_size", self.global_batch_size)
        self._fused = fused_attention or model.use_flash_attention
        distributed = loaded.config.training_config.use_distributed_optimizer
        self._kept["use_distributed_optimizer"] = _given("use_distributed_optimizer", distributed)  # until it is chosen
        self._layers, self._experts = model.num_layers, model.moe.num_experts
        self._bases: dict[int, AllConfig] = {}
        self._sections: dict[tuple[Any, ...], Any] = {}
        self._choices: list[tuple[str, bool]] = []
        self._spread: dict[tuple[int, ...], list[Values]] = {}
        self.refused: Counter[str] = Counter()
        """A rule's words -> how many layouts it refused."""

    def resolve(self, values: Values) -> Resolution:
        """Return the state after all rules of a run."""
        given = {**self._kept, **{name: _given(name, value) for name, value in values.items()}}
        return run_rules(given, self.world_size)

    def shapes(self) -> Iterator[Values]:
        """Yield the legal sizes of the model's axes: one chunk on a rank, the smallest microbatch, experts on each."""
        for tp in _divisors(self.world_size):
            for cp in _divisors(self.world_size // tp):
                for pp in _divisors(self.world_size // tp // cp):
                    for sequence in (True, False) if tp > 1 else (False,):
                        shape = {
                            "tensor_model_parallel_size": tp, "context_parallel_size": cp,
                            "pipeline_model_parallel_size": pp, "sequence_parallel": sequence,
                            **self._split(pp, 1), **self._experts_on(1, 1),
                        }  # fmt: skip
                        if self._is_legal({**shape, "micro_batch_size": 1}):
                            yield shape

    def _experts_on(self, ep: int, etp: int) -> Values:
        sizes = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
        return sizes if self._experts else {}

    def most_spread(self, sized: Values) -> Values:
        """Return the sizes with experts on as many ranks as can be, legal or not: none needs less memory."""
        return {**sized, **self._experts_on(self._experts, sized["tensor_model_parallel_size"])}

    def with_experts(self, sized: Values) -> list[Values]:
        """Return the sizes with all that are legal of experts' axes; without experts there is nothing to add.

        Their rules ask neither for context parallelism nor for the microbatch.
        """
        if not self._experts:
            return [sized]
        key = tuple(sized[name] for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"))
        if key not in self._spread:
            stage = self.world_size // sized["pipeline_model_parallel_size"]
            pairs = itertools.product(_divisors(self._experts), _divisors(sized["tensor_model_parallel_size"]))
            self._spread[key] = [
                self._experts_on(ep, etp)
                for ep, etp in pairs
                if stage % (ep * etp) == 0 and self._is_legal({**sized, **self._experts_on(ep, etp)})
            ]
        return [{**sized, **spread} for spread in self._spread[key]]

    def pipelines(self, sized: Values) -> Iterator[Values]:
        """Yield legal sizes with every legal number of chunks and schedule."""
        pp, layers = sized["pipeline_model_parallel_size"], self._layers
        for chunks in range(1, max(1, layers // pp) + 1) if pp > 1 else (1,):
            if layers % (pp * chunks) and chunks not in (1, 2, 4):
                continue
            for name in ("1f1b" if chunks == 1 else "interleaved", *(("zero-bubble",) if pp > 1 else ())):
                values = {**sized, "num_layer_list": None, **self._split(pp, chunks), "pipeline_schedule": name}
                values = {name: value for name, value in values.items() if value is not None}
                if self._is_legal(values):
                    yield values

    def microbatches(self, shape: Values) -> Iterator[Values]:
        """Yield a shape with every legal size of a microbatch, from small to large."""
        for micro in _divisors(self._samples(shape)):
            sized = {**shape, "micro_batch_size": micro}
            if self._is_legal(sized):
                yield sized

    def _is_legal(self, values: Values) -> bool:
        problems = self.resolve(values).problems
        self.refused.update(problems)
        return not problems

    def _samples(self, values: Values) -> int:
        """Return the samples of an iteration on one data parallel rank."""
        return max(1, self.global_batch_size * math.prod(values[name] for name in _MODEL_AXES) // self.world_size)

    def choices(self, sized: Values) -> list[tuple[str, bool]]:
        """Return the legal (recomputation, distributed optimizer), whatever the sizes; the last saves most memory."""
        if not self._choices:
            for word, arguments in RECOMPUTATION.items():
                for distributed in (False, True):
                    values = {**sized, **arguments, "use_distributed_optimizer": distributed}
                    if not (word == "selective" and self._fused) and not self.resolve(values).problems:
                        self._choices.append((word, distributed))
        return self._choices

    def candidate(self, sized: Values, recompute: str, distributed: bool) -> Candidate:
        """Return a legal layout's configuration."""
        tp = sized["tensor_model_parallel_size"]
        if tp not in self._bases:  # the vocabulary is padded by it; all else that the search decides is put in below
            self._bases[tp] = build_config(self.resolve(sized))
        base = self._bases[tp]
        arguments = RECOMPUTATION[recompute]
        values = {**sized, **arguments, "use_distributed_optimizer": distributed}
        parallel = dataclasses.replace(
            base.parallel_config,
            context_parallel_size=sized["context_parallel_size"],
            pipeline_model_parallel_size=sized["pipeline_model_parallel_size"],
            virtual_pipeline_model_parallel_size=sized.get("virtual_pipeline_model_parallel_size", 1),
            num_layer_list=sized.get("num_layer_list", ()),
            pipeline_schedule=sized["pipeline_schedule"],
            sequence_parallel=sized["sequence_parallel"],
            expert_model_parallel_size=sized.get("expert_model_parallel_size", 1),
            expert_tensor_parallel_size=sized.get("expert_tensor_parallel_size", 0),
        )
        micro = sized["micro_batch_size"]
        data = dataclasses.replace(
            base.dataset_config,
            batch_size=micro,
            micro_batch_num=self._samples(sized) // micro,
        )
        words = {"recompute_granularity": "none", "recompute_method": "none", "recompute_num_layers": 0, **arguments}
        config = dataclasses.replace(
            base,
            parallel_config=parallel,
            dataset_config=data,
            model_config=self._once(base.model_config, **words),
            training_config=self._once(base.training_config, use_distributed_optimizer=distributed),
        )
        return Candidate(values, config)

    def _once(self, section: Any, **values: Any) -> Any:
        """Return a section with other values; most have one of few."""
        key = (id(section), *values.items())
        if key not in self._sections:
            self._sections[key] = dataclasses.replace(section, **values)
        return self._sections[key]

    def _split(self, pp: int, chunks: int) -> Values:
        """Return the arguments of so many chunks; a list where the layers do not divide."""
        sizes: Values = {"virtual_pipeline_model_parallel_size": chunks} if chunks > 1 else {}
        stages = pp * chunks
        share, more = divmod(self._layers, stages)
        if not more or not share:
            return sizes
        by_stage = [share + 1] * stages
        for number in range(stages - more):  # the last, the first, the last but one, ...
            by_stage[number // 2 if number % 2 else -1 - number // 2] = share
        table_of = Placement.in_turn(pp, chunks).table
        return {**sizes, "num_layer_list": tuple(tuple(by_stage[stage] for stage in row) for row in table_of)}


def command_line(loaded: LoadedConfig, words: Sequence[str], layouts: Layouts, values: Values) -> str:
    """Return the shell command that trains in a layout.

    Args:
        loaded: the user's configuration.
        words: the file and flags it was read from.
        layouts: the search.
        values: the layout's.
    """
    program = "pretrain_pangu.sh" if loaded.config.model_config.top_query_layer != "none" else "pretrain_gpt.sh"
    flags = layout_flags(loaded, layouts, values)
    return f"NPROC={layouts.world_size} bash {program} {shlex.join([*words, *flags])}"


def layout_flags(loaded: LoadedConfig, layouts: Layouts, values: Values) -> list[str]:
    """Return the flags that make a layout of the user's configuration, those that say nothing new left out."""
    decided = {"global_batch_size": layouts.global_batch_size, **values}
    flags: list[str] = []
    for name in ("global_batch_size", *SEARCHED, *layouts.replaced):
        argument, value = table.BY_NAME[name], decided.get(name)
        before = loaded.given[name].value if name in loaded.given else None
        quiet = before is None and value in _QUIET.get(name, (argument.value_when_absent,))
        if name not in layouts.said and (value == before or quiet):
            continue
        flags += [argument.flag, "null"] if value is None else to_flags({name: value})[0]
    return flags


def without_layout() -> list[str]:
    """Return the flags that take back whatever a configuration says of its layout."""
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "micro_batch_size": 1}
    flags = to_flags({**sizes, "sequence_parallel": False})
    rest = [name for name in (*SEARCHED, *REPLACED) if name not in sizes and not table.BY_NAME[name].is_switch]
    return [word for words in (*flags, *([table.BY_NAME[name].flag, "null"] for name in rest)) for word in words]


_QUIET: dict[str, tuple[object, ...]] = {
    "pipeline_schedule": ("1f1b", "interleaved"),
    **dict.fromkeys(
        ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size",
         "expert_model_parallel_size", "virtual_pipeline_model_parallel_size"),
        (1, None),
    ),
}  # fmt: skip
"""Values that arguments have where nothing is said."""


def _given(name: str, value: object) -> Given:
    return Given(name, value, "the search", table.BY_NAME[name].flag, value)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]
