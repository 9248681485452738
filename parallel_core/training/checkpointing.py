"""Between a running model and a checkpoint: which rank holds which part of which tensor, and what else is kept."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter

import parallel_core
from parallel_core.checkpoint import (
    AsyncSaver,
    CheckpointWriter,
    TensorShard,
    compare_model_config,
    find_checkpoint,
    holds_checkpoint,
    load_shards,
    open_checkpoint,
    share_among_replicas,
)
from parallel_core.checkpoint.lora import KEY as ADAPTER_KEY
from parallel_core.config.bert import HEADS
from parallel_core.config.checkpoint_args import NEEDS_CHECKPOINT
from parallel_core.config.model_keys import comparable
from parallel_core.config.schema import AllConfig
from parallel_core.config.vocabulary import stored_settings
from parallel_core.context import ParallelContext
from parallel_core.errors import CheckpointError, ParallelCoreError, bullet_list
from parallel_core.layout.shard import shard_of
from parallel_core.optimizer.flat import Flat
from parallel_core.optimizer.loss_scaler import DynamicLossScaler
from parallel_core.optimizer.optimizer import STATE_OF
from parallel_core.training.frozen_base import load_base
from parallel_core.training.step import TrainingStep
from parallel_core.training.together import together

Shards = dict[str, tuple[TensorShard, np.ndarray]]


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        iteration: iterations completed.
        consumed_train_samples: training samples seen by all ranks, of the present data.
        consumed_valid_samples: validation samples seen by all ranks.
        data_order: what determined the order of the samples.
        earlier_samples: training samples of data before the present one (`--new-dataset`).
        skipped_iterations: iterations without an update.
        rerun: of a run that ended by a result to be computed elsewhere, what it found (`training.results`).
    """

    iteration: int = 0
    consumed_train_samples: int = 0
    consumed_valid_samples: int = 0
    data_order: dict[str, Any] | None = None
    skipped_iterations: int = 0
    earlier_samples: int = 0
    rerun: dict[str, Any] | None = None

    @property
    def trained_samples(self) -> int:
        """Every training sample of the run, which the batch ramp-up and the schedules go by."""
        return self.earlier_samples + self.consumed_train_samples


