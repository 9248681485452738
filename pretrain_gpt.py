"""Pretrain a GPT model: `bash pretrain_gpt.sh` on several processes, `python pretrain_gpt.py` on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspore import Tensor

from parallel_core.launch.report import run_as_rank
from parallel_core.training import pretrain
from parallel_core.training.model import ModelStage
from parallel_core.training.step import get_batch
from parallel_core.transformer import GPTModel


def model_provider_func(pre_process: bool, post_process: bool, stage: ModelStage) -> GPTModel:
    """Return the part of the model that one pipeline stage holds."""
    return GPTModel(
        stage.build, stage.layer_numbers, pre_process=pre_process, post_process=post_process, plan=stage.plan
    )


def forward_step(data_iterator: Any, model: GPTModel) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return the model's output for the next microbatch, and the function that makes a loss of it.

    On the last stage the output is the loss of every token, float32 [B, S]; before it, hidden states.
    """
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator)
    output = model(tokens, position_ids, attention_mask, labels)

    def loss_func(token_losses: Tensor) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        total, number = (token_losses * loss_mask).sum(), loss_mask.sum()
        return total, number, {"lm loss": (total, number)}

    return output, loss_func


def main() -> None:
    """Train as the command line says."""
    pretrain(None, model_provider_func, forward_step_func=forward_step)


if __name__ == "__main__":
    run_as_rank(main)
