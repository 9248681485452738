"""The steps of the MindSpore dynamic-graph GPT pretraining guide: arguments, configuration, model, training.

The guide's own YAML runs on the CPU with smaller widths:

    python examples/pretrain_gpt_from_guide.py --config configs/pangu_38b.yaml --mock-data \\
        --tokenizer-type NullTokenizer --vocab-size 165000 --tensor-model-parallel-size 1 \\
        --pipeline-model-parallel-size 1 --num-layer-list null --num-layers-per-virtual-pipeline-stage null \\
        --virtual-pipeline-model-parallel-size null --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 \\
        --num-attention-heads 8 --max-position-embeddings 32 --global-batch-size 4 --lr-warmup-iters 0 \\
        --train-iters 2 --save-interval null
"""

from __future__ import annotations

import argparse

from parallel_core.config import get_args, init_configs_from_args, initialize_megatron
from parallel_core.launch.entry import run_as_rank
from parallel_core.training import pretrain
from parallel_core.training.forward_step import get_batch
from parallel_core.transformer import GPTModel, ModelStage


def _add_pangu_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group(title="pangu")
    group.add_argument("--use-sandwich-norm", action="store_true", help="norms after attention and after the MLP")
    group.add_argument("--run-name", default="pangu", help="printed at the start")
    return parser


def model_provider_func(pre_process: bool, post_process: bool, stage: ModelStage) -> GPTModel:
    """Return the part of the model that one pipeline stage holds."""
    return GPTModel(stage)


def main() -> None:
    """Train as the command line says."""
    initialize_megatron(extra_args_provider=_add_pangu_args)
    args = get_args()
    all_config = init_configs_from_args(args)
    print(f"run {args.run_name}: {all_config.model_config.num_layers} layers")
    pretrain(
        train_valid_test_datasets_provider=None,
        model_provider_func=model_provider_func,
        model_type=None,
        forward_step_func=None,
        process_non_loss_data_func=None,
        extra_args_provider=None,
        all_config=all_config,
        get_batch_func=get_batch,
        args_defaults={},
    )


if __name__ == "__main__":
    run_as_rank(main)
