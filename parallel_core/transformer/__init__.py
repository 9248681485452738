"""The GPT model, layer by layer."""

from parallel_core.transformer.gpt_model import GPTModel
from parallel_core.transformer.stage import ModelStage

__all__ = ["GPTModel", "ModelStage"]
