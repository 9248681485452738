"""The directories that a run writes: held against a second run, and given the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from parallel_core.checkpoint.claim import claimed
from parallel_core.config.schema import AllConfig
from parallel_core.errors import ConfigError
from parallel_core.files import create_file
from parallel_core.training.log import log_folder


@contextmanager
def own_directories(config: AllConfig, text: str, rank: int) -> Iterator[None]:
    """Hold the directory of checkpoints while the block runs, and write the configuration; rank 0 does it for all.

    The resolved configuration becomes config.yaml beside the logs and beside the checkpoints.

    Raises:
        ConfigError: if one of the directories cannot be written, or another run writes checkpoints there.
    """
    training = config.training_config
    writes = [training.output_dir] if training.output_dir and not training.skip_train else []
    with ExitStack() as held:
        if rank == 0:
            for root in writes:
                held.enter_context(claimed(root, lambda text: print(f"WARNING - {text}", flush=True)))
            _save_configuration([log_folder(training.log_dir), *map(Path, writes)], text)
        yield


def _save_configuration(folders: Sequence[Path], text: str) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with create_file(folder / "config.yaml") as file:
                file.write(text)
        except OSError as error:
            raise ConfigError(f"the configuration cannot be written to {folder}: {error.strerror or error}") from None
