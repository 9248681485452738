"""The frozen model that adapters stand beside: loaded from its own directory, and never saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import mindspore as ms
import numpy as np
from mindspore import Parameter

from parallel_core.adapt.lora import adapter_settings
from parallel_core.checkpoint import load_shards
from parallel_core.checkpoint.lora import KEY, LORA_A, check_same_adapter, check_same_layers, fingerprint
from parallel_core.checkpoint.opening import open_adapter, require_intact_source
from parallel_core.checkpoint.source import TensorSource
from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.layout.shard import shard_of


class Loading(Protocol):
    """What `Checkpointer` has that loading needs; the names mean what they mean there."""

    config: AllConfig
    context: ParallelContext
    say: Callable[[str], None]

    def everywhere(self, action: Callable[[], Any]) -> Any:
        """Run on this rank, and raise on all ranks if it fails on one."""

    def check_model(self, common: dict[str, Any], path: Path) -> None:
        """Refuse a checkpoint of another model."""

    def parameters(self) -> list[Parameter]:
        """Return this rank's parameters."""

    def fill(self, arrays: dict[str, np.ndarray]) -> None:
        """Give parameters the values of these names."""


def load_base(run: Loading, path: Path) -> tuple[TensorSource | None, dict[str, Any]]:
    """Load the frozen weights of a run with adapters; collective.

    Args:
        run: what loads and saves the run.
        path: the checkpoint that the run loads: the base model's, or an adapter's, which names its base model.

    Returns:
        The adapter to go on with (None: to begin one), and what its checkpoints say of it.

    Raises:
        CheckpointError: the base model is not there, is another one, or the adapter is another.
    """
    lora, world = run.config.training_config.lora, run.context.world
    adapter, base = run.everywhere(lambda: open_adapter(path, lora.base))
    run.everywhere(lambda: run.check_model(base.common, base.path))
    if run.config.training_config.crc_check:
        run.everywhere(lambda: require_intact_source(base) if run.context.rank == 0 else None)
    same = fingerprint(base) if adapter is None else adapter.common[KEY]["fingerprint"]  # which opening has compared
    parameters = run.parameters()
    own = [shard_of(p).name.removesuffix(LORA_A) for p in parameters if shard_of(p).name.endswith(LORA_A)]
    layers = {name: lora.of(name) for names in world.all_gather_object(own) for name in names}
    alphas = {name: alpha for name, (_, alpha) in layers.items() if alpha != lora.alpha}
    told = {**adapter_settings(lora), "alphas": alphas, "base": str(base.path.resolve()), "fingerprint": same}
    if adapter is not None:
        run.everywhere(lambda: check_same_adapter(adapter, told))
        run.everywhere(lambda: check_same_layers(adapter, layers))
    frozen = {shard_of(p).name: shard_of(p) for p in parameters if not p.requires_grad}
    known = {key for keys in world.all_gather_object(list(frozen)) for key in keys}
    known.update(filter(lambda key: "@" in key, base.keys()))
    bfloat16 = next((p.asnumpy().dtype for p in parameters if p.dtype == ms.bfloat16), None)
    arrays, report = run.everywhere(lambda: load_shards(base, frozen, all_keys=known, bfloat16=bfloat16))
    run.fill(arrays)
    run.say(f"Loaded base model {base.path} ({base.format}), frozen: {report.text()}")
    return adapter, told
