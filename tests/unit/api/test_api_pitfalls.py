"""What goes wrong in MindFormers, by what its fixes and its source say; each test's name says the situation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from parallel_core.api import (
    BertConfig,
    BertForQuestionAnswering,
    BertTokenizer,
    ContextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    ParallelContextConfig,
    Trainer,
    TrainingArguments,
    init_context,
)
from parallel_core.api.trainer import perplexities
from parallel_core.config.load import load_config
from parallel_core.errors import CheckpointError, ConfigError
from tests.unit.api.test_trainer import GPT2

SQUAD = Path(__file__).resolve().parents[2] / "golden" / "squad"
ROWS = [np.arange(17) + n % 7 for n in range(12)]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE_TARGET", "CPU")


def test_a_dataset_is_read_once_in_a_training():
    class Counted:
        times = 0

        def __iter__(self):
            Counted.times += 1
            return iter(ROWS)

    Trainer(TrainingArguments(num_train_epochs=3, batch_size=4), "text_generation", GPT2Config(**GPT2),
            train_dataset=Counted()).train()  # fmt: skip
    assert Counted.times == 1


def test_saying_a_layout_does_not_make_a_given_model_anew():
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    before = [p.asnumpy().copy() for p in model.get_parameters()]
    trainer = Trainer(task="text_generation", model=model, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.set_parallel_config(model_parallel=2, micro_batch_num=2)
    trainer.set_recompute_config(recompute=True)
    assert all(np.array_equal(a, p.asnumpy()) for a, p in zip(before, model.get_parameters()))
    with pytest.raises(ConfigError, match="the model that is given has its layers"):
        trainer.set_moe_config(expert_num=4)


def test_training_begins_with_the_weights_that_a_given_model_has_and_not_with_first_values():
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    table = model.network.embedding.word_embeddings.weight
    table.set_data(table * 0)  # so every word is as likely as any other
    Trainer(TrainingArguments(batch_size=12), "text_generation", model, train_dataset=ROWS).train()
    row = json.loads(Path("output/log/metrics.jsonl").read_text().splitlines()[0])
    assert row["loss"] == pytest.approx(math.log(600), abs=1e-3)


def test_the_last_batch_counts_though_it_is_not_full_and_no_batch_weighs_more_than_its_tokens():
    """Five rows in batches of two, rows of several lengths: by hand."""
    sums = [(10.0, 5.0), (2.0, 1.0), (6.0, 6.0), (4.0, 2.0), (9.0, 3.0)]
    found = perplexities(sums, 2)
    assert found["loss"] == pytest.approx(31 / 17) and found["PPL"] == pytest.approx(math.exp(31 / 17))
    assert found["batch_loss"] == pytest.approx((12 / 6 + 10 / 8 + 9 / 3) / 3)
    trainer = Trainer(TrainingArguments(batch_size=2), "text_generation", GPT2LMHeadModel(GPT2Config(**GPT2)),
                      eval_dataset=[np.arange(n) for n in (5, 9, 17)])  # fmt: skip
    each = []
    for n in (5, 9, 17):
        trainer.eval_dataset = [np.arange(n)]
        each.append(trainer.evaluate()["loss"])
    trainer.eval_dataset = [np.arange(n) for n in (5, 9, 17)]
    assert trainer.evaluate()["loss"] == pytest.approx((4 * each[0] + 8 * each[1] + 16 * each[2]) / 28)


def test_dropout_of_the_configuration_is_off_in_evaluation_and_prediction():
    config = GPT2Config(**{**GPT2, "hidden_dropout_rate": 0.5, "attention_dropout_rate": 0.5,
                           "embedding_dropout_prob": 0.5})  # fmt: skip
    trainer = Trainer(task="text_generation", model=GPT2LMHeadModel(config), eval_dataset=ROWS)
    assert trainer.evaluate() == trainer.evaluate()


def test_the_largest_norm_of_gradients_that_is_asked_for_has_an_effect():
    losses = []
    for norm in (0.0, 1e-3):
        args = TrainingArguments(batch_size=4, learning_rate=0.1, max_grad_norm=norm, adam_epsilon=1.0,
                                 output_dir=f"o{norm}")  # fmt: skip
        Trainer(args, "text_generation", GPT2Config(**GPT2), train_dataset=ROWS).train()
        lines = Path(f"o{norm}/log/metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[-1])["loss"])
    assert losses[1] > losses[0]


def test_a_checkpoint_that_is_asked_for_and_not_there_is_told_by_its_folder():
    trainer = Trainer(task="text_generation", model=GPT2Config(**GPT2), train_dataset=ROWS, eval_dataset=ROWS)
    for call in (lambda: trainer.finetune("gpt2_small"), lambda: trainer.evaluate(eval_checkpoint="gpt2_small"),
                 lambda: trainer.train(resume_or_finetune_from_checkpoint="gpt2_small", do_finetune=True)):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"checkpoint_download/gpt2/gpt2_small is a folder"):
            call()
    for call in (lambda: trainer.evaluate(eval_checkpoint=True), lambda: trainer.train(train_checkpoint=True)):
        with pytest.raises(ConfigError, match="newest checkpoint in .*output/checkpoint, and there is none"):
            call()


def test_the_older_calls_of_question_answering_finetune_evaluate_and_answer_what_is_asked(capsys):
    """A name that is a folder here; the answer is to the given text, whatever example a source may have inside."""
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        Path("squad").mkdir(exist_ok=True)
        shutil.copy(SQUAD / "made_up.json", Path("squad") / name)
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "seq_length": 64, "vocab_size": 461,
             "intermediate_size": 64}  # fmt: skip
    BertForQuestionAnswering(BertConfig(head="question_answering", **sizes)).save_pretrained("qa_bert_base_uncased")
    shutil.copy(SQUAD / "vocab.txt", "qa_bert_base_uncased")
    window = {"seq_length": 64, "doc_stride": 24, "max_query_length": 10}
    trainer = Trainer(task="question_answering", model="qa_bert_base_uncased", train_dataset="./squad/",
                      eval_dataset="./squad/", window=window, args=TrainingArguments(batch_size=12))  # fmt: skip
    assert isinstance(trainer.tokenizer, BertTokenizer)
    trainer.train(resume_or_finetune_from_checkpoint="qa_bert_base_uncased", do_finetune=True)
    scores = trainer.evaluate(eval_checkpoint=True)
    assert f"QA Metric = {{'QA Metric': {scores}}}" in capsys.readouterr().out
    text = "A night train leaves at 23:40 - from the north - When does it leave?"
    (answer,) = trainer.predict(predict_checkpoint=True, input_data=text)
    context = "A night train leaves at 23:40 - from the north"
    assert answer["text"] == context[answer["start"] : answer["end"]]
    with pytest.raises(ConfigError, match="nothing to predict on"):
        trainer.predict(predict_checkpoint=True)
    assert not Path("squad_temp").exists()


def test_a_model_of_experts_by_the_trainer_has_their_balancing_loss():
    trainer = Trainer(TrainingArguments(batch_size=4), "text_generation", GPT2Config(**GPT2), train_dataset=ROWS)
    trainer.set_moe_config(expert_num=4, num_experts_chosen=2, aux_loss_factor=0.05)
    trainer.train()
    rows = [json.loads(line) for line in Path("output/log/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["load_balancing_loss"] > 0


def test_a_key_of_a_yaml_that_a_trainer_does_not_read_is_told_and_no_weights_are_passed_over():
    text = "trainer: {type: CausalLanguageModelingTrainer}\nmodel: {model_config: {type: GPT2Config, num_layers: 1}}\n"
    for more, told in (
        ("optimiser: {beta1: 0.9}\n", "optimiser: not read by a Trainer"),
        ("runner_config: {epoch: 2}\n", r"runner_config\.epoch: not read"),
        ("parallel_config: {tensor_parallel: 2}\n", "tensor_parallel"),
    ):
        Path("run.yaml").write_text(text + more)
        with pytest.raises(ConfigError, match=told):
            Trainer(args="run.yaml")
    Path("run.yaml").write_text(text + "load_checkpoint: ./gpt2_weights\ncontext: {mode: 0}\n")
    with pytest.raises(CheckpointError, match="gpt2_weights is a folder"):
        Trainer(args="run.yaml")


def test_an_optimizer_that_is_shared_by_the_context_is_shared_in_the_trainers_run():
    init_context(True, ContextConfig(mode=0, save_graphs=False), ParallelContextConfig(enable_parallel_optimizer=True))
    try:
        Trainer(TrainingArguments(batch_size=4), "text_generation", GPT2Config(**GPT2), train_dataset=ROWS).train()
    finally:
        init_context()
    assert load_config(["--config", "output/trainer_0.yaml"]).config.training_config.use_distributed_optimizer
