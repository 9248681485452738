"""When a command line is so empty that a configuration of the project's own may stand under it."""

from __future__ import annotations

from collections.abc import Sequence

from parallel_core.config import table
from parallel_core.config.flags import FILE_FLAGS, split_words

_DESCRIBING = ("model_config.", "parallel_config.", "dataset_config.")


def describes_a_run(argv: Sequence[str]) -> bool:
    """Whether `argv` names a file or gives an argument of the model, the layout or the data.

    Whoever gives one of these has a run of their own in mind: nothing that they did not ask for goes under it.
    """
    return any(flag in FILE_FLAGS or _describes(flag) for flag, _ in split_words(argv)[0])


def _describes(flag: str) -> bool:
    found = table.find(flag)
    return found is not None and bool(found[0].fields) and found[0].fields[0].startswith(_DESCRIBING)
