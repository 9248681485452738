"""The guide's programs with a Trainer: another import, sizes reduced, directories in place of downloads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from mindspore.mindrecord import FileWriter

from parallel_core.api import (
    GPT2Config,
    GPT2LMHeadModel,
    MicroBatchInterleaved,
    PanguAlphaConfig,
    PanguAlphaHeadModel,
    Trainer,
    TrainingArguments,
)
from parallel_core.errors import ConfigError
from tests.unit.api.test_trainer import GPT2, SMALL

BPE = Path(__file__).resolve().parents[2] / "golden" / "data" / "bpe"
_HEAD = """
import numpy as np
from mindspore.dataset import GeneratorDataset
from parallel_core.api import *


def context_init(use_parallel=False, optimizer_parallel=False):
    context_config = ContextConfig(mode=0, device_target="Ascend", device_id=0)
    parallel_config = None
    if use_parallel:
        parallel_config = ParallelContextConfig(parallel_mode='SEMI_AUTO_PARALLEL', gradients_mean=False,
                                                enable_parallel_optimizer=optimizer_parallel, full_batch=True)
    rank_id, device_num = init_context(use_parallel=use_parallel, context_config=context_config,
                                       parallel_config=parallel_config)


def generator():
    seq_len = 17
    input_ids = np.random.randint(low=0, high=15, size=(seq_len,)).astype(np.int32)
    for _ in range(16):
        yield input_ids


context_init()
training_args = TrainingArguments(num_train_epochs=1, batch_size=2, learning_rate=0.001, warmup_steps=1,
                                  sink_mode=True)
dataset = GeneratorDataset(generator, column_names=["input_ids"])
train_dataset = dataset.batch(batch_size=4)
eval_dataset = dataset.batch(batch_size=4)
"""
_LLAMA = "num_heads=4, hidden_size=32, vocab_size=64, seq_length=16, multiple_of=32"
PROGRAMS = {
    "a task by names": """
text_generation = Trainer(task='text_generation', model='gpt2', args=training_args, train_dataset='./train',
                          eval_dataset='./eval')
text_generation.train()
found = text_generation.evaluate()
assert found["PPL"] > 1
""",
    "a model of a directory, data of one's own": """
pangu_model = AutoModel.from_pretrained("pangualpha_2_6b")
text_generation = Trainer(task='text_generation', model=pangu_model, args=training_args, train_dataset=train_dataset,
                          eval_dataset=eval_dataset)
before = text_generation.evaluate()["loss"]
text_generation.train()
assert text_generation.evaluate()["loss"] < before
""",
    "recomputation": f"""
llama_config = LlamaConfig(batch_size=1, num_layers=2, {_LLAMA})
llama_model = LlamaForCausalLM(llama_config)
text_generation = Trainer(task='text_generation', model=llama_model, train_dataset=train_dataset)
text_generation.set_recompute_config(recompute=True, select_recompute=False)
text_generation.set_recompute_config(recompute=False, select_recompute=True)
text_generation.train()
""",
    "copies of a batch": """
pangu_config = PanguAlphaConfig(hidden_size=32, ffn_hidden_size=32 * 4, num_layers=2, num_heads=4, seq_length=16,
                                vocab_size=64, checkpoint_name_or_path='')
pangu_model = PanguAlphaHeadModel(pangu_config)
text_generation = Trainer(task='text_generation', model=pangu_model, model_name='pangualpha_2_6b',
                          args=training_args, train_dataset=train_dataset, eval_dataset=eval_dataset)
text_generation.set_parallel_config(data_parallel=1, model_parallel=1, pipeline_stage=1, micro_batch_num=2,
                                    micro_batch_interleave_num=2)
text_generation.train()
""",
    "a sequence cut": f"""
training_args = TrainingArguments(num_train_epochs=1, batch_size=1, learning_rate=0.001, warmup_steps=100,
                                  sink_mode=True, sink_size=2)
llama_model = LlamaForCausalLM(LlamaConfig(batch_size=1, num_layers=2, {_LLAMA}))
task = Trainer(task='text_generation', model=llama_model, args=training_args, train_dataset=train_dataset)
task.set_parallel_config(data_parallel=1, model_parallel=1, pipeline_stage=1, use_seq_parallel=True,
                         micro_batch_num=1)
task.train()
""",
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE_TARGET", "CPU")


def records(folder: Path, length: int) -> None:
    folder.mkdir()
    writer = FileWriter(str(folder / "rows.mindrecord"), 1)
    writer.add_schema({"input_ids": {"type": "int32", "shape": [-1]}}, "lm-schema")
    writer.write_raw_data([{"input_ids": np.arange(length, dtype=np.int32) + n} for n in range(8)])
    writer.commit()


def steps() -> list[dict]:
    return [json.loads(line) for line in Path("output/log/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if "by names" in name else [])
                                  for name in PROGRAMS])  # MindRecord files are read by a process of their own
def test_the_guides_program_trains(name, tmp_path):
    if name.startswith("a task"):
        GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained("gpt2")
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(BPE / file, "gpt2")
        records(tmp_path / "train", 17)
        records(tmp_path / "eval", 16)  # blocks for the evaluation have one id less
    if name.startswith("a model"):
        PanguAlphaHeadModel(PanguAlphaConfig(**SMALL)).save_pretrained("pangualpha_2_6b")
    exec(compile(_HEAD + PROGRAMS[name], name, "exec"), {})
    rows = steps()
    count = {"a sequence cut": 16, "copies of a batch": 2, "a task by names": 4, "recomputation": 16}.get(name, 8)
    assert len(rows) == count and all(np.isfinite(row["loss"]) for row in rows)


def test_copies_have_the_loss_of_the_whole_where_samples_differ_in_length():
    """batch_size is of a copy; what is logged is the mean over the tokens of all, not a sum or a mean of two means."""
    rows = [np.arange(17, dtype=np.int32) + n for n in range(8)]
    seen = [np.r_[np.ones(5 + 3 * (n % 4), np.int32), np.zeros(12 - 3 * (n % 4), np.int32)] for n in range(8)]
    data = [{"input_ids": row, "attention_mask": mask} for row, mask in zip(rows, seen)]
    losses = []
    for batch_size, copies in ((4, 1), (2, 2), (1, 4)):
        args = TrainingArguments(batch_size=batch_size, learning_rate=0.01, output_dir=f"out_{copies}")
        trainer = Trainer(args, "text_generation", GPT2Config(**GPT2), train_dataset=data)
        trainer.set_parallel_config(micro_batch_interleave_num=copies)
        trainer.train()
        lines = Path(f"out_{copies}/log/metrics.jsonl").read_text().splitlines()
        losses.append([(json.loads(line)["loss"], json.loads(line)["grad_norm"]) for line in lines])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=2e-5)
    assert len(losses[0]) == 2


def test_interleaved_micro_batches_give_the_mean_of_their_parts_and_no_sum():
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    ids = Tensor(np.random.default_rng(0).integers(0, 600, (4, 16)).astype(np.int32))

    class WithLoss(type(model)):
        def construct(self, x):
            return super().construct(x, None, x)

    whole = WithLoss(model.config)
    np.testing.assert_allclose(MicroBatchInterleaved(whole, 2)(ids).asnumpy(), whole(ids).asnumpy(), rtol=1e-6)
    with pytest.raises(ConfigError, match="are not 3 parts"):
        MicroBatchInterleaved(whole, 3)(ids)
    with pytest.raises(ConfigError, match="interleave_num=0"):
        MicroBatchInterleaved(whole, 0)
