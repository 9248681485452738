"""MindFormers' YAML is read as one more form: every key is mapped, ignored with a reason, or refused by name."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import yaml
from config_helpers import ROOT

from parallel_core.checkpoint.huggingface.tensors import our_shapes
from parallel_core.config import load_config
from parallel_core.config.mindformers import read_mindformers, with_base_files
from parallel_core.config.mindformers.form import key_rows
from parallel_core.config.mindformers.schedule import schedule_arguments
from parallel_core.config.yaml_tree import Leaf, read_leaves
from parallel_core.errors import ConfigError
from parallel_core.training.schedule import batch_sizes, schedule_shape

FILES = ROOT / "tests" / "golden" / "mindformers"
SMALL = {"seq_length": 8, "vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2}


def written(folder, changes, base="run_gpt2.yaml"):
    """A file of changes to one of the golden ones."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"base_config": [str(FILES / base)], **changes}), encoding="utf-8")
    return str(file)


def loaded(folder, changes, *words, base="run_gpt2.yaml"):
    return load_config(["--config", written(folder, changes, base), *words])


def refused(folder, changes, base="run_gpt2.yaml"):
    with pytest.raises(ConfigError) as error:
        loaded(folder, changes, base=base)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "ranks", "layers", "width", "samples"),
    [("run_gpt2", 1, 12, 768, 8), ("run_gpt2_13b", 32, 40, 5120, 4 * 24 * 2), ("run_gpt2_52b", 128, 64, 8192, 1024),
     ("run_gpt2_lora", 1, 12, 768, 8), ("run_gpt2_txtcls", 1, 12, 768, 16), ("run_bert", 1, 12, 768, 128),
     ("run_qa_bert", 1, 12, 768, 12)],
)  # fmt: skip
def test_files_of_the_published_sizes_are_read_with_their_base_files_and_anchors(name, ranks, layers, width, samples):
    found = load_config(["--config", str(FILES / f"{name}.yaml")])
    model, data = found.config.model_config, found.config.dataset_config
    assert (found.world_size, model.num_layers, model.hidden_size) == (ranks, layers, width)
    assert (data.global_batch_size, model.ffn_hidden_size) == (samples, 4 * width)
    assert data.global_batch_size == data.batch_size * data.micro_batch_num * (4 if ranks == 32 else ranks // 16 or 1)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("run_gpt2", 124_439_808), ("run_gpt2_13b", 12_853_386_240 + 5120), ("run_gpt2_52b", 51_966_533_632),
     ("run_bert", 110_106_428), ("run_qa_bert", 108_893_186)],
)
def test_models_have_the_published_number_of_parameters_and_no_rows_beside_but_for_equal_parts(name, parameters):
    """50257 tokens are not a multiple of two ranks: there is one row more."""
    model = load_config(["--config", str(FILES / f"{name}.yaml")]).config.model_config
    assert sum(math.prod(shape) for shape in our_shapes(model).values()) == parameters


def test_the_published_example_of_32_devices_is_this_layout():
    config = load_config(["--config", str(FILES / "run_gpt2_13b.yaml")]).config
    parallel, model, optimizer = config.parallel_config, config.model_config, config.optimizer_config
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (2, 4)
    assert config.training_config.use_distributed_optimizer and config.training_config.fp16
    assert (model.recompute_granularity, model.hidden_act) == ("full", "fast_gelu")
    assert (model.seq_length, model.attention_softmax_in_fp32) == (2048, False)
    assert (optimizer.learning_rate, optimizer.min_lr, optimizer.lr_warmup_iters) == (5e-5, 1e-6, 2000)
    assert (optimizer.betas, optimizer.eps, optimizer.adam_bias_correction) == ((0.9, 0.95), 1e-8, False)
    assert (optimizer.clip_grad, config.training_config.loss_scale_value) == (1.0, 2.0**32)
    assert (config.training_config.save_interval, config.training_config.prefix) == (100, "gpt")


