from __future__ import annotations

import itertools
import multiprocessing
import os
import pathlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel_core.data import (
    Blend,
    attention_mask_from_document_starts,
    build_train_valid_test_datasets,
    document_starts,
)
from parallel_core.data.gpt_dataset import MockSequences
from parallel_core.data.tokenizer import GPT2BPETokenizer, NullTokenizer
from parallel_core.errors import ConfigError, DataError
from tests.unit.data.helpers import make_config, numbered_documents, write_pair

BPE = pathlib.Path(__file__).parents[2] / "golden" / "data" / "bpe"


def train(config, num_samples=None):
    return build_train_valid_test_datasets(config, (num_samples, 0, 0))[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=25),
    seq=st.integers(1, 12),
    num_samples=st.one_of(st.none(), st.integers(1, 60)),
    seed=st.integers(0, 1000),
)
def test_every_token_appears_once_per_epoch(tmp_path, lengths, seq, num_samples, seed):
    prefix = write_pair(tmp_path / "x", numbered_documents(lengths))
    total = sum(lengths)
    if total <= seq:
        return
    cache = str(tmp_path / f"{seed}-{seq}-{num_samples}-{hash(tuple(lengths))}")
    try:
        dataset = train(make_config(prefix, random_seed=seed, sequence_length=seq, path_to_cache=cache), num_samples)
    except DataError as error:
        assert "leave" in str(error)  # the arrangement Megatron refuses as well
        return
    epochs = dataset.plan.num_epochs
    assert sorted(dataset.shuffle_index) == list(range(len(dataset)))
    samples = [dataset[index] for index in range(len(dataset))]
    # inputs overlap nowhere: only the tail of the last epoch, shorter than a sample, is left out
    counts = np.bincount(np.concatenate([sample["tokens"] for sample in samples]), minlength=total)
    assert counts.max() <= epochs and counts.sum() == len(dataset) * seq
    assert epochs * total - counts.sum() <= seq
    ordered = sorted(zip(dataset.shuffle_index, samples), key=lambda pair: pair[0])
    inputs = np.concatenate([sample["tokens"] for _, sample in ordered])
    labels = np.concatenate([sample["labels"] for _, sample in ordered])
    assert np.array_equal(inputs[1:], labels[:-1])


def test_documents_longer_than_the_sequence_are_cut_and_lose_nothing(tmp_path):
    prefix = write_pair(tmp_path / "long", [np.arange(100)])
    dataset = train(make_config(prefix, sequence_length=8))
    ordered = [dataset[index]["tokens"] for index in np.argsort(dataset.shuffle_index)]
    assert np.concatenate(ordered).tolist() == list(range(96))


def test_last_validation_sample_is_padded_and_masked_when_kept(tmp_path):
    prefix = write_pair(tmp_path / "x", [np.arange(1, 22)])
    config = make_config(prefix, split="0,1,0", drop_last_partial_validation_sequence=False)
    _, valid, _ = build_train_valid_test_datasets(config, (None, None, None))
    assert len(valid) == 3
    short = valid[int(np.flatnonzero(valid.shuffle_index == 2)[0])]
    assert short["tokens"].tolist() == [17, 18, 19, 20, 21, 0, 0, 0]
    assert short["labels"].tolist() == [18, 19, 20, 21, 0, 0, 0, 0]
    assert short["loss_mask"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("cut", [True, False])
def test_a_padded_sample_does_not_change_the_mask_of_others(tmp_path, cut):
    prefix = write_pair(tmp_path / "x", [np.arange(1, 22)])
    config = make_config(prefix, split="0,1,0", drop_last_partial_validation_sequence=cut)
    _, valid, _ = build_train_valid_test_datasets(config, (None, None, None))
    masks = [valid[index]["loss_mask"].sum() for index in [*range(len(valid)), *range(len(valid))]]
    assert sorted(masks) == ([8, 8, 8, 8] if cut else [4, 4, 8, 8, 8, 8])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(0, 3))
def test_document_starts_and_mask_equal_megatrons_loop(tokens, eod):
    tokens = np.array(tokens, np.int32)
    size = len(tokens)
    mask, positions, previous = np.tril(np.ones((size, size))), np.arange(size), 0
    for i in np.flatnonzero(tokens == eod):
        mask[i + 1 :, : i + 1] = 0
        positions[i + 1 :] -= i + 1 - previous
        previous = i + 1
    starts = document_starts(tokens, eod)
    assert starts.dtype == np.int32 and (np.arange(size) - starts).tolist() == positions.tolist()
    assert np.array_equal(attention_mask_from_document_starts(starts), (mask < 0.5)[None])


