"""Flat buffers: every parameter once, aligned as Megatron-LM aligns them."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.layout.buckets import layout_buffer

NUMELS = st.lists(st.integers(1, 2000), min_size=1, max_size=20)


def test_megatrons_own_example() -> None:
    """Offsets in a distributed optimizer's checkpoint that Megatron-LM wrote (tensor parallel 2, 4 layers)."""
    hidden = 32
    per_layer = [("in_ln", 32), ("proj", 512), ("qkv", 1024), ("pre_mlp", 32), ("fc1", 2048), ("fc2", 1024)]
    names = ["embedding"] + [f"L{i}.{name}" for i in range(4) for name, _ in per_layer] + ["final_layernorm"]
    numels = [1024] + [numel for _ in range(4) for _, numel in per_layer] + [hidden]
    layout = layout_buffer(numels, shards=2, align=True)
    places = {names[slot.index]: (slot.start, slot.end) for slot in layout.slots}
    assert places["final_layernorm"] == (0, 32)
    assert places["L3.fc2"] == (64, 1088)
    assert places["L3.fc1"] == (1088, 3136)
    assert places["L3.pre_mlp"] == (3136, 3168)
    assert places["L3.qkv"] == (3200, 4224)
    assert places["L3.proj"] == (4224, 4736)
    assert places["L3.in_ln"] == (4736, 4768)
    assert places["L2.fc2"][0] == 4800
    assert places["embedding"] == (19008, 20032)
    (bucket,) = layout.buckets
    assert bucket.used == 20032 and bucket.end == 20096  # padded to a multiple of 128


@settings(deadline=None)
@given(NUMELS, st.none() | st.integers(1, 3000), st.integers(1, 6), st.booleans(), st.data())
def test_every_parameter_has_one_place_in_reverse_order(
    numels: list[int], bucket_size: int | None, shards: int, align: bool, data: st.DataObject
) -> None:
    alone = data.draw(st.sets(st.integers(0, len(numels) - 1), max_size=2))
    layout = layout_buffer(numels, bucket_size=bucket_size, shards=shards, align=align, alone=sorted(alone))
    assert [slot.index for slot in layout.slots] == list(reversed(range(len(numels))))
    end = 0
    for slot in layout.slots:
        assert slot.start >= end and slot.end - slot.start == numels[slot.index]
        end = slot.end
        bucket = layout.buckets[slot.bucket]
        assert bucket.start <= slot.start and slot.end <= bucket.end
        if align:
            assert slot.start % 64 == 0
        else:
            assert slot.start == sum(numels[slot.index + 1 :])
    starts = [bucket.start for bucket in layout.buckets]
    assert starts == [0, *(bucket.end for bucket in layout.buckets[:-1])] and layout.buckets[-1].end == layout.numel
    for number, bucket in enumerate(layout.buckets):
        members = [slot for slot in layout.slots if slot.bucket == number]
        following = next((slot.index for slot in layout.slots if slot.bucket == number + 1), None)
        closed_by_it = align and following in alone and members[-1].index not in alone
        if bucket_size is not None and members[-1].end - bucket.start >= bucket_size:
            closed_by_it = False
        used = -(-members[-1].end // 64) * 64 if closed_by_it else members[-1].end
        assert members and bucket.used == used - bucket.start
        if align:
            assert (bucket.end - bucket.start) % math.lcm(shards, 128) == 0
            parts = [bucket.shard(rank, shards) for rank in range(shards)]
            assert parts[0][0] == bucket.start and parts[-1][1] == bucket.end
            assert all(a[1] == b[0] for a, b in zip(parts, parts[1:]))
            assert len({b - a for a, b in parts}) == 1
        if align and any(slot.index in alone for slot in members):
            assert len(members) == 1
        elif bucket_size is not None:
            assert all(slot.end - bucket.start < bucket_size for slot in members[:-1])


@settings(deadline=None)
@given(NUMELS, st.integers(1, 3000), st.integers(1, 4), st.integers(1, 4))
def test_places_inside_the_only_bucket_do_not_depend_on_the_data_parallel_size(
    numels: list[int], bucket_size: int, a: int, b: int
) -> None:
    """So a checkpoint of one data parallel size loads at another."""
    first, second = (layout_buffer(numels, shards=n, align=True) for n in (a, b))
    assert first.slots == second.slots
    assert [x.used for x in first.buckets] == [x.used for x in second.buckets]
