"""Train by a Trainer on all ranks of the job: `trainer_on_ranks.py OUTPUT_DIR MODEL_PARALLEL PIPELINE_STAGE`."""

from __future__ import annotations

import sys

import numpy as np

from parallel_core.api import ContextConfig, GPT2Config, Trainer, TrainingArguments, init_context
from parallel_core.launch.entry import run_as_rank


def main() -> None:
    """Train a small GPT-2."""
    output, model_parallel, pipeline_stage = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _, size = init_context(use_parallel=True, context_config=ContextConfig(mode=0, device_target="CPU"))
    config = GPT2Config(
        hidden_size=32, num_layers=2, num_heads=4, seq_length=16, vocab_size=64, hidden_dropout_rate=0.0,
        attention_dropout_rate=0.0, embedding_dropout_prob=0.0,
    )  # fmt: skip
    rows = [np.arange(17) + n % 7 for n in range(24)]
    copies = size // (model_parallel * pipeline_stage)
    arguments = TrainingArguments(output_dir=output, batch_size=4 // copies, learning_rate=0.01)
    trainer = Trainer(task="text_generation", model=config, args=arguments, train_dataset=rows)
    trainer.set_parallel_config(
        copies, model_parallel, pipeline_stage=pipeline_stage, use_seq_parallel=model_parallel > 1
    )
    trainer.train()


if __name__ == "__main__":
    run_as_rank(main)
