"""The guide's programs for several ranks, sizes reduced: `guide_on_ranks.py LAYOUT OUTPUT_DIR`.

It has a model object and random data, and prints what it found as JSON on rank 0.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from mindspore.dataset import GeneratorDataset

from parallel_core.api import (
    ContextConfig,
    PanguAlphaConfig,
    PanguAlphaHeadModel,
    ParallelContextConfig,
    Trainer,
    TrainingArguments,
    init_context,
)
from parallel_core.launch.entry import run_as_rank

LAYOUTS = {
    "dp2": {"data_parallel": 2},
    "tp2": {"model_parallel": 2, "micro_batch_interleave_num": 2, "use_seq_parallel": True},
    "pp2": {"pipeline_stage": 2, "micro_batch_num": 2},
}


def generator():
    """Give rows that another rank would draw otherwise."""
    for _ in range(16):
        yield np.random.randint(low=0, high=15, size=(17,)).astype(np.int32)


def main() -> None:
    """Train a given model on the job's ranks, evaluate it, and find its weights again."""
    layout = sys.argv[1]
    parallel = ParallelContextConfig(parallel_mode="SEMI_AUTO_PARALLEL", gradients_mean=False, full_batch=True)
    rank, size = init_context(True, ContextConfig(mode=0, device_target="CPU"), parallel)
    np.random.seed(rank)
    arguments = TrainingArguments(num_train_epochs=2, batch_size=2, learning_rate=0.01, warmup_steps=2,
                                  output_dir=sys.argv[2])  # fmt: skip
    config = PanguAlphaConfig(hidden_size=32, ffn_hidden_size=128, num_layers=2, num_heads=4, seq_length=16,
                              vocab_size=64, checkpoint_name_or_path="")  # fmt: skip
    model = PanguAlphaHeadModel(config)
    train_dataset = GeneratorDataset(generator, column_names=["input_ids"]).batch(batch_size=4)
    eval_dataset = [np.arange(17) % 15] * 3
    task = Trainer(task="text_generation", model=model, model_name="pangualpha_2_6b", args=arguments,
                   train_dataset=train_dataset, eval_dataset=eval_dataset)  # fmt: skip
    task.set_parallel_config(**LAYOUTS[layout])
    before = model.is_untouched
    if layout == "dp2":  # the weights that a model has are kept: these are seen in the first loss
        table = model.network.embedding.word_embeddings.weight
        table.set_data(table * 0)
    task.train()
    found = {"size": size, "untouched": before, **task.evaluate()}
    folder = [p.asnumpy().sum() for p in model.network.get_parameters()]
    again = task.evaluate(eval_checkpoint=True)
    if rank == 0:
        print(json.dumps({**found, "again": again["loss"], "sum": float(np.sum(folder))}), flush=True)


if __name__ == "__main__":
    run_as_rank(main)
