"""A pretraining script written for MindSpeed-Core-MS: the calls of its guide, with imports of this package.

    python -m parallel_core.launch examples/pretrain_gpt_mindspeed.py --config configs/gpt_tiny.yaml

`--own-model` trains the model class of `mindspeed_gpt_model.py` instead of the package's; they are the same model. The
launcher checks the command line before it starts anything, and does not know the script's own arguments: with those,

    NPROC=4 python -m parallel_core.launch --plain examples/pretrain_gpt_mindspeed.py --own-model --config ...
"""

# ruff: noqa: RET504 (the code stays as its guide prints it)

import os
import sys
from pathlib import Path

import mindspore as ms

from parallel_core.compat.mindspeed import (
    GPTModel,
    build_pretraining_data_loader,
    get_args,
    get_batch,
    get_train_valid_test_num_samples,
    init_configs_from_args,
    initialize_megatron,
    pretrain,
    set_parallel_context,
    set_seed,
    train_valid_test_datasets_provider,
)
from parallel_core.launch.entry import run_as_rank

sys.path.insert(0, str(Path(__file__).parent))
import mindspeed_gpt_model  # noqa: E402


def _add_pangu_args(parser):
    group = parser.add_argument_group(title="pangu")
    group.add_argument("--own-model", action="store_true", help="train the model class of mindspeed_gpt_model.py")
    return parser


def main():
    # the command line in Megatron's names, and the configuration
    initialize_megatron(extra_args_provider=_add_pangu_args)
    args = get_args()
    all_config = init_configs_from_args(args)
    # the device, the groups, the seed
    ms.set_context(device_target=os.environ.get("DEVICE_TARGET", "CPU"), mode=ms.PYNATIVE_MODE)
    set_parallel_context(all_config.parallel_config)
    set_seed(all_config.training_config.seed)
    # the data
    train_ds, _, _ = train_valid_test_datasets_provider(get_train_valid_test_num_samples())
    train_dataloader = build_pretraining_data_loader(train_ds, 0)

    def model_provider_func(pre_process=True, post_process=True):
        """get gpt model"""
        model_class = mindspeed_gpt_model.GPTModel if args.own_model else GPTModel
        network_with_loss = model_class(all_config.model_config, pre_process=pre_process, post_process=post_process)
        return network_with_loss

    pretrain(
        train_valid_test_datasets_provider=None,
        model_provider_func=model_provider_func,
        model_type=None,
        forward_step_func=None,
        process_non_loss_data_func=None,
        extra_args_provider=None,
        all_config=all_config,
        train_data_loader=train_dataloader,
        get_batch_func=get_batch,
        args_defaults={},
    )


if __name__ == "__main__":
    run_as_rank(main)