def test_zero_is_a_legal_end_of_document(tmp_path):
    tokenizer = GPT2BPETokenizer(str(BPE / "vocab.json"), str(BPE / "merges.txt"))
    assert tokenizer.eod == 0
    prefix = write_pair(tmp_path / "x", [[5, 6, 0], [7, 8, 9, 0], [1, 2]])
    config = make_config(
        prefix, tokenizer=tokenizer, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True
    )
    dataset = train(config)
    sample = dataset[0]
    starts, positions = 0, []
    for place, token in enumerate(sample["tokens"].tolist()):
        positions.append(place - starts)
        if token == 0:
            starts = place + 1
    assert sample["position_ids"].tolist() == positions and sample["position_ids"].dtype == np.int32
    assert sample["loss_mask"].tolist() == [float(token != 0) for token in sample["tokens"]]
    assert "document_start" in sample and "attention_mask" not in sample


def test_plain_causal_samples_carry_no_mask(pair):
    assert set(train(make_config(pair))[0]) == {"tokens", "labels", "loss_mask", "position_ids"}


class PaddedNull(NullTokenizer):
    """A null tokenizer with a pad id."""

    def __init__(self, pad):
        super().__init__(50)
        self._pad = pad

    @property
    def pad(self):
        return self._pad


def test_the_tokenizers_pad_id_is_masked_wherever_it_is(tmp_path):
    prefix = write_pair(tmp_path / "x", [[1, 9, 2, 3, 9, 4, 5, 6, 7]])
    sample = train(make_config(prefix, tokenizer=PaddedNull(9)))[0]
    assert sample["tokens"].tolist() == [1, 0, 2, 3, 0, 4, 5, 6]
    assert sample["loss_mask"].tolist() == [0, 1, 1, 0, 1, 1, 1, 1]


def test_a_pad_id_equal_to_eod_masks_only_when_asked(tmp_path):
    prefix = write_pair(tmp_path / "x", [[1, 50, 2, 3, 4, 5, 6, 7, 8]])
    options = {"tokenizer": PaddedNull(50), "path_to_cache": str(tmp_path / "c")}
    assert train(make_config(prefix, **options))[0]["loss_mask"].tolist() == [1] * 8
    masked = train(make_config(prefix, allow_ambiguous_pad_tokens=True, **options))[0]
    assert masked["loss_mask"].tolist() == [0] + [1] * 7


@pytest.mark.parametrize("bad", [-1, 101])
def test_ids_outside_the_vocabulary_are_named(tmp_path, bad):
    prefix = write_pair(tmp_path / "x", [[1, 2, 3, bad, 5, 6, 7, 8, 9]])
    dataset = train(make_config(prefix, tokenizer=NullTokenizer(100)))
    with pytest.raises(DataError, match=f"token id {bad} in sample 0 is outside the vocabulary of 101 ids"):
        dataset[0]


def test_an_index_beyond_the_end_is_an_error(pair):
    dataset = train(make_config(pair))
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_empty_documents_only_is_an_error(tmp_path):
    prefix = write_pair(tmp_path / "x", [[], []])
    with pytest.raises(DataError, match=r"x \(train\): there are no tokens"):
        train(make_config(prefix))


def test_empty_documents_between_others_are_skipped(tmp_path):
    documents = [[], [1, 2, 3], [], [], [4, 5, 6, 7], [], [8, 9]]
    prefix = write_pair(tmp_path / "x", documents)
    dataset = train(make_config(prefix, sequence_length=2))
    order = [token for position in dataset.document_index for token in documents[position]]
    samples = [dataset[index]["tokens"].tolist() for index in np.argsort(dataset.shuffle_index)]
    assert list(itertools.chain(*samples)) == order[:8]


# --- cache ---------------------------------------------------------------------------------------------------------


def test_cache_has_megatrons_names_and_content(pair, tmp_path):
    config = make_config(pair, path_to_cache=str(tmp_path / "cache"))
    dataset = train(config, 30)
    base = f"{dataset.unique_description_hash}-GPTDataset-train"
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    for suffix in ("description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy"):
        assert f"{base}-{suffix}" in names
    assert (tmp_path / "cache" / f"{base}-description.txt").read_text() == dataset.unique_description
    assert dataset.built_anew_on_cache_miss and not train(config, 30).built_anew_on_cache_miss
    assert train(config, 31).built_anew_on_cache_miss


def test_default_cache_lies_beside_the_data(pair):
    train(make_config(pair))
    assert os.listdir(os.path.join(os.path.dirname(pair), "cache", "GPTDataset_indices"))


