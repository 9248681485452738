"""What every multi-rank job does once, before its cases run, and what it does before each of them.

The module named by the environment variable RANK_SESSION takes this one's place.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType


def session_module() -> ModuleType:
    """Return the module whose `set_up` and `before_case` are in force."""
    return importlib.import_module(os.environ.get("RANK_SESSION") or __name__)


def set_up(rank: int, world_size: int) -> None:
    """Prepare this process as one rank of `world_size`; collective. With one rank nothing is initialised."""
    if world_size == 1:
        import mindspore as ms

        # Every host synchronisation of the asynchronous pipeline costs milliseconds on two cores.
        ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    else:
        from parallel_core.training.runtime import start_runtime

        started = start_runtime("CPU")
        if started != (rank, world_size):
            raise RuntimeError(f"the backend says rank, size = {started}, the launcher {(rank, world_size)}")


def before_case() -> None:
    """Seed every generator, so that a case does not depend on those before it."""
    import mindspore as ms
    import numpy as np

    np.random.seed(0)
    ms.set_seed(0)