class Checkpointer:
    """Saves and loads one run.

    Args:
        config: the run.
        context: this rank's groups.
        step: parameters, optimizer, schedule, loss scale.
        say: prints on rank 0.
        warn: prints a warning on rank 0; None: as `say`.
    """

    def __init__(
        self,
        config: AllConfig,
        context: ParallelContext,
        step: TrainingStep,
        say: Callable[[str], None],
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.context, self._step = config, context, step
        self.say, self._warn = say, warn or say
        self._async = AsyncSaver()
        self._given_up = threading.Event()
        self._lora = config.training_config.lora.rank
        self._adapter: dict[str, Any] = {}
        self._timeout_s = config.parallel_config.distributed_timeout_minutes * 60

    # ---- saving -----------------------------------------------------------------------------------------------------
    def save(self, progress: Progress) -> None:
        """Write a checkpoint; collective. With async_save only the copy is made before this returns."""
        training, context = self.config.training_config, self.context
        self._step.ddp.finish_param_gather()
        token = context.world.broadcast_object(f"{platform.node()}-{os.getpid()}")
        writer = CheckpointWriter(
            training.output_dir,
            progress.iteration,
            context.rank,
            context.world.size,
            ckpt_format=training.ckpt_format,
            ckpt_prefix=training.prefix,
            token="".join(c if c.isalnum() else "-" for c in str(token)),
        )
        self.everywhere(self._async.wait)
        self.everywhere(writer.begin if context.rank == 0 else _nothing)
        shards = self._shards_to_save()
        common = self._common(progress)
        if training.async_save:
            self._async.start(shards, lambda copies: self._write_alone(writer, copies, common))
            self.say(f"Saving checkpoint {writer.final_path} in the background")
            return
        manifest = self.everywhere(lambda: writer.write_rank_file(shards))
        manifests = context.world.all_gather_object(manifest)
        keep = training.keep_checkpoint_max
        self.everywhere((lambda: writer.commit(manifests, common, keep)) if context.rank == 0 else _nothing)
        self.say(f"Saved checkpoint {writer.final_path}")

    def finish(self) -> None:
        """Wait for a save in the background; collective."""
        self.everywhere(self._async.wait)

    def settle(self) -> None:
        """Wait for this rank's part of a save in the background, after an error; not collective."""
        try:
            self._async.wait()
        except ParallelCoreError as error:
            self._warn(f"the checkpoint in the background was not saved either: {error}")

    def _write_alone(self, writer: CheckpointWriter, shards: Shards, common: dict[str, Any]) -> None:
        """Write without communication: rank 0 collects what the others wrote from the directory."""
        manifest = writer.write_rank_file(shards)
        if self.context.rank == 0:
            alone = self.context.world.size == 1
            manifests = [manifest] if alone else writer.collect_manifests(given_up=self._given_up.is_set)
            writer.commit(manifests, common, self.config.training_config.keep_checkpoint_max)

    def everywhere(self, action: Callable[[], Any]) -> Any:
        """Run `action` on this rank, and raise on all ranks if it fails on one; see `together`."""
        try:
            return together(self.context.world, action, self._timeout_s)
        except CheckpointError:
            self._given_up.set()
            raise

    def _shards_to_save(self) -> Shards:
        context, training = self.context, self.config.training_config
        values: Shards = {}
        for parameter in self.parameters():
            shard = shard_of(parameter)
            stays = self._lora and not parameter.requires_grad  # the base model is in its own directory
            if shard.is_first_copy(context.coordinates) and not stays:
                values[shard.name] = (shard, parameter.asnumpy())
        out = self._share(values)
        if not training.no_save_optim:
            out.update(self._state_to_save())
        return out

    def _state_to_save(self) -> Shards:
        """Return masters and state: with the distributed optimizer this rank's own parts, else its share of all."""
        context = self.context
        values = {
            key: (shard, part.numpy().reshape(shard.local_shape))
            for parameter, key, shard, part in self._state_parts()
            if shard_of(parameter).is_first_copy(context.coordinates)
        }
        if self.config.training_config.use_distributed_optimizer:
            return values
        return self._share(values)

    def _share(self, values: Shards) -> Shards:
        """Return what this one of the ranks that all hold `values` writes of them."""
        mine: list[str] = []
        for name, group in self.context.groups.items():
            sizes = {key: v.nbytes for key, (shard, v) in values.items() if shard.replicas == name}
            mine += share_among_replicas(sizes, group.rank, group.size)
        return {key: values[key] for key in values if key in set(mine)}

    def _state_parts(self) -> list[tuple[Parameter, str, TensorShard, Flat]]:
        """Return parameter, key, place in the global tensor and storage of all masters and state this rank keeps."""
        optimizer, parts = self._step.optimizer, []
        kinds = STATE_OF[self.config.optimizer_config.optimizer_type]
        for parameter, segments in optimizer.segments_by_parameter():
            whole = shard_of(parameter).with_dtype("float32")
            for segment in segments:
                length = segment.end - segment.start
                shard = whole if length == parameter.size else whole.flat_range(segment.offset, segment.offset + length)
                stored = {kind: optimizer.state_part(segment, kind) for kind in kinds}
                if parameter.dtype != ms.float32:
                    stored["master"] = optimizer.master(segment)
                parts += [(parameter, f"{shard.name}@{kind}", shard, part) for kind, part in stored.items()]
        return parts

    def parameters(self) -> list[Parameter]:
        """Return this rank's parameters, frozen ones among them."""
        return [parameter for parameter, _ in self._step.ddp.parameters()]

    def _common(self, progress: Progress) -> dict[str, Any]:
        step, training, mesh = self._step, self.config.training_config, self.context.mesh
        common: dict[str, Any] = {
            **asdict(progress),
            "config": self.config.to_dict(),
            "model_config": stored_settings(self.config),
            "mesh": {
                "tensor_model_parallel_size": mesh.size("tp"),
                "pipeline_model_parallel_size": mesh.size("pp"),
                "virtual_pipeline_model_parallel_size": step.model.layout.num_chunks,
                "context_parallel_size": mesh.size("cp"),
                "data_parallel_size": mesh.size("dp"),
                "expert_model_parallel_size": self.config.parallel_config.expert_model_parallel_size,
                "expert_tensor_parallel_size": self.config.parallel_config.expert_tensor_size,
                "layers": step.model.layout.counts(),
            },
            "versions": {
                "parallel_core": parallel_core.__version__,
                "mindspore": ms.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "loss_scaler": step.scaler.state_dict(),
            "opt_param_scheduler": step.scheduler.state_dict(),
        }
        if self._adapter:
            common[ADAPTER_KEY] = self._adapter
        if not training.no_save_optim:
            common["adam_step"] = step.optimizer.step_count
        if not training.no_save_rng:
            kind, keys, position, *_ = np.random.get_state()
            numpy_state = [str(kind), np.asarray(keys).tolist(), int(position)]
            common["rng"] = {"seed": training.seed, "numpy": numpy_state}
        return common

    # ---- loading ----------------------------------------------------------------------------------------------------
    def load(self) -> Progress:
        """Load `load_checkpoint` into this layout, and return where the run stands; collective.

        Where no checkpoint has been written yet, the run begins (so that one command starts and restarts it), unless
        the weights are what it is about or `exit_on_missing_checkpoint` says otherwise.

        Raises:
            CheckpointError: if there is none to be had, it is damaged, or it holds another model.
        """
        training, context = self.config.training_config, self.context
        found = context.world.broadcast_object(self.everywhere(self._find if context.rank == 0 else _nothing))
        if not found:
            self._warn(
                f"--load {training.load_checkpoint}: there is no checkpoint yet; the run starts from random weights "
                "(--exit-on-missing-checkpoint makes this an error)"
            )
            return Progress()
        path = Path(found)
        if self._lora:
            source, self._adapter = load_base(self, path)
            if source is None:
                return Progress()
        else:
            source = self.everywhere(lambda: open_checkpoint(path))
            self.everywhere(lambda: self.check_model(source.common, path))
        weights_only = self._starts_anew or training.no_load_optim or training.skip_train
        wanted = {shard_of(p).name: shard_of(p) for p in self.parameters() if not self._lora or p.requires_grad}
        replaced = self._replaced_head(source.common)
        wanted = {name: shard for name, shard in wanted.items() if not name.startswith(replaced)}
        state = [] if weights_only else self._state_parts()
        wanted.update({key: shard for _, key, shard, _ in state})
        stored = {key.partition("@")[2] for key in source.keys()} - {"", "master"}  # noqa: SIM118 - a method of it
        if state and not stored & {key.partition("@")[2] for _, key, _, _ in state}:
            other = f"the state of another optimizer ({', '.join(sorted(stored))})" if stored else "no optimizer state"
            raise CheckpointError(
                f"{path} holds weights but {other}; add --no-load-optim to go on with fresh state, or "
                "--finetune to start a new run from these weights"
            )
        bfloat16 = next((p.asnumpy().dtype for p in self.parameters() if p.dtype == ms.bfloat16), None)
        known = {key for keys in context.world.all_gather_object(list(wanted)) for key in keys}
        if weights_only:
            known.update(key for key in source.keys() if "@" in key or key.startswith(replaced))  # noqa: SIM118
        arrays, report = self.everywhere(lambda: load_shards(source, wanted, all_keys=known, bfloat16=bfloat16))
        self.fill(arrays)
        for _, key, _, part in state:
            part.load(arrays[key].reshape(-1))
        if weights_only:
            self._step.optimizer.reload_masters()
        self.say(f"Loaded checkpoint {path} ({source.format}): {report.text()}")
        return self._take_common(source.common, weights_only)

    def fill(self, arrays: dict[str, np.ndarray]) -> None:
        """Give parameters the values of these names."""
        for parameter, storage in self._step.ddp.parameters():
            if (values := arrays.get(shard_of(parameter).name)) is not None:
                storage.load(values.reshape(-1))

    @property
    def _starts_anew(self) -> bool:
        """Whether a checkpoint gives its weights to a new run."""
        training = self.config.training_config
        return training.finetune or not training.resume_training

    def _replaced_head(self, common: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of what a new run does not take from a model with another head: both heads."""
        stored, model = common.get("model_config") or {}, self.config.model_config
        saved, asked = stored.get("bert_head", "none"), model.bert.bert_head
        other = ("none" not in (saved, asked) and saved != asked) or stored.get("num_labels", 0) != model.num_labels
        return HEADS if other and self._starts_anew else ()

    def _find(self) -> str:
        """Return the directory to load, empty if the run may begin without one."""
        training = self.config.training_config
        step = training.ckpt_step or None
        needed = self._lora or any(getattr(training, name) for name in NEEDS_CHECKPOINT)
        if not needed and not holds_checkpoint(training.load_checkpoint):
            return ""
        root, before = training.load_checkpoint, training.diagnosis.replay or None
        return str(find_checkpoint(root, step, before=before, check=training.crc_check, report=self._warn))

    def check_model(self, common: dict[str, Any], path: Path) -> None:
        """Refuse a checkpoint of another model."""
        length = self.config.model_config.seq_length
        asked, saved = (
            comparable(settings, length)
            for settings in (stored_settings(self.config), dict(common.get("model_config") or {}))
        )
        both = asked.keys() & saved.keys() - ({"bert_head", "num_labels"} if self._replaced_head(common) else set())
        differences = compare_model_config({key: saved[key] for key in both}, {key: asked[key] for key in both})
        if differences:
            raise CheckpointError(f"{path} holds another model:\n{bullet_list(differences, 20)}")

    def _take_common(self, common: dict[str, Any], weights_only: bool) -> Progress:
        training, step = self.config.training_config, self._step
        if self._starts_anew:
            return Progress()
        samples = ("consumed_train_samples", "consumed_valid_samples", "earlier_samples")
        counted = {name: int(common.get(name, 0)) for name in (*samples, "skipped_iterations")}
        progress = Progress(
            int(common["iteration"]), data_order=common.get("data_order"), rerun=common.get("rerun"), **counted
        )
        if not weights_only:
            step.optimizer.step_count = int(common.get("adam_step", common["iteration"]))
            optimizer = self.config.optimizer_config
            if common.get("opt_param_scheduler"):
                step.scheduler.load_state_dict(
                    common["opt_param_scheduler"],
                    use_checkpoint=optimizer.use_checkpoint_opt_param_scheduler,
                    override=optimizer.override_opt_param_scheduler,
                )
            # A constant scale is the configuration's; only a dynamic one has a state, and its state is another's.
            if isinstance(step.scaler, DynamicLossScaler) and "growth_tracker" in (common.get("loss_scaler") or {}):
                step.scaler.load_state_dict(common["loss_scaler"])
        else:
            step.scheduler.num_samples = progress.trained_samples
        rng = common.get("rng") or {}
        if not training.no_load_rng and "seed" in rng:
            step.model.streams.set_seed(int(rng["seed"]))
            kind, keys, position, *_ = rng["numpy"]
            np.random.set_state((kind, np.array(keys, np.uint32), position, 0, 0.0))
        return progress


def _nothing() -> None:
    """Do nothing: the other ranks' part of what rank 0 does alone."""
