"""MindFormers' checkpoints of GPT-2, LLaMA and BERT: `transformers`' numbers, and files that come back bit for bit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from hf_models import continued, loaded, logits_of, loss_and_norm, parameters
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

from parallel_core import ops
from parallel_core.checkpoint import find_checkpoint, open_checkpoint, read_tensor
from parallel_core.checkpoint.mindspore.files import read_ckpt
from parallel_core.convert.cli import main
from parallel_core.errors import CheckpointError
from parallel_core.generate.loading import describe
from tests.helpers.mindformers_models import MODELS, bert_names, make, write
from tests.helpers.mindformers_models import published as published_model
from tests.unit.checkpoint.test_bert_checkpoints import HEADS, Loss, inputs, tensors_of
from tests.unit.checkpoint.test_bert_checkpoints import VALUES as BERT_VALUES

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "hf"


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    ops.use_kernels("auto")


def published(name):
    return bert_names(tensors_of("pretraining")) if name == "bert_words" else published_model(name)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logits_loss_gradient_and_continuation_are_those_of_transformers(tmp_path, name):
    trained = {**published(name), "adam_m.model.w": np.zeros(3, np.float32), "global_step": np.zeros(1, np.int32)}
    values = np.load(GOLDEN / "computed" / f"{name}.npz")
    model, tokens = loaded(open_checkpoint(make(tmp_path / "m", name, trained))), values["tokens"].astype(np.int64)
    found = logits_of(model, tokens)[:, values["positions"]]
    np.testing.assert_allclose(found, values["logits"], rtol=0, atol=2e-6 * np.abs(values["logits"]).max())
    np.testing.assert_allclose(loss_and_norm(model, tokens), (values["loss"], values["grad_norm"]), rtol=1e-6)
    np.testing.assert_array_equal(continued(model, tokens[:, :12], 24), values["greedy"])


def test_answers_of_bert_are_those_of_transformers(tmp_path):
    others = ("bert.dense.weight", "mlmloss.dense.weight", "nsploss.dense.weight", "bert.mlmloss.dense.weight")
    tensors = {**published("bert"), **dict.fromkeys(others, np.zeros((64, 64), np.float32))}  # of other heads
    model = loaded(open_checkpoint(make(tmp_path / "m", "bert", tensors)))
    nothing = np.zeros(BERT_VALUES["tokens"].shape, np.int32)
    loss, gradients = ms.value_and_grad(Loss(model, nothing, nothing), None, parameters(model))(*inputs())
    norm = sum(float((g.asnumpy().astype(np.float64) ** 2).sum()) for g in gradients) ** 0.5
    np.testing.assert_allclose((loss.asnumpy(), norm), (BERT_VALUES["loss"], BERT_VALUES["grad_norm"]), rtol=2e-6)
    both = np.stack([BERT_VALUES["start_logits"], BERT_VALUES["end_logits"]], -1)
    np.testing.assert_allclose(model(*inputs()).asnumpy(), both, atol=2e-6)


def test_words_behind_masks_and_the_order_of_segments_are_those_of_transformers(tmp_path):
    answers = {"qa_outputs.weight": np.zeros((2, 64), np.float32)}  # of another head
    model = loaded(open_checkpoint(make(tmp_path / "m", "bert_words", {**published("bert_words"), **answers})))
    logits, follows = model(*inputs())
    np.testing.assert_allclose(logits.asnumpy()[0, ::16, :8], HEADS["pretraining_logits"], atol=4e-6)
    np.testing.assert_allclose(follows.asnumpy(), HEADS["binary_logits"], atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bitwise_in_names_forms_and_model(tmp_path, name):
    there = make(tmp_path / "there", name, published(name))
    for word in ("vocab.json", "merges.txt"):
        (there / word).write_text(f"of {word}")
    native, back = str(tmp_path / "native"), tmp_path / "back"
    assert main(["--load", str(there), "--save", native, "--quiet"]) == 0
    assert main(["--to", "mindspore", "--load", native, "--save", str(back), "--quiet"]) == 0
    assert main(["--to", "mindspore", "--load", str(there), "--save", str(tmp_path / "again"), "--quiet"]) == 0
    assert (tmp_path / "again" / "merges.txt").read_text() == "of merges.txt"
    first, second = (read_ckpt(folder) for folder in (there / "model.ckpt", back / "mindspore_model.ckpt"))
    assert first.keys() == second.keys()
    for key, stored in first.items():
        assert (stored.shape, stored.dtype) == (second[key].shape, second[key].dtype), key
        np.testing.assert_array_equal(stored.blob().read(), second[key].blob().read(), err_msg=key)
    models = [open_checkpoint(folder).common["model_config"] for folder in (there, back)]
    assert models[0] == models[1]


def test_a_head_for_classes_comes_with_its_score(tmp_path):
    score = np.random.default_rng(2).normal(size=(3, 64)).astype(np.float32)
    folder = make(tmp_path / "m", "gpt2", {**published("gpt2"), "score.weight": score}, num_labels=3)
    text = (folder / "run.yaml").read_text().replace("GPT2LMHeadModel", "GPT2ForSequenceClassification")
    (folder / "run.yaml").write_text(text)
    source = open_checkpoint(folder)
    assert source.common["model_config"]["num_labels"] == 3
    np.testing.assert_array_equal(read_tensor(source, "score.weight"), score)
    assert main(["--to", "mindspore", "--load", str(folder), "--save", str(tmp_path / "back"), "--quiet"]) == 0
    again = open_checkpoint(tmp_path / "back")
    assert again.common["model_config"] == source.common["model_config"]
    np.testing.assert_array_equal(read_tensor(again, "score.weight"), score)


def test_slices_of_ranks_are_put_together(tmp_path):
    whole = published("gpt2")
    folder = make(tmp_path / "m", "gpt2")
    cut = {name for name in whole if name.endswith(("dense1.weight", "dense2.weight", "dense3.weight"))}
    cuts = ParallelStrategyMap(current_stage=0)
    for name in cut:
        item = cuts.parallel_layout_item.add()
        item.param_name = name
        item.parallel_layouts.dev_matrix.add().dim.append(2)
        item.parallel_layouts.tensor_map.add().dim.extend((0, -1))
        item.parallel_layouts.field = 0
        item.parallel_layouts.opt_weight_shard_step = item.parallel_layouts.opt_weight_shard_size = 0
    (folder / "strategy.ckpt").write_bytes(cuts.SerializeToString())
    for rank in range(2):
        mine = {name: np.split(array, 2)[rank] if name in cut else array for name, array in whole.items()}
        write(folder / f"rank_{rank}" / "gpt2.ckpt", {name: np.ascontiguousarray(part) for name, part in mine.items()})
    source, expected = open_checkpoint(folder), open_checkpoint(make(tmp_path / "one", "gpt2", whole))
    for key in expected.keys():  # noqa: SIM118 - a method of TensorSource
        np.testing.assert_array_equal(read_tensor(source, key), read_tensor(expected, key))


def with_adapters(name, tensors, modules, spelled, rank=2):
    """Adapters beside the weights, and the weights that they mean, by hand: W + 6 / 2 B A."""
    rng, beside, merged = np.random.default_rng(3), dict(tensors), dict(tensors)
    for module in modules:
        weight = tensors[f"{module}.weight"]
        a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((rank, weight.shape[1]), (len(weight), rank)))
        beside.update({f"{module}.{spelled}_a": a, f"{module}.{spelled}_b": b})
        merged[f"{module}.weight"] = (weight + 3 * (b.astype(np.float64) @ a)).astype(np.float32)
    return beside, merged


@pytest.mark.parametrize(
    ("name", "adapted", "layers", "spelled", "architecture"),
    [("gpt2", 1, "backbone.blocks.1.attention.dense1 backbone.blocks.1.attention.dense3", "mindpet_delta_lora",
      "GPT2WithLora"),
     ("llama", 3, "model.layers.0.attention.wq model.layers.2.attention.wv model.layers.2.feed_forward.w2",
      "tk_delta_lora", "LlamaForCausalLMWithLora")],
)  # fmt: skip
def test_adapters_beside_the_weights_are_added_to_them(tmp_path, name, adapted, layers, spelled, architecture):
    beside, merged = with_adapters(name, published(name), layers.split(), spelled)
    folder = make(tmp_path / "m", name, beside, pet_config={"pet_type": "lora", "lora_rank": 2, "lora_alpha": 6})
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text.replace(MODELS[name][1], architecture))
    source, expected = open_checkpoint(folder), open_checkpoint(make(tmp_path / "merged", name, merged))
    assert source.format == "mindformers, adapters added"  # which the first lines of a run say
    assert source.common == expected.common and source.keys() == expected.keys()
    plain, changed = open_checkpoint(make(tmp_path / "plain", name, published(name))), 0
    for key in expected.keys():  # noqa: SIM118 - a method of TensorSource
        wanted, whole = read_tensor(expected, key), read_tensor(source, key)
        np.testing.assert_allclose(whole, wanted, rtol=0, atol=4e-6)
        changed += not np.array_equal(whole, read_tensor(plain, key))
        if wanted.ndim == 2:  # a rectangle has the values that the whole has there
            part = np.empty((wanted.shape[0] // 2, 7), np.float32)
            source.read_into(key, [(5, 5 + len(part)), (3, 10)], part)
            np.testing.assert_allclose(part, whole[5 : 5 + len(part), 3:10], rtol=0, atol=4e-6)
    assert changed == adapted


# ---- what is wrong --------------------------------------------------------------------------------------------------
def told(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(find_checkpoint(folder))
    return str(error.value)


@pytest.mark.parametrize(
    ("pet", "change", "said"),
    [({}, {}, "must say their scale as model.model_config.pet_config.lora_alpha, a number (found None)"),
     ({"lora_alpha": "much"}, {}, "a number (found 'much')"),
     ({"lora_alpha": 6, "lora_rank": 4}, {}, "pet_config says lora_rank 4, the adapters have rank 2"),
     ({"lora_alpha": 6}, {"attention.dense1.mindpet_delta_lora_b": None}, "mindpet_delta_lora_a alone"),
     ({"lora_alpha": 6}, {"attention.dense1.mindpet_delta_lora_b": (64, 3)}, "is [2, 64] and [64, 3], which does not"),
     ({"lora_alpha": 6}, {"output.mapping.mindpet_delta_lora_a": (2, 64)}, "1 factors of adapters on layers that have"),
     ({"lora_alpha": 6}, {"attention.dense9.mindpet_delta_lora_a": (2, 64)}, "attention.dense9.mindpet_delta_lora_a")],
)  # fmt: skip
def test_adapters_that_cannot_be_added_are_named_and_not_left_out(tmp_path, pet, change, said):
    tensors, _ = with_adapters("gpt2", published("gpt2"), ["backbone.blocks.0.attention.dense1"], "mindpet_delta_lora")
    for name, shape in change.items():
        tensors.pop(f"backbone.blocks.0.{name}", None)
        if shape:
            tensors[f"backbone.blocks.0.{name}"] = np.zeros(shape, np.float32)
    assert said in told(make(tmp_path / "m", "gpt2", tensors, pet_config=pet))


def test_missing_weights_are_an_error_that_names_them_and_never_first_values(tmp_path):
    tensors = published("gpt2")
    del tensors["backbone.blocks.2.output.mapping.weight"]
    found = told(make(tmp_path / "m", "gpt2", tensors))
    assert str(tmp_path / "m") in found and "backbone.blocks.2.output.mapping.weight is in no file" in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 10**9}, "says 1000000000 layers"),
        ({"num_heads": 3}, "hidden_size=64 is not a multiple of num_heads=3"),
        ({"hidden_size": 10**12, "num_heads": 10**12}, "the longest stored dim is 320"),
        ({"vocab_size": 300}, "word_embedding.embedding_table has shape [320, 64] instead of [300, 64]"),
        ({"hidden_size": [1]}, "hidden_size=[1]: give a whole number above zero"),
        ({"n_kv_heads": 10**30}, "says num_query_groups 10000000000000000000000"),
        ({"n_kv_heads": 3}, "says 3 key heads, of which 4 heads are no multiple"),
        ({"ffn_dim_multiplier": float("nan")}, "ffn_dim_multiplier=nan: give a number"),
    ],
)
def test_a_yaml_of_another_model_is_refused_before_anything_is_laid_out(tmp_path, changes, said):
    name = "llama" if "n_kv_heads" in changes or "ffn_dim_multiplier" in changes else "gpt2"
    assert said in told(make(tmp_path / "m", name, published(name), **changes))


def test_two_descriptions_are_named(tmp_path):
    folder = make(tmp_path / "m", "gpt2", published("gpt2"))
    (folder / "other.yaml").write_text((folder / "run.yaml").read_text())
    assert "other.yaml, run.yaml each say what model it is" in told(folder)


class Trap:
    def __reduce__(self):
        return (Path("trapped").write_text, ("it ran",))


def test_nothing_of_a_file_is_executed_neither_of_the_weights_nor_of_the_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / "m", "gpt2")
    (folder / "model.ckpt").write_bytes(pickle.dumps(Trap()))
    assert "is no MindSpore .ckpt file" in told(folder)
    (folder / "run.yaml").write_text("model: {model_config: {type: !!python/object/apply:os.system [touch trapped]}}")
    told(folder)
    assert not (tmp_path / "trapped").exists()


def test_what_mindformers_has_no_keyword_for_is_not_written(tmp_path, capsys):
    config = json.loads((GOLDEN / "configs" / "gpt2.json").read_text())
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "scale_attn_by_inverse_layer_idx": True}))
    (folder / "model.safetensors").write_bytes((GOLDEN / "weights" / "gpt2.safetensors").read_bytes())
    assert main(["--to", "mindspore", "--load", str(folder), "--save", str(tmp_path / "mf"), "--quiet"]) == 2
    assert "scale_attn_by_inverse_layer_idx=True, False in GPT2Config" in capsys.readouterr().err
    assert not (tmp_path / "mf").exists()


def test_texts_are_continued_with_the_tokenizer_beside_the_weights(tmp_path):
    folder = make(tmp_path / "m", "gpt2", published("gpt2"))
    described = describe(str(folder), None)
    assert described.tokenizer is None and "knows of no tokenizer" in described.why_no_tokenizer
    assert described.longest == 256
