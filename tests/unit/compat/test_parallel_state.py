"""The Megatron-named façade: stage and rank questions against Megatron's arithmetic, and its error messages."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import parallel_core
from parallel_core import parallel_state as ps
from parallel_core.comm.interface import SoloGroup
from parallel_core.config.schema import ModelParallelConfig
from parallel_core.context import GROUP_AXES, ParallelContext
from parallel_core.errors import ConfigError
from parallel_core.layout.expert_mesh import expert_spans
from parallel_core.layout.mesh import Mesh

PACKAGE = Path(parallel_core.__file__).parent


class Named(SoloGroup):
    """A group that knows its ranks and cannot communicate."""

    def __init__(self, ranks, rank):
        super().__init__("named", rank)
        self.ranks, self.size, self.rank = tuple(ranks), len(ranks), list(ranks).index(rank)


def context_of(rank: int, world: int, tp: int, pp: int, cp: int = 1) -> ParallelContext:
    mesh = Mesh.megatron(world, tensor_parallel=tp, pipeline_parallel=pp, context_parallel=cp)
    groups = {name: Named(mesh.group_of(rank, *axes), rank) for name, axes in GROUP_AXES.items()}
    stages = mesh.group_of(rank, "pp")
    ends = sorted({stages[0], stages[-1]})
    embedding = Named(ends if rank in ends else [rank], rank)
    return ParallelContext(mesh, rank, Named(range(world), rank), **groups, embedding=embedding)


@pytest.fixture(autouse=True)
def forget():
    ps.set_context(None)
    yield
    ps.set_context(None)


LAYOUTS = [(8, 2, 2), (8, 2, 4), (4, 1, 4), (2, 2, 1), (12, 2, 3), (1, 1, 1)]


@pytest.mark.parametrize(("world", "tp", "pp", "cp"), [(8, 2, 2, 2), (16, 2, 2, 2), (8, 1, 1, 4)])
def test_context_parallel_ranks_stand_between_tensor_and_data_parallel_ones(world, tp, pp, cp):
    """rank = t + TP (c + CP (d + DP p))."""
    dp = world // tp // pp // cp
    for rank in range(world):
        ps.set_context(context_of(rank, world, tp, pp, cp))
        t, c, d = rank % tp, rank // tp % cp, rank // (tp * cp) % dp
        assert (ps.get_context_parallel_rank(), ps.get_context_parallel_world_size()) == (c, cp)
        assert ps.get_context_parallel_global_ranks() == [rank + tp * (other - c) for other in range(cp)]
        assert (ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()) == (d, dp)
        assert ps.get_data_parallel_rank(with_context_parallel=True) == c + cp * d
        assert ps.get_data_parallel_world_size(with_context_parallel=True) == cp * dp
        assert ps.get_tensor_model_parallel_rank() == t


@pytest.mark.parametrize(("world", "tp", "pp"), LAYOUTS)
def test_every_rank_is_where_megatron_puts_it(world, tp, pp):
    dp = world // tp // pp
    for rank in range(world):
        ps.set_context(context_of(rank, world, tp, pp))
        t, d, p = rank % tp, rank // tp % dp, rank // (tp * dp)
        assert (ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()) == (t, tp)
        assert (ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()) == (d, dp)
        assert ps.get_data_parallel_rank(with_context_parallel=True) == d
        assert (ps.get_pipeline_model_parallel_rank(), ps.get_pipeline_model_parallel_world_size()) == (p, pp)
        assert (ps.get_context_parallel_rank(), ps.get_context_parallel_world_size()) == (0, 1)
        assert (ps.get_expert_model_parallel_rank(), ps.get_expert_model_parallel_world_size()) == (0, 1)
        assert ps.get_tensor_model_parallel_src_rank() == rank - t
        assert ps.get_data_parallel_src_rank() == rank - d * tp
        stage = [t + tp * d + tp * dp * i for i in range(pp)]
        assert ps.get_pipeline_model_parallel_first_rank() == stage[0]
        assert ps.get_pipeline_model_parallel_last_rank() == stage[-1]
        assert ps.get_pipeline_model_parallel_next_rank() == stage[(p + 1) % pp]
        assert ps.get_pipeline_model_parallel_prev_rank() == stage[(p - 1) % pp]
        assert list(ps.get_model_parallel_group().ranks) == [i for i in range(world) if i // tp % dp == d]
        assert ps.is_pipeline_first_stage() == (p == 0)
        assert ps.is_pipeline_last_stage() == (p == pp - 1)
        assert ps.is_rank_in_embedding_group() == (p in (0, pp - 1))
        if p in (0, pp - 1):
            assert list(ps.get_embedding_group().ranks) == sorted({stage[0], stage[-1]})
        else:
            with pytest.raises(ConfigError, match=rf"pipeline rank {p} is in no embedding group"):
                ps.get_embedding_group()


def test_virtual_stages():
    ps.set_context(context_of(0, 2, 1, 2), virtual_pipeline_model_parallel_size=3)
    assert ps.get_virtual_pipeline_model_parallel_world_size() == 3
    assert [ps.is_pipeline_first_stage(vp_stage=chunk) for chunk in range(3)] == [True, False, False]
    assert ps.is_pipeline_first_stage(ignore_virtual=True, vp_stage=2)
    assert not ps.is_pipeline_last_stage(ignore_virtual=True)
    ps.set_context(context_of(1, 2, 1, 2), virtual_pipeline_model_parallel_size=3)
    assert [ps.is_pipeline_last_stage(vp_stage=chunk) for chunk in range(3)] == [False, False, True]
    assert ps.is_pipeline_last_stage(ignore_virtual=True)
    assert not ps.is_pipeline_last_stage()
    assert [ps.is_rank_in_embedding_group(vp_stage=chunk) for chunk in range(3)] == [False, False, True]
    with ps.virtual_pipeline_stage(2):
        assert ps.get_virtual_pipeline_model_parallel_rank() == 2
        assert ps.is_pipeline_last_stage()
    assert ps.get_virtual_pipeline_model_parallel_rank() == 0
    ps.set_virtual_pipeline_model_parallel_rank(1)
    assert ps.get_virtual_pipeline_model_parallel_rank() == 1
    with pytest.raises(ConfigError, match="there is no chunk 3"):
        ps.set_virtual_pipeline_model_parallel_rank(3)
    with pytest.raises(ConfigError, match="vp_stage=3: this rank has 3 model chunks"):
        ps.is_pipeline_first_stage(vp_stage=3)


def test_without_a_virtual_pipeline_the_chunk_is_none():
    ps.set_context(context_of(0, 2, 1, 2))
    assert ps.get_virtual_pipeline_model_parallel_world_size() is None
    assert ps.get_virtual_pipeline_model_parallel_rank() is None
    with ps.virtual_pipeline_stage(0):
        assert ps.is_pipeline_first_stage()


QUESTIONS = [name for name in ps.__all__ if name.startswith(("get_", "is_pipeline", "is_rank"))]


@pytest.mark.parametrize("name", QUESTIONS)
def test_before_initialization_every_question_says_what_to_call(name):
    with pytest.raises(ConfigError, match=r"not initialized: call parallel_state\.initialize_model_parallel"):
        getattr(ps, name)()


def test_initialized_or_not():
    assert not ps.is_initialized()
    assert not ps.model_parallel_is_initialized()
    ps.destroy_model_parallel()
    context = ps.initialize_model_parallel()
    assert ps.is_initialized()
    assert ps.model_parallel_is_initialized()
    assert ps.get_context() is context
    assert ps.get_tensor_model_parallel_group().size == 1
    with pytest.raises(ConfigError, match=r"already initialized; call destroy_model_parallel\(\) first"):
        ps.initialize_model_parallel()
    ps.destroy_model_parallel()
    assert not ps.is_initialized()
    ps.initialize_model_parallel()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context_parallel_size": 0}, "context_parallel_size=0: use an integer of 1 or more"),
        ({"context_parallel_size": 4, "hierarchical_context_parallel_sizes": [2, 3]}, "two numbers whose product is"),
        ({"expert_model_parallel_size": 2}, "world size 1 is not a multiple of expert_tensor_parallel_size=1 x "),
        ({"expert_tensor_parallel_size": -1}, "expert_tensor_parallel_size=-1: use an integer of 1 or more"),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size=0: use an integer of 1 or more"),
        ({"tensor_model_parallel_size": 3}, "world size 1 is not a multiple of tensor_model_parallel_size=3"),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs pipeline_model_parallel_size of 2 or more, got 1"),
        ({"order": "tp-cp-ep-dp-xx"}, "give each of tp, cp, ep, dp, pp at most once"),
        ({"pipeline_model_parallel_split_rank": 1}, "pipeline_model_parallel_split_rank=1 is not supported"),
        ({"use_sharp": True}, "use_sharp=True is not supported: SHARP is a feature of NCCL"),
        ({"tensor_model_paralel_size": 2}, "unknown argument .*did you mean tensor_model_parallel_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ps.initialize_model_parallel(**arguments)
    assert not ps.is_initialized()


def test_megatrons_neutral_arguments_are_accepted():
    ps.initialize_model_parallel(
        1, 1, None, pipeline_model_parallel_split_rank=None, use_sharp=False, expert_tensor_parallel_size=None
    )
    assert ps.is_initialized()


@pytest.mark.parametrize(
    ("order", "world", "pp", "message"),
    [
        ("tp-cp-ep-dp-pp", 8, 2, None),
        ("tp-pp-dp", 4, 2, None),  # without data parallelism it is the same order
        ("tp-cp-pp-ep-dp", 8, 2, "is not built; use Megatron's default"),
        ("tp-pp", 8, 2, "leaves out dp, which has size 2"),
        ("tp-dp-tp", 8, 2, "at most once"),
    ],
)
def test_orders(order, world, pp, message):
    config = ModelParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=pp)
    if message is None:
        ps._check_order(order, config, world)
    else:
        with pytest.raises(ConfigError, match=message):
            ps._check_order(order, config, world)


def test_the_package_itself_never_looks_here():
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.ImportFrom) else []
            module = getattr(node, "module", "") or ""
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if "parallel_state" in names or any("parallel_state" in text for text in (module, *names)):
                importers.add(path.relative_to(PACKAGE).parts[0])
    assert importers <= {"compat", "parallel_state.py"}


@pytest.mark.parametrize("rank", range(4))
def test_experts_have_groups_of_their_own(rank):
    """Two ranks of tensor parallelism that hold whole experts each, four of which share a layer's."""
    sizes = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
    spans = expert_spans(rank, 4, ModelParallelConfig(**sizes))
    groups = {name: Named(ranks, rank) for name, ranks in spans}
    ps.set_context(dataclasses.replace(context_of(rank, 4, 2, 1), **groups))
    assert (ps.get_expert_model_parallel_rank(), ps.get_expert_model_parallel_world_size()) == (rank, 4)
    assert ps.get_expert_model_parallel_group().ranks == (0, 1, 2, 3)
    assert ps.get_expert_tensor_parallel_group().ranks == ps.get_expert_data_parallel_group().ranks == (rank,)