def test_llama_of_later_releases_is_read_with_its_names_of_schedule_and_accumulation(tmp_path):
    model = {"type": "LlamaConfig", "seq_length": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
             "vocab_size": 320, "multiple_of": 16, "n_kv_heads": 2, "rms_norm_eps": "1.0e-5", "pad_token_id": 0,
             "softmax_compute_type": "float16", "rotary_dtype": "float16", "scaling_factor": 2.0,
             "extend_method": "PI", "use_flash_attention": True, "compute_dtype": "bfloat16"}  # fmt: skip
    changes = {
        "model": {"model_config": model, "arch": {"type": "LlamaForCausalLM"}}, "use_parallel": True,
        "parallel": {"parallel_mode": "SEMI_AUTO_PARALLEL"}, "parallel_config": {"data_parallel": 2},
        "runner_config": {"batch_size": 1, "gradient_accumulation_steps": 8}, "context": {"max_device_memory": "58GB"},
        "lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 5e-5, "lr_end": 0.0, "warmup_ratio": 0.03},
        "optimizer": {"type": "FP32StateAdamWeightDecay"}, "callbacks": [{"type": "CheckpointMonitor"}],
    }  # fmt: skip
    found = loaded(tmp_path, changes, base="base.yaml")
    model, data = found.config.model_config, found.config.dataset_config
    assert (model.ffn_hidden_size, model.num_query_groups, model.hidden_act) == (176, 2, "swiglu")
    assert (model.rotary_seq_len_interpolation_factor, model.compute_dtype) == (2.0, "bfloat16")
    assert model.untie_embeddings_and_output_weights and not model.add_bias_linear
    assert (found.world_size, data.global_batch_size, data.micro_batch_num, data.pad_token_id) == (2, 16, 8, 0)
    optimizer = found.config.optimizer_config
    assert (optimizer.lr_decay_style, optimizer.lr_warmup_fraction, optimizer.min_lr) == ("cosine", 0.03, 0.0)
    assert found.config.training_config.max_device_memory == "58GB"


def test_adapters_are_those_of_the_packed_queries_keys_and_values():
    lora = load_config(["--config", str(FILES / "run_gpt2_lora.yaml")]).config.training_config.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (64, 128.0, 0.1, ("linear_qkv",))


