"""Pure parts of the core: the mesh, what a shard is, dropout's keys, document masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.data.masks import document_starts, loss_mask_and_positions
from parallel_core.errors import ConfigError
from parallel_core.layout.mesh import Mesh
from parallel_core.layout.shard import Box, Cut, TensorShard, region
from parallel_core.tensor_parallel.parameter import init_method_normal, named_normal, named_xavier_uniform
from parallel_core.tensor_parallel.random import RandomStreams

SIZES = st.integers(1, 4)


# ---- mesh -----------------------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(SIZES, SIZES, SIZES, SIZES)
def test_ranks_stand_in_megatrons_order(tp: int, cp: int, dp: int, pp: int) -> None:
    mesh = Mesh.megatron(tp * cp * dp * pp, tensor_parallel=tp, context_parallel=cp, pipeline_parallel=pp)
    for t, c, d, p in itertools.product(range(tp), range(cp), range(dp), range(pp)):
        rank = t + tp * (c + cp * (d + dp * p))
        assert mesh.rank(tp=t, cp=c, dp=d, pp=p) == rank
        assert mesh.coordinates(rank) == {"tp": t, "cp": c, "dp": d, "pp": p}


@settings(deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.sets(st.sampled_from(["tp", "cp", "dp", "pp"])))
def test_groups_partition_the_ranks(tp: int, cp: int, dp: int, pp: int, axes: set[str]) -> None:
    """A group is the list of its global ranks."""
    mesh = Mesh.megatron(tp * cp * dp * pp, tensor_parallel=tp, context_parallel=cp, pipeline_parallel=pp)
    groups = mesh.groups(*axes)
    assert sorted(itertools.chain(*groups)) == list(range(mesh.world_size))
    for group in groups:
        assert group == sorted(group) and len(group) == mesh.size(*axes)
        for rank in group:
            assert mesh.group_of(rank, *axes) == group
        fixed = {name for name, _ in mesh.axes} - axes
        assert len({tuple(mesh.coordinates(rank)[name] for name in sorted(fixed)) for rank in group}) == 1


def test_a_mesh_of_sixteen_has_megatrons_groups() -> None:
    mesh = Mesh.megatron(16, tensor_parallel=2, pipeline_parallel=4)
    assert mesh.groups("tp")[:3] == [[0, 1], [2, 3], [4, 5]]
    assert mesh.groups("dp")[:3] == [[0, 2], [1, 3], [4, 6]]
    assert mesh.groups("pp") == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
    assert mesh.groups("tp", "pp")[0] == [0, 1, 4, 5, 8, 9, 12, 13]


def test_a_world_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"world size 6 is not a multiple of .* = 4; start (4|8) processes"):
        Mesh.megatron(6, tensor_parallel=2, pipeline_parallel=2)
    with pytest.raises(ValueError, match="no axis \\['ep'\\]"):
        Mesh.megatron(4).groups("ep")


# ---- shards ---------------------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(st.data())
def test_shards_cover_a_tensor_once(data: st.DataObject) -> None:
    size, stride, each = data.draw(SIZES), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    shape = list(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] = size * stride * each
    full = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    count = np.zeros(shape, int)
    for rank in range(size):
        spec = TensorShard.cut("w", shape, Cut("tp", dim, rank, size, stride))
        part = spec.take(full)
        assert part.shape == spec.local_shape and part.flags.c_contiguous
        blocks = np.split(full, stride, dim)  # the parts that are stacked, each cut on its own
        np.testing.assert_array_equal(part, np.concatenate([np.split(b, size, dim)[rank] for b in blocks], dim))
        covered = np.zeros(spec.local_shape, int)
        for box in spec.boxes:
            np.testing.assert_array_equal(region(part, box.local), region(full, box.globe))
            region(count, box.globe)[...] += 1
            region(covered, box.local)[...] += 1
        assert (covered == 1).all()
    assert (count == 1).all()


def test_a_whole_tensor_is_one_box() -> None:
    spec = TensorShard.cut("w", (3, 4), Cut("tp", 0, 0, 1))
    assert spec.local_shape == (3, 4)
    assert spec.boxes == (Box(((0, 3), (0, 4)), ((0, 3), (0, 4))),)


def test_tensors_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"w: dim 0 of \[6, 4\] cannot be cut into 2 x 2 equal parts"):
        TensorShard.cut("w", (6, 4), Cut("tp", 0, 0, 2, parts=2))
    with pytest.raises(ConfigError, match=r"w: expected shape \[4\], got \[5\]"):
        TensorShard.cut("w", (4,)).take(np.zeros(5))


@settings(deadline=None)
@given(st.data())
def test_cuts_over_several_axes_cover_a_tensor_once(data: st.DataObject) -> None:
    """Experts are cut over one axis, their features over another; a fused tensor's dim may be cut twice."""
    axes = data.draw(st.dictionaries(st.sampled_from(["tp", "ep", "cp"]), SIZES, min_size=1))
    dims = {axis: data.draw(st.integers(0, 2)) for axis in axes}
    parts = data.draw(st.integers(1, 3))
    first = next(iter(axes))
    shape = [2, 3, 1]
    for axis, size in axes.items():
        shape[dims[axis]] *= size * (parts if axis == first else 1)
    full = np.arange(np.prod(shape)).reshape(shape)
    seen = np.zeros(shape, int)
    for ranks in itertools.product(*(range(size) for size in axes.values())):
        cuts = [
            Cut(axis, dims[axis], rank, size, parts if axis == first else 1)
            for (axis, size), rank in zip(axes.items(), ranks)
        ]
        shard = TensorShard.cut("w", shape, *cuts, dtype="int64")
        part = shard.take(full)
        assert part.size * np.prod(list(axes.values())) == full.size
        for box in shard.boxes:
            np.testing.assert_array_equal(region(part, box.local), region(full, box.globe))
            region(seen, box.globe)[...] += 1
    assert (seen == 1).all()


