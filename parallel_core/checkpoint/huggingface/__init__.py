"""Hugging Face directories (`config.json` and safetensors files), read and written.

`tables` says what each key of `config.json` means, an architecture a table; `architecture` applies a table; `rope` and
`windows` are keys that mean something together; `tensors` says where weights are; `files` which files hold them;
`reader` and `writer` are the two ways.
"""

from __future__ import annotations

from parallel_core.checkpoint.huggingface.files import is_hugging_face
from parallel_core.checkpoint.huggingface.reader import HuggingFaceCheckpoint
from parallel_core.checkpoint.huggingface.writer import write_hugging_face

__all__ = ["HuggingFaceCheckpoint", "is_hugging_face", "write_hugging_face"]