def test_classes_of_texts_have_their_head_their_table_and_the_tokenizer_beside_the_weights(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "fine\t1\nbad\t0\n" * 20)
    model = {"model_config": {"num_labels": 3, "checkpoint_name_or_path": str(tmp_path), "vocab_size": 320}}
    data = {"data_loader": {"dataset_dir": str(tmp_path / "train.tsv")}}
    changes = {"model": model, "run_mode": "finetune", "train_dataset": data, "runner_config": {"epochs": 2}}
    config = loaded(tmp_path, changes, base="run_gpt2_txtcls.yaml").config
    assert (config.model_config.num_labels, config.training_config.training_iters) == (3, 2 * (40 // 16))
    assert config.training_config.load_checkpoint == str(tmp_path) and config.training_config.finetune
    assert (config.dataset_config.tokenizer_type, config.dataset_config.merge_file) == (
        "GPT2BPETokenizer", str(tmp_path / "merges.txt")
    )  # fmt: skip


@pytest.mark.parametrize(("name", "head", "length"),
                         [("run_bert", "pretraining", 128), ("run_qa_bert", "question_answering", 384)])  # fmt: skip
def test_encoders_are_read_by_either_spelling_of_their_sizes(name, head, length):
    found = load_config(["--config", str(FILES / f"{name}.yaml")])
    model, optimizer = found.config.model_config, found.config.optimizer_config
    assert (model.bert.bert_head, model.bert.num_tokentypes, model.hidden_act) == (head, 2, "gelu")
    assert (model.seq_length, model.max_position_embeddings, model.norm_epsilon) == (length, 512, 1e-12)
    assert (model.num_attention_heads, model.vocab_size, model.hidden_dropout_rate) == (12, 30522, 0.1)
    assert (optimizer.betas, optimizer.clip_grad, optimizer.adam_bias_correction) == ((0.9, 0.999), 0.0, False)
    assert found.config.dataset_config.tokenizer_type == "BertWordPieceLowerCase"
    assert any(note.startswith("dropout_prob, num_labels, use_one_hot_embeddings: ignored; ") for note in found.notes)


def test_questions_have_their_folder_and_the_pieces_beside_the_weights(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    folder = str(tmp_path)
    data = {"data_loader": {"dataset_dir": folder}, "tokenizer": {"do_lower_case": False}}
    changes = {"load_checkpoint": folder, "run_mode": "finetune", "train_dataset": data}
    config = loaded(tmp_path, changes, base="run_qa_bert.yaml").config
    assert (config.dataset_config.data_path, config.dataset_config.vocab_file) == ((folder,), f"{folder}/vocab.txt")
    assert config.dataset_config.tokenizer_type == "BertWordPieceCase" and config.training_config.finetune
    held = {**changes, "do_eval": True, "eval_dataset": {"data_loader": {"dataset_dir": folder}}}
    config = loaded(tmp_path, held, base="run_qa_bert.yaml").config
    assert config.dataset_config.train_data_path == (folder,)
    assert config.dataset_config.valid_data_path == (f"{folder}/dev-v1.1.json",)


def test_words_come_from_sentences_and_records_of_masked_ones_are_not_read(tmp_path):
    found = load_config(["--config", str(FILES / "run_bert.yaml")])
    assert not found.config.dataset_config.data_path
    assert any("records whose words are masked once and for all are not read" in note for note in found.notes)
    (tmp_path / "d_text_sentence.idx").write_text("")
    prefix = str(tmp_path / "d_text_sentence")
    data = {"data_loader": {"dataset_dir": prefix}}
    assert loaded(tmp_path, {"train_dataset": data}, base="run_bert.yaml").config.dataset_config.data_path == (prefix,)


def test_flags_stand_over_the_file_and_each_value_says_where_it_stands(tmp_path):
    found = loaded(tmp_path, {"runner_config": {"batch_size": 2}}, "--lr", "0.5", "--train-iters", "3")
    assert (found.config.optimizer_config.learning_rate, found.config.dataset_config.batch_size) == (0.5, 2)
    assert found.provenance["dataset_config.batch_size"].endswith("run.yaml:4")
    assert found.provenance["optimizer_config.eps"].endswith("base.yaml:122")


# ---- what is wrong --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runner_confg": {"epochs": 2}}, "runner_confg.epochs: unknown key of MindFormers; did you mean runner_"),
        ({"model": {"model_config": {"hiden_size": 2}}}, "model.model_config.hiden_size: unknown key of GPT2Config"),
        ({"model": {"model_config": {"hidden_size": "wide"}}}, "hidden_size='wide': give a whole number"),
        ({"model": {"model_config": {"num_heads": 5}}}, "hidden_size=768 is not a multiple of num_heads=5"),
        ({"model": {"model_config": {"type": "SwinConfig"}}}, "SwinConfig is not trained from such a file"),
        ({"model": {"arch": {"type": "GPT2Mine"}}}, "model.arch.type: GPT2Mine: not built"),
        ({"run_mode": "predict"}, "a training program continues no text"),
        ({"run_mode": "finetune", "model": {"model_config": {"checkpoint_name_or_path": ""}}}, "needs weights"),
        ({"only_save_strategy": True}, "only_save_strategy: true: not built: strategies without training"),
        ({"optimizer": {"type": "lamb"}}, "optimizer.type: lamb: not built"),
        ({"lr_schedule": {"type": "CosineAnnealingLR"}}, "lr_schedule.type 'CosineAnnealingLR'"),
        ({"lr_schedule": {"power": 2.0}}, "polynomials other than straight lines"),
        ({"layer_scale": True}, "learning rates that differ from layer to layer"),
        ({"callbacks": [{"type": "MyCallback"}]}, "callbacks: .*MyCallback is not built"),
        ({"use_parallel": True, "parallel": {"parallel_mode": 1, "full_batch": False}}, "parallel.full_batch"),
        ({"use_parallel": "maybe"}, "use_parallel: maybe: give True or False"),
        ({"runner_config": {"batch_size": 0}}, "runner_config.batch_size: 0: give a whole number, 1 or more"),
        ({"runner_wrapper": {"scale_sense": {"scale_factor": 4}}}, "the scale is halved and doubled"),
        ({"train_dataset": {"data_loader": {"type": "SQuADDataLoader"}}}, "data_loader.type: SQuADDataLoader: not bui"),
        ({"base_config": ["run.yaml"]}, "leads back to itself"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name_with_its_line(tmp_path, changes, said):
    told = refused(tmp_path, changes)
    assert re.search(said if ".*" in said else re.escape(said), told), told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"model_config": {"post_layernorm_residual": False}}}, "post_layernorm_residual: false: not built"),
        ({"model": {"model_config": {"use_relative_positions": True}}}, "use_relative_positions: true: not built"),
        ({"model": {"model_config": {"hidden_size": 64}}}, "embedding_size, which means the same; leave one out"),
        ({"model": {"model_config": {"head": "encoder"}}}, "model.model_config.head: unknown key of BertConfig"),
        ({"model": {"arch": {"type": "BertForTokenClassification"}}}, "BertForTokenClassification: not built; of Bert"),
        ({"train_dataset": {"data_loader": {"type": "MindDataset"}}}, "SQuADDataLoader reads SQuAD v1.1's folders"),
        ({"train_dataset": {"eod_reset": True}}, "train_dataset.eod_reset: true: an encoder's samples are of one doc"),
        ({"train_dataset": {"data_loader": {"shuffle": False}}}, "an encoder's samples are shuffled by epoch"),
        ({"run_mode": "predict"}, "python -m parallel_core.question_answering predict"),
        ({"run_mode": "eval"}, "python -m parallel_core.question_answering evaluate --load DIR"),
    ],
)  # fmt: skip
def test_other_encoders_are_refused_by_name(tmp_path, changes, said):
    assert said in refused(tmp_path, changes, "run_qa_bert.yaml")


