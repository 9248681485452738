"""Classes of whole texts: transformers' numbers, files both ways, data of several forms, training from each door."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.mindrecord import FileWriter
from safetensors.numpy import load_file

import pretrain_gpt
from parallel_core.api import (
    AutoModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from parallel_core.config.load import load_config
from parallel_core.convert.cli import main as convert
from parallel_core.data.classified import Classified, ClassifiedDataset, label_names, read_classified
from parallel_core.errors import CheckpointError, ConfigError, DataError
from parallel_core.launch.report import LOG_DIR_VARIABLE
from parallel_core.training.classification import class_losses

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "hf" / "classes"
VALUES = np.load(GOLDEN / "computed.npz")
BPE = ROOT / "tests" / "golden" / "data" / "bpe"
SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "seq_length": 16, "vocab_size": 600,
         "hidden_dropout_rate": 0.0, "attention_dropout_rate": 0.0, "embedding_dropout_prob": 0.0}  # fmt: skip
TABLE = "sentence\tlabel\n" + "".join(f"a {word} film number {n}\t{mark}\n" for n in range(8)
                                      for word, mark in (("good", 1), ("bad", 0)))  # fmt: skip


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE_TARGET", "CPU")


def test_scores_loss_and_gradient_are_those_of_transformers():
    model = AutoModel.from_pretrained(GOLDEN)
    assert type(model) is GPT2ForSequenceClassification and model.network.config.num_labels == 3
    ids, labels = Tensor(VALUES["ids"]), Tensor(VALUES["labels"])
    seen = (np.arange(VALUES["ids"].shape[1]) < VALUES["lengths"][:, None]).astype(np.int32)
    np.testing.assert_allclose(model(ids, Tensor(seen)).asnumpy(), VALUES["logits"], atol=1e-5)
    lengths = Tensor(VALUES["lengths"])

    class Loss(nn.Cell):
        def construct(self, tokens):
            return class_losses(model.network(tokens, lengths), labels).mean()

    parameters = ms.ParameterTuple(model.network.trainable_params())
    loss, gradients = ms.value_and_grad(Loss(), None, parameters)(ids)
    norm = sum(float((g.asnumpy().astype(np.float64) ** 2).sum()) for g in gradients) ** 0.5
    np.testing.assert_allclose(loss.asnumpy(), VALUES["loss"], rtol=1e-5)
    np.testing.assert_allclose(norm, VALUES["grad_norm"], rtol=1e-5)


def test_padding_after_the_last_token_says_nothing():
    model = AutoModel.from_pretrained(GOLDEN)
    ids = VALUES["ids"].copy()
    seen = Tensor((np.arange(ids.shape[1]) < VALUES["lengths"][:, None]).astype(np.int32))
    before = model(Tensor(ids), seen).asnumpy()
    ids[1, 3:] = 7
    np.testing.assert_array_equal(model(Tensor(ids), seen).asnumpy(), before)
    with pytest.raises(ConfigError, match="padding must be on the right"):
        model(Tensor(ids), Tensor(seen.asnumpy()[:, ::-1].copy()))


def test_files_go_through_native_form_and_back_to_the_bit(tmp_path):
    assert convert(["--load", str(GOLDEN), "--save", "native", "--quiet"]) == 0
    assert convert(["--to", "hf", "--load", "native", "--save", "back", "--quiet"]) == 0
    there, back = load_file(GOLDEN / "model.safetensors"), load_file("back/model.safetensors")
    assert there.keys() == back.keys() and all(np.array_equal(there[name], back[name]) for name in there)
    config = json.loads(Path("back/config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"] and len(config["id2label"]) == 3


def test_other_models_have_no_such_head(tmp_path):
    shutil.copytree(GOLDEN, "other")
    config = json.loads((GOLDEN / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(CheckpointError, match="score.weight"):
        AutoModel.from_pretrained("other")
    with pytest.raises(ConfigError, match="has no head for texts"):
        pipeline("text_classification", GPT2LMHeadModel(GPT2Config(**SMALL)), words("."))


# ---- data ------------------------------------------------------------------------------------------------------------
FORMS = {
    "sst.tsv": ("sentence\tlabel\nfine , really\t1\nbad\t0\n", [("fine , really", "1"), ("bad", "0")]),
    "cola.tsv": ("gj04\t1\t\tSailors rode.\ngj04\t0\t*\tRode the.\n", [("Sailors rode.", "1"), ("Rode the.", "0")]),
    "ag.csv": ('"3","Oil, up","It rose."\n"1","Peace","Talks"\n', [("Oil, up It rose.", "2"), ("Peace Talks", "0")]),
    "more.csv": ('label,text\nneg,"no, no"\npos,yes\n', [("no, no", "neg"), ("yes", "pos")]),
    "m.jsonl": ('{"text": "\u597d", "label": 1}\n\n{"sentence": "no", "label": 0}\n', [("\u597d", "1"), ("no", "0")]),
}


@pytest.mark.parametrize("name", FORMS)
def test_texts_with_classes_are_read_in_the_forms_of_their_publishers(name):
    text, wanted = FORMS[name]
    Path(name).write_text(text, encoding="utf-8")
    assert [(one.text, one.label) for one in read_classified(name)] == wanted


def test_a_folder_for_each_class_and_what_is_no_table(tmp_path):
    for label in ("pos", "neg"):
        (tmp_path / "imdb" / label).mkdir(parents=True)
        (tmp_path / "imdb" / label / "0_9.txt").write_text(f"{label} text\n")
    assert read_classified("imdb") == [Classified("neg text", "neg"), Classified("pos text", "pos")]
    assert label_names([Classified("", "10"), Classified("", "9")]) == ["9", "10"]
    for name, text in (("a.tsv", "one\ttwo\n"), ("b.jsonl", '{"text": "x"}\n'), ("c.tsv", "sentence\tlabel\n")):
        Path(name).write_text(text)
        with pytest.raises(DataError, match=name):
            read_classified(name)


def test_long_texts_are_cut_and_every_epoch_has_each_once():
    data = ClassifiedDataset([([1, 2, 3, 4, 5], 1), ([], 0)], 4, 4, 9, 0)
    rows = [data[i] for i in range(4)]
    for epoch in (rows[:2], rows[2:]):
        found = {int(row["label"]): (row["tokens"].tolist(), int(row["lengths"])) for row in epoch}
        assert found == {1: ([1, 2, 3, 4], 4), 0: ([9, 9, 9, 9], 1)}
    with pytest.raises(IndexError):
        data[4]


# ---- training --------------------------------------------------------------------------------------------------------
def words(folder: str) -> GPT2Tokenizer:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(BPE / name, folder)
    return GPT2Tokenizer.from_pretrained(folder)


def test_a_language_model_is_finetuned_by_the_trainer_and_says_classes(capsys):
    GPT2LMHeadModel(GPT2Config(**SMALL)).save_pretrained("gpt2")
    words("gpt2")
    Path("train.tsv").write_text(TABLE)
    args = TrainingArguments(num_train_epochs=6, batch_size=8, learning_rate=1e-2)
    trainer = Trainer(args, "text_classification", "gpt2", train_dataset="train.tsv", eval_dataset="train.tsv")
    trainer.finetune()
    assert trainer.evaluate() == {"Acc": 1.0} and "Accuracy = {'Acc': 1.0}" in capsys.readouterr().out
    ((found,),) = trainer.predict(input_data="a good film number 3")
    assert found["label"] == "LABEL_1" and found["score"] > 0.5
    model = AutoModel.from_pretrained("output/checkpoint")
    named = pipeline("text_classification", model, words("."), labels=["bad", "good"], top_k=None)
    assert [one["label"] for one in named("a bad film number 3")[0]] == ["bad", "good"]
    rows = [json.loads(line) for line in Path("output/log/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["accuracy"] == 1.0


def test_the_program_trains_classes_and_evaluates_them(tmp_path, monkeypatch):
    tokenizer = words(".")
    Path("train.tsv").write_text(TABLE)
    monkeypatch.setenv(LOG_DIR_VARIABLE, str(tmp_path / "log"))
    argv = """
        --num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --micro-batch-size 8 --train-iters 12
        --lr 1e-2 --num-labels 2 --train-data-path train.tsv --valid-data-path train.tsv --tokenizer-type
        GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --eval-iters 2 --eval-interval 12
        --log-interval 1 --hidden-dropout 0 --attention-dropout 0 --num-workers 0 --lr-decay-style constant --save ck
    """.split()
    with mock.patch.object(sys, "argv", ["pretrain_gpt.py", *argv]):
        pretrain_gpt.main()
    rows = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = [row for row in rows if "split" not in row], [row for row in rows if "split" in row]
    right = [row for row in evaluations if row["name"] == "accuracy"]
    assert steps[0]["class loss"] > 0.4 and right[-1]["loss"] > 0.9 and "ppl" not in right[-1]
    assert AutoModel.from_pretrained("ck").network.config.num_labels == 2 and tokenizer.vocab_size
    more = [*argv[:-1], "ck3", "--num-labels", "3", "--load", "ck"]
    with mock.patch.object(sys, "argv", ["pretrain_gpt.py", *more]), pytest.raises(CheckpointError, match="num_labels"):
        pretrain_gpt.main()
    with mock.patch.object(sys, "argv", ["pretrain_gpt.py", *more, "--finetune"]):  # another head begins anew
        pretrain_gpt.main()
    assert AutoModel.from_pretrained("ck3").network.config.num_labels == 3


YAML = """
# \u6587\u672c\u5206\u7c7b
run_mode: train
output_dir: ./out
runner_config: {epochs: 4, batch_size: 8, sink_mode: True}
trainer: {type: TextClassificationTrainer, model_name: gpt2_txtcls}
train_dataset:
  data_loader: {type: MindDataset, dataset_dir: ./records, shuffle: True}
  input_columns: [input_ids, attention_mask, labels]
