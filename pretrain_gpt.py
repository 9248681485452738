"""Pretrain a GPT model: `bash pretrain_gpt.sh` on several processes, `python pretrain_gpt.py` on one.

Copy it to change the model or the loss: `model_provider_func` and `forward_step_func` have Megatron-LM's contracts, and
`parallel_core/training/forward_step.py` is the forward step to start from. With `--num-labels` texts are classified.
"""

from __future__ import annotations

from parallel_core.launch.entry import run_as_rank
from parallel_core.training import pretrain
from parallel_core.training.classification import model_forward_step
from parallel_core.transformer import GPTModel, ModelStage
from parallel_core.transformer.models import TextClassifier


def model_provider_func(pre_process: bool, post_process: bool, stage: ModelStage) -> GPTModel:
    """Return the part of the model that one pipeline stage holds."""
    return TextClassifier(stage) if stage.config.num_labels else GPTModel(stage)


def main() -> None:
    """Train as the command line says."""
    pretrain(None, model_provider_func, forward_step_func=model_forward_step)


if __name__ == "__main__":
    run_as_rank(main)