ODD = (None, "", "x", -1, 0, 1.5, float("nan"), [], {}, [1, 2], ["a", {"type": 3}], True, 10**30, "None")


@pytest.mark.parametrize("name", ["run_gpt2_lora", "run_qa_bert"])
def test_no_value_anywhere_ends_in_anything_but_a_configuration_or_its_error(name):
    file = str(FILES / f"{name}.yaml")
    leaves, _ = with_base_files(read_leaves(file)[0], file)
    for place, leaf in enumerate(leaves):
        for odd in ODD:
            changed = [*leaves[:place], Leaf(leaf.path, odd, leaf.source, odd), *leaves[place + 1 :]]
            values, problems, notes = read_mindformers(changed)
            assert all(isinstance(text, str) for text in (*problems, *notes)) and values


def test_every_key_of_the_files_has_a_row_and_what_is_ignored_is_said_once_for_each_reason(tmp_path):
    notes = loaded(tmp_path, {}).notes
    told = [note for note in notes if "context.*" in note]
    assert len(told) == 1 and "ignored; everything runs in PyNative mode" in told[0]
    assert any("train_dataset.batch_size" in note and "train_dataset_task.*" in note for note in notes)
    assert {row.status for row in key_rows().values()} == {"read", "mapped", "ignored", "refused"}


def test_without_use_parallel_one_rank_runs_whatever_parallel_config_says(tmp_path):
    found = loaded(tmp_path, {"parallel_config": {"model_parallel": 8, "data_parallel": 2}})
    assert found.world_size == 1
    assert any("parallel_config.model_parallel: 8: not used, use_parallel is False" in note for note in found.notes)


def test_interleaved_microbatches_are_one_batch_whose_mean_is_the_mean_of_all_samples(tmp_path):
    """There the parts' losses are added, and the log divides them in one place and not in another."""
    cut = {"use_parallel": True, "parallel": {"parallel_mode": 1}, "micro_batch_interleave_num": 2}
    layout = {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 4}
    config = loaded(tmp_path, {**cut, "parallel_config": layout, "runner_config": {"batch_size": 3}}).config
    data = config.dataset_config
    assert (data.batch_size, data.micro_batch_num, data.global_batch_size) == (3 * 2, 4, 3 * 2 * 4 * 2)
    assert config.parallel_config.micro_batch_interleave_num == 2
    one = loaded(tmp_path, {**cut, "parallel_config": {"data_parallel": 2, "micro_batch_num": 4}}).config
    assert one.dataset_config.micro_batch_num == 1  # micro_batch_num counts with a pipeline alone


def test_yaml_with_chinese_comments_is_read_as_utf8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    file = tmp_path / "run.yaml"
    text = f"base_config: ['{FILES / 'run_gpt2.yaml'}']\nseed: 3  # 随机种子\n"
    file.write_text(text, encoding="utf-8")
    assert load_config(["--config", str(file)]).config.training_config.seed == 3


