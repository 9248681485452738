"""The GPT model, layer by layer."""

from parallel_core.transformer.build import BuildContext
from parallel_core.transformer.gpt_model import GPTModel

__all__ = ["BuildContext", "GPTModel"]