def test_one_rank_has_the_copy_that_counts() -> None:
    cut = TensorShard.cut("w", (4, 4), Cut("tp", 0, 1, 2))
    whole = TensorShard.cut("norm.weight", (4,))
    assert cut.is_first_copy({"tp": 1}) and cut.is_first_copy({"tp": 1, "ep": 1})  # experts' ranks are others' ranks
    expert = TensorShard.cut("w", (4, 4), Cut("ep", 0, 1, 2), replicas="edp")
    assert expert.is_first_copy({"tp": 1, "ep": 1, "etp": 0}) and not expert.is_first_copy({"ep": 1, "etp": 1})
    assert whole.is_first_copy({"tp": 0}) and not whole.is_first_copy({"tp": 1})
    assert not TensorShard.cut("w", (4, 4), Cut("tp", 0, 0, 2), is_copy=True).is_first_copy({"tp": 0})


def test_weight_decay_is_a_trait_with_megatrons_default() -> None:
    assert TensorShard.cut("w.weight", (4, 4)).decays and not TensorShard.cut("n.weight", (4,)).decays
    assert not TensorShard.cut("fc.bias", (2, 4)).decays
    assert TensorShard.cut("n.weight", (4,), weight_decay=True).decays
    assert not TensorShard.cut("w.weight", (4, 4), weight_decay=False).decays


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    """Neither on what was drawn before nor on NumPy's global generator."""
    first = named_normal(0.5, 7, "a")((64, 64))
    np.random.seed(0)
    named_normal(0.5, 7, "b")((3,))
    np.testing.assert_array_equal(named_normal(0.5, 7, "a")((64, 64)), first)
    assert not np.array_equal(named_normal(0.5, 8, "a")((64, 64)), first)
    assert not np.array_equal(named_normal(0.5, 7, "b")((64, 64)), first)
    assert abs(first.std() - 0.5) < 0.03 and abs(first.mean()) < 0.03
    uniform = named_xavier_uniform(7, "a")((64, 32))
    assert np.abs(uniform).max() <= (6 / 96) ** 0.5 and np.abs(uniform).max() > 0.95 * (6 / 96) ** 0.5
    draw = init_method_normal(1.0)
    assert not np.array_equal(draw((4,)), draw((4,)))


# ---- dropout's keys -------------------------------------------------------------------------------------------------
def test_streams_differ_in_every_part_of_the_key_and_in_nothing_else() -> None:
    """A sharded site adds the rank; a whole one draws alike on all of them."""

    def draw(
        seed: int = 1, rank: int = 0, iteration: int = 1, microbatch: int = 0, site: str = "a", sharded: bool = False
    ) -> tuple[int, int]:
        streams = RandomStreams(seed, rank)
        streams.start_microbatch(iteration, microbatch)
        streams.seeds("something else")
        return streams.seeds(site, sharded)

    base = draw()
    assert draw(rank=1) == base
    others = [draw(seed=2), draw(iteration=2), draw(microbatch=1), draw(site="b"), draw(sharded=True)]
    others.append(draw(sharded=True, rank=1))
    assert len({base, *others}) == 7
    assert all(0 <= number < 2**31 for pair in (base, *others) for number in pair)


def test_a_site_that_draws_twice_draws_differently() -> None:
    streams = RandomStreams(1)
    streams.start_microbatch(1, 0)
    assert streams.seeds("a") != streams.seeds("a")


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=10), st.integers(0, 9), st.integers(2, 5))
def test_a_replay_repeats_the_draws_and_comes_back(sites: list[str], start: int, microbatches: int) -> None:
    """For every one of several microbatches in flight, in any order."""
    streams = RandomStreams(3)
    drawn, states = [], []
    for microbatch in range(microbatches):
        streams.start_microbatch(1, microbatch)
        for site in sites[: start % len(sites)]:
            streams.seeds(site)
        states.append(streams.get_state())
        drawn.append([streams.seeds(site) for site in sites])
    streams.training = False
    present = streams.get_state()
    for microbatch in reversed(range(microbatches)):
        with streams.replay(states[microbatch]):
            assert streams.training
            assert [streams.seeds(site) for site in sites] == drawn[microbatch]
        assert streams.get_state() == present


def test_another_runs_seed_can_be_taken() -> None:
    one, other = RandomStreams(1), RandomStreams(2)
    other.set_seed(1)
    assert one.seeds("a") == other.seeds("a")


# ---- documents ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("eod", [0, 5])
@pytest.mark.parametrize("length", [1, 7, 8192])
def test_document_masks_and_positions_are_exact(length: int, eod: int) -> None:
    """Integers, so nothing is off by one at 8192; end of document 0 is a token like any other."""
    rng = np.random.default_rng(length)
    tokens = rng.integers(1, 300, length)
    tokens[rng.random(length) < 3 / length] = eod
    tokens[-1] = eod
    starts = document_starts(tokens, eod)
    mask, positions = loss_mask_and_positions(
        tokens, eod, reset_position_ids=True, eod_mask_loss=True, starts=starts
    )
    want_starts, start = [], 0
    for place, token in enumerate(tokens):
        want_starts.append(start)
        if token == eod:
            start = place + 1
    assert starts.tolist() == want_starts and starts.dtype == np.int32
    assert positions.tolist() == [place - first for place, first in enumerate(want_starts)]
    assert positions.dtype == np.int32
    assert mask.tolist() == [0.0 if token == eod else 1.0 for token in tokens]
    _, plain = loss_mask_and_positions(tokens, eod, reset_position_ids=False, eod_mask_loss=False, starts=None)
    assert plain.tolist() == list(range(length))