@pytest.mark.parametrize("harm", ["truncate", "swap", "no description"])
def test_a_damaged_cache_is_built_again(pair, tmp_path, harm):
    config = make_config(pair, path_to_cache=str(tmp_path / "cache"))
    expected = train(config)
    files = {path.name.rsplit("-", 1)[1]: path for path in (tmp_path / "cache").iterdir()}
    if harm == "truncate":
        path = files["sample_index.npy"]
        path.write_bytes(path.read_bytes()[:-9])
    elif harm == "swap":
        np.save(files["shuffle_index.npy"], np.arange(3))
    else:
        files["description.txt"].unlink()
    dataset = train(config)
    assert dataset.built_anew_on_cache_miss and np.array_equal(dataset.shuffle_index, expected.shuffle_index)
    assert not train(config).built_anew_on_cache_miss
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_data_made_again_under_the_same_name_is_noticed(tmp_path):
    cache = str(tmp_path / "cache")
    prefix = write_pair(tmp_path / "x", numbered_documents([10, 20, 30]))
    train(make_config(prefix, path_to_cache=cache))
    del prefix
    prefix = write_pair(tmp_path / "x", numbered_documents([20, 10, 30]))  # same totals, other lengths
    dataset = train(make_config(prefix, path_to_cache=cache))
    assert dataset.built_anew_on_cache_miss
    assert sorted(dataset[0]["tokens"].tolist() + dataset[1]["tokens"].tolist())  # readable with the new lengths


def test_a_cache_folder_that_cannot_be_written_does_not_stop_the_run(pair, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    dataset = train(make_config(pair, path_to_cache=str(tmp_path / "file" / "cache")))
    assert len(dataset) and "cannot be written" in caplog.text


def _build_in_process(prefix, cache, barrier, results):
    barrier.wait()
    dataset = train(make_config(prefix, path_to_cache=cache), 500)
    results.put((dataset.built_anew_on_cache_miss, dataset.shuffle_index.tolist(), dataset[3]["tokens"].tolist()))


def test_several_processes_may_build_at_once(pair, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (pair, str(tmp_path / "cache"), barrier, results)
    processes = [context.Process(target=_build_in_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    built = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [anew for anew, _, _ in built].count(True) == 1
    assert all(rest == built[0][1:] for rest in (item[1:] for item in built))


# --- building ------------------------------------------------------------------------------------------------------


def test_data_paths_per_split(tmp_path):
    first = write_pair(tmp_path / "a", numbered_documents([50] * 4))
    second = write_pair(tmp_path / "b", numbered_documents([30] * 4))
    config = make_config(split=None, blend_per_split=(Blend((first,)), Blend((second, first), (0.5, 0.5)), None))
    train_set, valid, test = build_train_valid_test_datasets(config, (10, 6, 5))
    assert train_set.dataset_path == first and len(train_set.indices) == 4
    assert [part.dataset_path for part in valid.datasets] == [second, first] and len(valid) == 6
    assert test is None


def test_blend_without_weights_takes_one_epoch_of_each(tmp_path):
    first = write_pair(tmp_path / "a", numbered_documents([50] * 4))
    second = write_pair(tmp_path / "b", numbered_documents([30] * 5))
    config = make_config(blend=Blend((first, second, first)))
    whole = train(config)
    lengths = [len(part) for part in whole.datasets]
    assert len(whole) == sum(lengths) and np.bincount(whole.dataset_index).tolist() == lengths
    assert len(train(config, 20)) == 20 and len(train(config, 10_000)) == sum(lengths)
    with pytest.raises(IndexError):
        whole[len(whole)]


def test_weights_need_a_number_of_samples(pair):
    with pytest.raises(ConfigError, match="weights share out a number"):
        train(make_config(blend=Blend((pair, pair), (1.0, 2.0))))


def test_an_empty_split_gives_none_and_is_said(pair, caplog):
    config = make_config(pair, split="999,1,0")
    datasets = build_train_valid_test_datasets(config, (10, 10, 10))
    assert datasets[0] is not None and datasets[1:] == (None, None)
    assert "the valid split" in caplog.text


def test_builder_threads_do_not_change_the_result(tmp_path):
    prefixes = [write_pair(tmp_path / f"p{number}", numbered_documents([20 + number] * 5)) for number in range(4)]
    blends = [
        train(
            make_config(
                blend=Blend(tuple(prefixes), (1, 2, 3, 4)),
                num_dataset_builder_threads=threads,
                path_to_cache=str(tmp_path / f"cache{threads}"),
            ),
            100,
        )
        for threads in (1, 3)
    ]
    assert [blends[0][index]["tokens"].tolist() for index in range(100)] == [
        blends[1][index]["tokens"].tolist() for index in range(100)
    ]


def test_mock_data_is_megatrons():
    generator = np.random.default_rng(seed=0)
    lengths = generator.integers(low=1, high=4096, size=100000, dtype=np.int32)
    sequences = MockSequences(NullTokenizer(5000))
    assert np.array_equal(sequences.sequence_lengths, lengths)
    assert sequences.get(5).tolist() == [*range(1, lengths[5]), 5000]
    assert sequences.get(5, 2, 3).tolist() == [3, 4, 5]
    dataset = build_train_valid_test_datasets(make_config(mock=True, split="90,10,0"), (100, 10, 0))[0]
    assert dataset[0]["tokens"].shape == (8,) and not dataset.built_anew_on_cache_miss


def test_mock_ids_stay_inside_a_small_vocabulary():
    dataset = train(make_config(mock=True, tokenizer=NullTokenizer(63)), 50)
    assert max(int(dataset[index]["tokens"].max()) for index in range(50)) <= 63