model:
  model_config: {type: GPT2Config, num_labels: 3, seq_length: 8, vocab_size: 32, hidden_size: 16, num_layers: 1,
                 num_heads: 2, hidden_dropout_rate: 0.0, attention_dropout_rate: 0.0, embedding_dropout_prob: 0.0}
  arch: {type: GPT2ForSequenceClassification}
lr_schedule: {type: polynomial, learning_rate: 0.02, lr_end: 0.0, warmup_steps: 0}
"""


def test_a_txtcls_yaml_of_mindformers_has_the_head_of_its_arch():
    Path("run_gpt2_txtcls.yaml").write_text(YAML, encoding="utf-8")
    loaded = load_config(["--config", "run_gpt2_txtcls.yaml", "--train-iters", "3"])
    assert loaded.config.model_config.num_labels == 3 and loaded.config.dataset_config.data_path == ("./records",)
    Path("lm.yaml").write_text(YAML.replace("GPT2ForSequenceClassification", "GPT2LMHeadModel"), encoding="utf-8")
    assert not load_config(["--config", "lm.yaml", "--train-iters", "3"]).config.model_config.num_labels


@pytest.mark.slow
def test_a_txtcls_yaml_trains_on_its_records(tmp_path, monkeypatch):
    Path("run_gpt2_txtcls.yaml").write_text(YAML, encoding="utf-8")
    (tmp_path / "records").mkdir()
    writer = FileWriter(str(tmp_path / "records" / "train.mindrecord"), 1)
    columns = ("input_ids", "attention_mask", "labels")
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in columns}, "classes")
    for n in range(24):
        ids = np.r_[np.full(3 + n % 4, 5 + n % 3), np.full(5 - n % 4, 31)]
        seen, label = (np.arange(8) < 3 + n % 4), np.array([n % 3])
        writer.write_raw_data([dict(zip(columns, (part.astype(np.int32) for part in (ids, seen, label))))])
    writer.commit()
    monkeypatch.setenv(LOG_DIR_VARIABLE, str(tmp_path / "log"))
    words = ["pretrain_gpt.py", "--config", "run_gpt2_txtcls.yaml", "--log-interval", "1", "--num-workers", "0"]
    with mock.patch.object(sys, "argv", words):
        pretrain_gpt.main()
    rows = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rows[-1]["accuracy"] == 1.0
