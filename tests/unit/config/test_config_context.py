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
        ("--context-parallel-size 0", "--context-parallel-size 0: must be above zero"),
        ("--context-parallel-size -2", "--context-parallel-size -2: must be above zero"),
        ("--cp-comm-type a2a+p2p", "product is 4; write 2 2 or 1 4"),
        ("--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 3 1", "3 1, .* product is 4; write 2 2 or 4 1"),
        ("--context-parallel-algo hybrid_cp_algo", "ulysses_degree_in_cp .*must divide 4; write 2 or 1"),
        ("--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 3", "must divide 4; write 2 or 4"),
        ("--cp-comm-type p2p --hierarchical-context-parallel-sizes 2 2", "belong to a2a\\+p2p"),
        ("--context-parallel-algo ulysses_cp_algo --cp-comm-type p2p", "give one of them"),
        ("--context-parallel-algo adaptive_cp_algo", "is not built"),
        ("--ulysses-degree-in-cp 2", "belongs to --context-parallel-algo hybrid_cp_algo"),
        ("--cp-comm-type a2a --num-attention-heads 2", "deals 2 heads out to 4 ranks: .* write 4"),
        ("--cp-comm-type a2a --num-attention-heads 12 --hidden-size 96 --group-query-attention --num-query-groups 3",
         "deals 3 key heads out to 4 ranks: .* write 2 or 4"),
        ("--seq-length 60", "two chunks for each rank: .* write 56 or 64"),
        ("--attention-dropout 0.1 --seq-length 40", "by which dropout draws: .* write 32 or 64"),
        ("--attention-mask-type general", "attention masks other than causal"),
        ("--cp-attention-mask-type general", "attention masks other than causal"),
        ("--hybrid-context-parallel", "sizes that differ from sample to sample"),
        ("--position-embedding-type rope --rope-dynamic-factor 2", "dynamic frequencies are not built"),
    ],
)
def test_what_cannot_be_cut_is_refused(words, message):
    assert re.search(message, problems(*CP4, *words.split(), world_size=4))


def test_a_mindspeed_file_asks_in_the_same_words(tmp_path):
    file = tmp_path / "mindspeed.yaml"
    file.write_text("parallel_config:\n  context_parallel_size: 4\n  context_parallel_algo: hybrid_cp_algo\n"
                    "  ulysses_degree_in_cp: 2\n")
    parallel = load("--config", str(file), "--seq-length", "64", world_size=4).config.parallel_config
    assert (parallel.context_parallel_size, parallel.cp_comm_type) == (4, ("a2a+p2p",))
    assert parallel.hierarchical_context_parallel_sizes == (2, 2)


def test_what_only_changes_how_ranks_overlap_is_ignored_with_that_reason():
    words = "--cp-window-size 2 --use-cp-send-recv-overlap --megatron-cp-in-bnsd --context-parallel-cache-interval 1"
    assert exchanges(*words.split(), "--context-parallel-kv-cache-policy", "full")[0] == ("p2p",)


def test_one_rank_exchanges_nothing_and_says_so():
    loaded = load("--context-parallel-size", "1", "--cp-comm-type", "a2a")
    assert loaded.config.parallel_config.cp_comm_type == ("p2p",)
    assert any("--cp-comm-type" in note and "not used" in note for note in loaded.notes)