# ---- schedules ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "golden"),
    [
        (("polynomial", 1e-4, 1e-5, 0), {0: 0.0, 1: 1e-4, 50: 5.59e-5, 100: 1.09e-5}),
        (("polynomial", 5e-5, 1e-6, 10), {9: 4.5e-5, 55: 2.55e-5}),
        (("linear", 1e-4, None, 10), {5: 5e-5, 10: 1e-4, 55: 5e-5, 100: 0.0, 120: 0.0}),
        (("cosine", 1e-4, 1e-5, 10), {5: 5e-5, 10: 1e-4, 55: 5.5e-5, 100: 1e-5}),
        (("constant_with_warmup", 1e-4, None, 10), {5: 5e-5, 10: 1e-4, 90: 1e-4}),
    ],
)  # fmt: skip
def test_schedules_give_mindformers_learning_rates(tmp_path, values, golden):
    kind, rate, end, warmup = values
    changes = {"lr_schedule": {"type": kind, "learning_rate": rate, "lr_end": end, "warmup_steps": warmup,
                               "total_steps": 100}}  # fmt: skip
    config = loaded(tmp_path, changes, "--train-iters", "100").config
    shape, batch = schedule_shape(config, batch_sizes(config, 1), 100), config.dataset_config.global_batch_size
    found = [shape.lr(step * batch) for step in golden]
    np.testing.assert_allclose(found, list(golden.values()), rtol=1e-12)


def test_a_warmup_ratio_is_of_all_steps():
    assert schedule_arguments("cosine", 1e-4, warmup_ratio=0.03, total_steps=1000)["lr_warmup_iters"] == 30
    assert schedule_arguments("cosine", 1e-4, warmup_ratio=0.03)["lr_warmup_fraction"] == 0.03


# ---- a run ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def records(tmp_path):
    """A folder with 20 records of 9 ids."""
    from parallel_core.data.indexed_dataset import IndexedDatasetBuilder
    from parallel_core.prepare.mindrecord import indexed_to_mindrecord

    (tmp_path / "data").mkdir()
    with IndexedDatasetBuilder(f"{tmp_path}/pair.bin", np.int32) as builder:
        builder.add_document(np.random.default_rng(1).integers(0, 60, 180), [180])
        builder.finalize(f"{tmp_path}/pair.idx")
    indexed_to_mindrecord(f"{tmp_path}/pair", f"{tmp_path}/data/x.mindrecord", 9)
    return str(tmp_path / "data")


def test_a_run_is_as_long_as_its_epochs_where_the_records_can_be_counted(tmp_path, records):
    data = {"train_dataset": {"data_loader": {"dataset_dir": records}}, "runner_config": {"epochs": 3, "batch_size": 6}}
    found = loaded(tmp_path, data)
    assert found.config.training_config.training_iters == 3 * (20 // 6)
    assert found.config.optimizer_config.lr_decay_iters == 9 + 1  # a polynomial without warm-up falls over all steps
    assert found.config.dataset_config.data_path == (records,)
    assert (found.config.dataset_config.dataloader_type, found.config.training_config.eval_iters) == ("cyclic", 0)
    held = {**data, "do_eval": True, "eval_dataset": {"data_loader": {"dataset_dir": records}}}
    config = loaded(tmp_path, {**held, "eval_epoch_interval": 1}).config
    assert (config.training_config.eval_interval, config.training_config.eval_iters) == (3, 3)
    data["runner_config"]["batch_size"] = 21
    assert "20 records make no batch of 21" in refused(tmp_path, data)


@pytest.mark.slow
def test_a_small_file_trains_and_its_skipped_steps_advance_no_learning_rate(tmp_path, records):
    from parallel_core.training import pretrain
    from pretrain_gpt import model_provider_func
    from tests.helpers.one_process import inside, rows

    scale = {"scale_sense": {"loss_scale_value": 2.0**34}}  # so hot that the first updates overflow
    changes = {
        "model": {"model_config": SMALL}, "train_dataset": {"data_loader": {"dataset_dir": records, "shuffle": False}},
        "runner_config": {"epochs": 8, "batch_size": 4}, "output_dir": "out", "runner_wrapper": scale,
        "lr_schedule": {"learning_rate": 1e-2, "lr_end": 1e-3, "warmup_steps": 2},
    }  # fmt: skip
    file = written(tmp_path, changes)
    with inside(tmp_path / "run"):
        pretrain(None, model_provider_func, argv=["--config", file, "--log-dir", "log"])
    found = rows(tmp_path / "run")
    made = [row for row in found if not row["skipped"]]
    assert len(found) == 8 * 5 and 0 < len(made) < len(found)
    assert [row["lr"] for row in made[:3]] == [0.0, 5e-3, 1e-2]
    assert made[-1]["loss"] < found[0]["loss"]
    assert (tmp_path / "run" / "out" / "checkpoint" / "latest_checkpointed_iteration.txt").exists()
