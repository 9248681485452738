"""What a Trainer is told by a MindFormers `.yaml`: how it trains, the layout, the model and the data, by `type:`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel_core.api.auto import AutoModel
from parallel_core.api.configs import PretrainedConfig
from parallel_core.api.models import PreTrainedModel
from parallel_core.api.register import MindFormerRegister
from parallel_core.api.settings_file import MindFormerConfig
from parallel_core.errors import ConfigError

_TASKS = {
    "CausalLanguageModelingTrainer": "text_generation", "QuestionAnsweringTrainer": "question_answering",
    "TextClassificationTrainer": "text_classification",
}  # fmt: skip
_SCHEDULES = {"polynomial": "polynomial", "linear": "linear", "cosine": "cosine", "ConstantWarmUpLR": "constant",
              "LinearWithWarmUpLR": "linear", "CosineWithWarmUpLR": "cosine", "PolynomialWithWarmUpLR": "polynomial",
              "constant": "constant"}  # fmt: skip
_ARGUMENTS = {
    "output_dir": "output_dir", "seed": "seed", "runner_config.epochs": "num_train_epochs",
    "runner_config.batch_size": "batch_size", "runner_config.sink_mode": "sink_mode",
    "runner_config.sink_size": "sink_size", "lr_schedule.learning_rate": "learning_rate",
    "lr_schedule.lr_end": "lr_end", "lr_schedule.warmup_steps": "warmup_steps",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.beta1": "adam_beta1", "optimizer.beta2": "adam_beta2", "optimizer.eps": "adam_epsilon",
    "optimizer.learning_rate": "learning_rate",
}  # fmt: skip
"""Place in their file -> our argument."""
_READ = {
    "runner_config": ("epochs", "batch_size", "sink_mode", "sink_size"),
    "lr_schedule": ("type", "learning_rate", "lr_end", "warmup_steps"),
    "optimizer": ("type", "weight_decay", "beta1", "beta2", "eps", "learning_rate"),
    "trainer": ("type", "model_name"), "model": ("model_config", "arch"),
    **dict.fromkeys(("output_dir", "seed", "load_checkpoint", "train_dataset", "train_dataset_task", "eval_dataset",
                     "eval_dataset_task", "parallel_config", "micro_batch_interleave_num", "recompute_config",
                     "moe_config"), ()),
}  # fmt: skip
"""What is read; of sections with names, these alone."""
_WITHOUT_EFFECT = frozenset({
    "run_mode", "context", "use_parallel", "parallel", "runner_wrapper", "callbacks", "eval_callbacks", "metric",
    "processor", "src_strategy_path_or_dir", "auto_trans_ckpt", "only_save_strategy", "layer_decay", "layer_scale",
    "lr_scale", "lr_scale_factor", "infer",
})  # fmt: skip
"""Sections of other things than what is trained on what: the calls of a Trainer say them, or nothing here does."""


@dataclasses.dataclass
class RunFile:
    """What was told.

    Attributes:
        tree: the file's settings.
        args: of `TrainingArguments`.
    """

    tree: MindFormerConfig = dataclasses.field(default_factory=MindFormerConfig)
    args: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, args: Mapping[str, Any] | str | Path) -> RunFile:
        """Return what a dictionary of arguments, or a file, says.

        Raises:
            ConfigError: it is neither, or a value cannot be.
        """
        if isinstance(args, Mapping):
            return cls(args=dict(args))
        if not str(args).endswith((".yaml", ".yml")):
            raise ConfigError(f"args={str(args)!r}: give TrainingArguments, a dictionary of them, or a .yaml")
        tree, found = MindFormerConfig(args), {}
        _check_names(tree, str(args))
        for place, name in _ARGUMENTS.items():
            value: Any = tree
            for part in place.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                found[name] = _number(value)
        kind = (tree.lr_schedule or {}).get("type")
        if kind is not None:
            if kind not in _SCHEDULES:
                raise ConfigError(f"{args}: lr_schedule type {kind!r}: give one of {', '.join(_SCHEDULES)}")
            found["lr_scheduler_type"] = _SCHEDULES[kind]
        return cls(tree, found)

    @property
    def task(self) -> str:
        """The task, empty where the file names none; a registered trainer has its own."""
        name = (self.tree.trainer or {}).get("type", "")
        if name and name not in _TASKS and MindFormerRegister.is_exist("trainer", name):
            return str(MindFormerRegister.get_instance("trainer", name, **self._name()).task)
        return _TASKS.get(name, "")

    def _name(self) -> dict[str, Any]:
        return {"model_name": self.tree.trainer.get("model_name")}

    def model(self) -> PreTrainedModel | PretrainedConfig | str | None:
        """Return the model of `model.arch` and `model.model_config`, else the name of `trainer.model_name`."""
        if (self.tree.model or {}).get("model_config"):
            made = PretrainedConfig.of_settings(self.tree.model["model_config"], "model_config")
            arch = str((self.tree.model.get("arch") or {}).get("type", ""))
            return AutoModel.of_class(arch, made) if arch else made
        return (self.tree.trainer or {}).get("model_name")

    def train_dataset(self) -> Any:
        """Return the training data: what a registered class of `train_dataset_task.type` makes, or the folder."""
        return self._dataset("train_dataset")

    def eval_dataset(self) -> Any:
        """Return the data to evaluate on; see `train_dataset`."""
        return self._dataset("eval_dataset")

    def _dataset(self, name: str) -> Any:
        settings = self.tree.get(name)
        kind = (self.tree.get(f"{name}_task") or {}).get("type", "")
        if kind and MindFormerRegister.is_exist("dataset", kind):
            given = self.tree[f"{name}_task"].get("dataset_config") or settings
            return MindFormerRegister.get_cls("dataset", kind)(given)
        return None if settings is None else (settings.get("data_loader") or {}).get("dataset_dir") or None

    @property
    def parallel(self) -> dict[str, Any]:
        """What `set_parallel_config` is told."""
        found = dict(self.tree.parallel_config or {})
        if self.tree.micro_batch_interleave_num is not None:
            found["micro_batch_interleave_num"] = self.tree.micro_batch_interleave_num
        return found

    @property
    def recompute(self) -> dict[str, Any]:
        """What `set_recompute_config` is told."""
        return dict(self.tree.recompute_config or {})

    @property
    def experts(self) -> dict[str, Any]:
        """What `set_moe_config` is told."""
        return dict(self.tree.moe_config or {})


def _check_names(tree: MindFormerConfig, where: str) -> None:
    """Refuse what is not read, so that nothing that somebody writes is passed over.

    Raises:
        ConfigError: a key is unknown, or means something that is not built here; all are named.
    """
    strange = [name for name in tree if name not in _READ and name not in _WITHOUT_EFFECT]
    for section, names in _READ.items():
        inner = tree.get(section)
        if names and isinstance(inner, Mapping):
            strange += [f"{section}.{name}" for name in inner if name not in names]
    if strange:
        raise ConfigError(
            f"{where}: {', '.join(strange)}: not read by a Trainer; leave them out, or give the file to the training "
            f"program (bash pretrain_gpt.sh --config {where}), which reads all of it"
        )


def _number(value: Any) -> Any:
    """Return a number that YAML 1.1 has read as text, such as 1e-5."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
