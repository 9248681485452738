"""Pretrain a PanGu-alpha model: `bash pretrain_pangu.sh` on several processes, `python pretrain_pangu.py` on one.

The arguments are those of `pretrain_gpt.py`; `--top-query-layer` says where the final norm stands.
"""

from __future__ import annotations

from parallel_core.launch.entry import run_as_rank
from parallel_core.training import pretrain
from parallel_core.training.forward_step import forward_step
from parallel_core.transformer import ModelStage
from parallel_core.transformer.models import PanguAlphaModel


def model_provider_func(pre_process: bool, post_process: bool, stage: ModelStage) -> PanguAlphaModel:
    """Return the part of the model that one pipeline stage holds."""
    return PanguAlphaModel(stage)


def main() -> None:
    """Train as the command line says."""
    pretrain(None, model_provider_func, forward_step_func=forward_step)


if __name__ == "__main__":
    run_as_rank(main)
