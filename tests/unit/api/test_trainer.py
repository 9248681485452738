"""The guide's Trainer: data of MindSpore, given models, what it trains is what it says and evaluates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mindspore.dataset import GeneratorDataset

from parallel_core.api import (
    AutoModel,
    BertConfig,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PanguAlphaConfig,
    PanguAlphaHeadModel,
    Trainer,
    TrainingArguments,
)
from parallel_core.errors import ConfigError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "seq_length": 16, "vocab_size": 600,
         "hidden_dropout_rate": 0.0, "attention_dropout_rate": 0.0}  # fmt: skip
GPT2 = {**SMALL, "embedding_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE_TARGET", "CPU")


def generator():
    """text dataset generator."""
    rng = np.random.default_rng(0)
    for _ in range(24):
        yield np.arange(17, dtype=np.int32) + rng.integers(0, 15)


def datasets():
    dataset = GeneratorDataset(generator, column_names=["input_ids"])
    return dataset.batch(batch_size=4), dataset.batch(batch_size=4)


def test_the_guides_program_of_a_model_and_data_of_ones_own():
    """Sizes reduced; what follows `Trainer(...)` there is `train()`."""
    training_args = TrainingArguments(num_train_epochs=3, batch_size=2, learning_rate=0.01, warmup_steps=2,
                                      sink_mode=True)  # fmt: skip
    pangu_config = PanguAlphaConfig(ffn_hidden_size=32 * 4, checkpoint_name_or_path='', **SMALL)
    pangu_model = PanguAlphaHeadModel(pangu_config)
    train_dataset, eval_dataset = datasets()
    text_generation = Trainer(task='text_generation', model=pangu_model, args=training_args,
                              train_dataset=train_dataset, eval_dataset=eval_dataset)  # fmt: skip
    text_generation.set_parallel_config(data_parallel=1, model_parallel=1, pipeline_stage=1, micro_batch_num=2)
    text_generation.set_recompute_config(recompute=True)
    before = text_generation.evaluate()
    weights = {name: p.asnumpy().copy() for name, p in pangu_model.parameters_and_names()}
    text_generation.train()
    rows = [json.loads(line) for line in Path("output/log/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 18 and rows[-1]["lr"] < rows[2]["lr"]
    # Training begins with the model's own weights, and the model has the trained ones afterwards.
    np.testing.assert_allclose(rows[0]["loss"], before["loss"], rtol=0.05)
    after = text_generation.evaluate()
    assert after["loss"] < 0.7 * before["loss"] and after["PPL"] == pytest.approx(np.exp(after["loss"]))
    assert any(not np.array_equal(weights[name], p.asnumpy()) for name, p in pangu_model.parameters_and_names())
    again = Trainer(task="text_generation", model="output/checkpoint", eval_dataset=eval_dataset)
    assert again.evaluate()["loss"] == pytest.approx(after["loss"], rel=1e-6)


def test_a_directory_is_finetuned_and_goes_on(capsys):
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained("gpt2")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "data" / "bpe" / name, "gpt2")
    arguments = TrainingArguments(num_train_epochs=1, batch_size=4, learning_rate=0.01, output_dir="out", save_steps=3)
    rows = [np.arange(17) + n % 7 for n in range(24)]
    trainer = Trainer(task="text_generation", model="gpt2", args=arguments, train_dataset=rows, eval_dataset=rows,
                      tokenizer=GPT2Tokenizer.from_pretrained("gpt2"))  # fmt: skip
    first = trainer.evaluate()["loss"]
    trainer.finetune()
    second = trainer.evaluate()["loss"]
    assert second < first and "PerplexityMetric = {'loss'" in capsys.readouterr().out
    (text,) = trainer.predict(input_data="hello", do_sample=False, max_new_tokens=3)
    assert text["text_generation_text"][0].startswith("hello")
    twice = TrainingArguments(num_train_epochs=2, batch_size=4, learning_rate=0.01, output_dir="out")
    longer = Trainer(task="text_generation", model="gpt2", train_dataset=rows, args=twice)
    longer.train(train_checkpoint="out/checkpoint")
    lines = [json.loads(line) for line in Path("out/log/metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in lines][-6:] == [7, 8, 9, 10, 11, 12]
    assert AutoModel.from_pretrained("out/checkpoint").config.num_layers == 2


def test_answers_are_trained_evaluated_and_given(capsys):
    shutil.copy(GOLDEN / "squad" / "made_up.json", "train-v1.1.json")
    shutil.copy(GOLDEN / "squad" / "made_up.json", "dev-v1.1.json")
    shutil.copy(GOLDEN / "squad" / "vocab.txt", "vocab.txt")
    sizes = {**SMALL, "vocab_size": 461, "seq_length": 64, "intermediate_size": 64}
    config = BertConfig(head="question_answering", **sizes)
    words, arguments = BertTokenizer.from_pretrained("."), TrainingArguments(batch_size=8, learning_rate=1e-3)
    window = {"seq_length": 64, "doc_stride": 24, "max_query_length": 10}
    trainer = Trainer(task="question_answering", model=config, train_dataset=".", eval_dataset=".", args=arguments,
                      tokenizer=words, window=window)  # fmt: skip
    with pytest.raises(ConfigError, match="there are no weights; train first"):
        trainer.evaluate()
    trainer.train()
    scores = trainer.evaluate()
    assert set(scores) == {"exact_match", "f1"}
    assert "QA Metric = {'QA Metric': {'exact_match'" in capsys.readouterr().out
    (answer,) = trainer.predict(input_data="A night train leaves at 23:40. - When does it leave?")
    assert set(answer) == {"text", "score", "start", "end"}


def test_what_cannot_be_is_told():
    rows = [np.arange(17)] * 4
    config = GPT2Config(**GPT2)
    for make, told in (
        (lambda: Trainer(task="translation", model=config), "task='translation'"),
        (lambda: Trainer(task="text_generation", model=config).train(), "give train_dataset"),
        (lambda: Trainer(task="text_generation", model=config).evaluate(), "give eval_dataset"),
        (lambda: Trainer(task="text_generation", model=config).finetune(), "no weights to train from"),
        (lambda: Trainer(task="text_generation", model=config, train_dataset=[np.arange(9)]).train(), r"rows of \[9\]"),
        (lambda: Trainer(task="question_answering", model=config), "needs a WordPiece tokenizer"),
        (lambda: Trainer(task="text_generation", model=config, pet_method="lora"), "pet_method='lora': not built: ada"),
        (lambda: Trainer(task="text_generation", model=config, callbacks=[print]), "callbacks=.*: not built: a step's"),
        (lambda: TrainingArguments(lr_scheduler_type="staircase"), "staircase"),
        (lambda: TrainingArguments(batch_size=0), "batch_size=0"),
        (lambda: Trainer(task="text_generation", model=config).set_recompute_config(True, True), "give one"),
    ):
        with pytest.raises(ConfigError, match=told):
            make()
    with pytest.raises(TypeError, match="no argument 'modle'"):
        Trainer(modle=config)
    trainer = Trainer(task="text_generation", model=config, train_dataset=rows, pet_method="", callbacks=None)
    trainer.set_parallel_config(data_parallel=4, model_parallel=2, pipeline_stage=2, micro_batch_num=2)
    with pytest.raises(ConfigError, match="is not the number of ranks, 1"):
        trainer.train()
    huge = Trainer(task="text_generation", model=config, train_dataset=rows, args=TrainingArguments(batch_size=64))
    with pytest.raises(ConfigError, match="make no batch of 64"):
        huge.train()
