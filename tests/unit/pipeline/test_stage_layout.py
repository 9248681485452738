"""Which layers sit where, by every rule that Megatron-LM has, and the seed's num_layer_list."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.config.schema import ModelParallelConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.stages import StageLayout, stage_layout


def layout(num_layers: int, pp: int = 1, vpp: int = 1, **options: Any) -> StageLayout:
    return stage_layout(
        num_layers,
        ModelParallelConfig(
            pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp, **options
        ),
    )


def in_stage_order(of: StageLayout) -> list[int]:
    return [n for chunk in range(of.num_chunks) for rank in range(of.num_ranks) for n in of.layers[rank][chunk]]


def test_an_even_split() -> None:
    assert layout(8, 4).layers == ((range(0, 2),), (range(2, 4),), (range(4, 6),), (range(6, 8),))


def test_a_virtual_pipeline_deals_chunks_out_in_turn() -> None:
    """Rank 0 has layers 0, 1 and 4, 5: stage = chunk x P + rank."""
    assert layout(8, 2, 2).layers == ((range(0, 2), range(4, 6)), (range(2, 4), range(6, 8)))


def test_fewer_layers_on_the_first_and_last_stage() -> None:
    uneven = {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 3}
    assert layout(8, 4, **uneven).counts() == ((1,), (2,), (2,), (3,))
    assert layout(7, 4, decoder_first_pipeline_num_layers=1).counts() == ((1,), (2,), (2,), (2,))
    assert layout(4, 2, **uneven).counts() == ((1,), (3,))
    assert layout(4, 4, **uneven).counts() == ((1,), (0,), (0,), (3,))  # Megatron's middle stages may be empty
    for num_layers in (3, 7):
        with pytest.raises(ConfigError, match="leaves -?[0-9]+ layers for 2 stages"):
            layout(num_layers, 4, **uneven)
    halves = {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 6}
    assert layout(16, 4, 2, **halves).counts() == ((1, 1), (2, 2), (2, 2), (3, 3))
    with pytest.raises(ConfigError, match="pipeline rank 0 has 1 layers"):
        layout(8, 4, 2, **uneven)


def test_embedding_and_loss_counted_as_layers() -> None:
    both = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    assert layout(6, 4, **both).counts() == ((1,), (2,), (2,), (1,))
    assert layout(6, 2, 2, **both).counts() == ((1, 2), (2, 1))
    assert layout(7, 4, account_for_loss_in_pipeline_split=True).counts() == ((2,), (2,), (2,), (1,))
    with pytest.raises(ConfigError, match=r"with the embedding and loss counted as layers: 10.*Use 6 or 10 layers"):
        layout(8, 4, **both)


def test_a_stage_for_the_embedding_alone() -> None:
    assert layout(6, 4, standalone_embedding_stage=True).counts() == ((0,), (2,), (2,), (2,))
    assert layout(6, 2, 2, standalone_embedding_stage=True).counts() == ((0, 2), (2, 2))
    assert layout(6, 1, standalone_embedding_stage=True).counts() == ((6,),)
    with pytest.raises(ConfigError, match="cannot be split over the 3 stages that standalone_embedding_stage leaves"):
        layout(8, 4, standalone_embedding_stage=True)


def test_num_layer_list_gives_every_count() -> None:
    """Rows are pipeline ranks, columns chunks; empty stages are allowed."""
    assert layout(7, 2, 2, num_layer_list=((1, 2), (3, 1))).layers == (
        (range(0, 1), range(4, 6)),
        (range(1, 4), range(6, 7)),
    )
    assert layout(8, 4, num_layer_list=((2,), (3,), (1,), (2,))).counts() == ((2,), (3,), (1,), (2,))
    assert layout(3, 4, num_layer_list=((1,), (0,), (1,), (1,))).counts() == ((1,), (0,), (1,), (1,))


@pytest.mark.parametrize(
    ("num_layers", "counts", "words"),
    [
        (8, ((2,), (3,)), r"one row for each of the\s+pipeline_model_parallel_size=4"),
        (8, ((2, 0), (2, 0), (2, 0), (2, 0)), "virtual_pipeline_model_parallel_size=1 counts"),
        (9, ((2,), (3,), (1,), (2,)), "adds up to 8, not num_layers=9"),
        (4, ((2,), (3,), (-1,), (0,)), "adds up to 4"),
    ],
)
def test_a_num_layer_list_that_does_not_fit_is_refused(
    num_layers: int, counts: tuple[tuple[int, ...], ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        layout(num_layers, 4, num_layer_list=counts)


def test_layers_that_do_not_divide_are_refused_with_what_would() -> None:
    with pytest.raises(ConfigError) as error:
        layout(10, 4, 2)
    assert str(error.value) == (
        "num_layers=10 cannot be split over pipeline_model_parallel_size=4 x virtual_pipeline_model_parallel_size=2 = "
        "8 chunks: 10 is not a multiple of 8. Use 8 or 16 layers, or give num_layer_list."
    )


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_every_layer_has_one_place_and_stages_follow_one_another(pp: int, vpp: int, each: int) -> None:
    of = layout(pp * vpp * each, pp, vpp)
    assert in_stage_order(of) == list(range(pp * vpp * each))
    firsts = [(r, c) for r in range(pp) for c in range(vpp) if of.is_first(r, c)]
    lasts = [(r, c) for r in range(pp) for c in range(vpp) if of.is_last(r, c)]
    assert (firsts, lasts) == ([(0, 0)], [(pp - 1, vpp - 1)])


@settings(deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 3))
def test_any_list_places_every_layer_in_stage_order(data: st.DataObject, pp: int, vpp: int) -> None:
    row = st.lists(st.integers(0, 3), min_size=vpp, max_size=vpp).map(tuple)
    counts = tuple(data.draw(st.lists(row, min_size=pp, max_size=pp)))
    total = sum(map(sum, counts))
    if total == 0:
        return
    of = layout(total, pp, vpp, num_layer_list=counts)
    assert of.counts() == counts
    assert in_stage_order(of) == list(range(total))
