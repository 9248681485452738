"""Words of context parallelism: Megatron's and MindSpeed's ask for the same, and what cannot be cut is refused."""

from __future__ import annotations

import re

import pytest
from config_helpers import load, problems

CP4 = ("--context-parallel-size", "4", "--seq-length", "64", "--num-attention-heads", "8", "--hidden-size", "64")
CP4 = (*CP4, "--max-position-embeddings", "64", "--num-layers", "2", "--attention-dropout", "0")


def exchanges(*words):
    parallel = load(*CP4, *words, world_size=4).config.parallel_config
    return parallel.cp_comm_type, parallel.hierarchical_context_parallel_sizes


@pytest.mark.parametrize(
    ("mindspeed", "megatron", "expected"),
    [
        ("--context-parallel-algo megatron_cp_algo", "--cp-comm-type p2p", (("p2p",), ())),
        ("--context-parallel-algo ulysses_cp_algo", "--cp-comm-type a2a", (("a2a",), ())),
        (
            "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
            "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2",
            (("a2a+p2p",), (2, 2)),
        ),
    ],
)
def test_mindspeeds_algorithms_are_megatrons_exchanges(mindspeed, megatron, expected):
    assert exchanges(*mindspeed.split()) == exchanges(*megatron.split()) == expected


def test_every_layer_may_exchange_in_its_own_way():
    assert exchanges("--cp-comm-type", "p2p", "a2a")[0] == ("p2p", "a2a")
    assert exchanges("--cp-comm-type", "allgather")[0] == ("all_gather",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cp-comm-type p2p p2p p2p", "one for each of 2 layers"),
        ("--cp-comm-type ring", "takes one word"),
        ("--cp-comm-type a2a+p2p", "such as 2 2"),
        ("--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 3", "product is 4"),
        ("--cp-comm-type p2p --hierarchical-context-parallel-sizes 2 2", "belong to a2a\\+p2p"),
        ("--context-parallel-algo ulysses_cp_algo --cp-comm-type p2p", "give one of them"),
        ("--context-parallel-algo adaptive_cp_algo", "is not built"),
        ("--ulysses-degree-in-cp 2", "belongs to hybrid_cp_algo"),
        ("--cp-comm-type a2a --num-attention-heads 2", "deals 2 heads out to 4 ranks"),
        ("--seq-length 60", "two chunks for each rank"),
        ("--attention-dropout 0.1 --seq-length 40", "by which dropout draws"),
        ("--position-embedding-type rope --rope-dynamic-factor 2", "dynamic frequencies are not built"),
    ],
)
def test_what_cannot_be_cut_is_refused(words, message):
    assert re.search(message, problems(*CP4, *words.split(), world_size=4))


def test_one_rank_exchanges_nothing_and_says_so():
    loaded = load("--context-parallel-size", "1", "--cp-comm-type", "a2a")
    assert loaded.config.parallel_config.cp_comm_type == ("p2p",)
    assert any("--cp-comm-type" in note and "not used" in note for note in loaded.notes)
