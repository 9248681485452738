"""MindFormers' configurations: a run's YAML as one more form of this project's, and the words of its model section.

`keys.txt` says what becomes of every key outside the model, `models` what the keys of each model mean, `schedule` what
its learning rates are, `form` puts a file together.
"""

from __future__ import annotations

from parallel_core.config.mindformers.form import is_mindformers, read_mindformers, with_base_files

__all__ = ["is_mindformers", "read_mindformers", "with_base_files"]
