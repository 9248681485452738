"""The training program: building the model and the data, the loop, evaluation, checkpoints, logs."""

from parallel_core.training.pretrain import pretrain

__all__ = ["pretrain"]
