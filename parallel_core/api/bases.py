"""What classes of one's own are made from, by MindFormers' names: training of a task, pipeline, dataset, processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from parallel_core.api.data import read_rows
from parallel_core.api.job import world
from parallel_core.api.settings_file import MindFormerConfig
from parallel_core.api.tokenizers import PreTrainedTokenizer
from parallel_core.api.trainer import Trainer, TrainingArguments
from parallel_core.errors import ConfigError


class BaseTrainer:
    """Training, evaluation and prediction of a task: what a registered trainer's methods call.

    Args:
        task: see `Trainer`.
        model_name: a preset's name, where no network is given.
    """

    def __init__(self, task: str = "text_generation", model_name: str | None = None) -> None:
        self.task, self.model_name = task, model_name
        self._trainer: Trainer | None = None

    def _of(self, config: Any, network: Any, **more: Any) -> Trainer:
        """Return the trainer of a call; the one before, where nothing else is asked for."""
        if self._trainer is not None and config is None and network is None:
            for name, value in more.items():
                if value is not None:
                    setattr(self._trainer, name, value)
            return self._trainer
        self._trainer = Trainer(config, task=self.task, model=network, model_name=self.model_name, **more)
        return self._trainer

    def training_process(
        self, config: TrainingArguments | Mapping[str, Any] | str | None = None, network: Any = None,
        dataset: Any = None, optimizer: Any = None, wrapper: Any = None, callbacks: Any = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Train.

        Args:
            config: see `Trainer`.
            network: the model.
            dataset: what it is trained on.
            optimizer: the arguments say how weights are updated; give none.
            wrapper: the arguments say how a step is made; give none.
            callbacks: give none.
            settings: of `Trainer.train`.

        Raises:
            ConfigError: something that has no place here is given.
        """
        for name, value in (("optimizer", optimizer), ("wrapper", wrapper), ("callbacks", callbacks)):
            if value is not None:
                raise ConfigError(f"{name}: training is what its arguments say (TrainingArguments); leave it out")
        self._of(config, network, train_dataset=dataset).train(**settings)

    def evaluate_process(
        self, config: Any = None, network: Any = None, dataset: Any = None, callbacks: Any = None,
        compute_metrics: Any = None, metric_name: str | None = None, **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the scores of the task; see `Trainer.evaluate`.

        Args:
            config: see `Trainer`.
            network: the model.
            dataset: what it is evaluated on.
            callbacks: give none.
            compute_metrics: the task has its own; give none.
            metric_name: has no effect: the task has its own.
            settings: of `Trainer.evaluate`.

        Raises:
            ConfigError: something that has no place here is given.
        """
        for name, value in (("callbacks", callbacks), ("compute_metrics", compute_metrics)):
            if value is not None:
                raise ConfigError(f"{name}: a task has its own scores ({metric_name or self.task}); leave it out")
        return self._of(config, network, eval_dataset=dataset).evaluate(**settings)

    def predict_process(
        self, config: Any = None, input_data: Any = None, task: str | None = None, network: Any = None,
        tokenizer: PreTrainedTokenizer | None = None, **settings: Any,
    ) -> Any:  # fmt: skip
        """Return what the task's pipeline gives; see `Trainer.predict`.

        Args:
            config: see `Trainer`.
            input_data: texts.
            task: the trainer's own, or nothing.
            network: the model.
            tokenizer: of the texts.
            settings: of `Trainer.predict`.

        Raises:
            ConfigError: the task is another.
        """
        if task not in (None, self.task):
            raise ConfigError(f"task={task!r}: this trainer's is {self.task}")
        return self._of(config, network, tokenizer=tokenizer).predict(input_data=input_data, **settings)


class BasePipeline:
    """A task on texts in three steps, which a class of one's own overrides: preprocess, forward, postprocess.

    Args:
        model: the model, called `network` too.
        tokenizer: of the texts.
        settings: of the three steps, where a call says nothing; `_sanitize_parameters` parts them.
    """

    return_name = "base"

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizer | None = None, **settings: Any) -> None:
        self.model = self.network = model
        self.tokenizer = tokenizer
        self._settings = settings

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return what each of the three steps is told; here all is the middle one's."""
        return {}, settings, {}

    def preprocess(self, inputs: Any, **settings: Any) -> dict[str, Any]:
        """Return the model's input of a text."""
        if self.tokenizer is None:
            raise ConfigError(f"{type(self).__name__}: texts need a tokenizer; give tokenizer")
        return {"input_ids": self.tokenizer(inputs, **settings)["input_ids"]}

    def forward(self, model_inputs: dict[str, Any], **settings: Any) -> dict[str, Any]:
        """Return what the model makes of it; here the ids of a continuation."""
        return {"output_ids": self.network.generate(model_inputs["input_ids"], **settings)}

    def postprocess(self, model_outputs: dict[str, Any], **settings: Any) -> Any:
        """Return the result; here the texts of ids."""
        if self.tokenizer is None:
            raise ConfigError(f"{type(self).__name__}: texts need a tokenizer; give tokenizer")
        return [{f"{self.return_name}_text": self.tokenizer.decode(model_outputs["output_ids"], **settings)}]

    def __call__(self, inputs: Any, **settings: Any) -> Any:
        """Return the results of a text, or those of several in one list."""
        before, within, after = self._sanitize_parameters(**{**self._settings, **settings})
        if isinstance(inputs, list):
            return [one for text in inputs for one in self(text, **settings)]
        return self.postprocess(self.forward(self.preprocess(inputs, **before), **within), **after)


class BaseDataset:
    """A dataset of one's own: `__new__(cls, dataset_config)` returns a MindSpore dataset, made with what is here."""

    @classmethod
    def init_dataset_config(cls, dataset_config: MindFormerConfig) -> None:
        """Take the settings of the dataset, with their defaults where there are none."""
        usual: dict[str, Any] = {"batch_size": 1, "repeat": 1, "drop_remainder": True, "num_parallel_workers": 1,
                                 "input_columns": ["input_ids"]}  # fmt: skip
        for name, value in usual.items():
            if dataset_config.get(name) is None:
                dataset_config[name] = value

    @staticmethod
    def _check_device_rank_for_parallel(rank_id: int, device_num: int) -> tuple[None, None]:  # noqa: ARG004
        """Return that every rank reads all samples: a Trainer shares them out itself."""
        return None, None

    @staticmethod
    def _is_semi_full_batch() -> bool:
        """Return whether every rank reads whole batches."""
        return True

    @staticmethod
    def _is_data_parallel() -> bool:
        """Return whether ranks read batches of their own."""
        return False

    @classmethod
    def _process_mindrecord_data(cls, dataset_config: MindFormerConfig) -> Any:
        """Return the records of `data_loader.dataset_dir` as a MindSpore dataset of the columns `input_columns`."""
        from mindspore.dataset import NumpySlicesDataset

        loader = dataset_config.data_loader or {}
        rows = read_rows(str(loader.get("dataset_dir")))
        if dataset_config.input_columns != ["input_ids"]:
            raise ConfigError(f"input_columns={dataset_config.input_columns}: records are read by input_ids")
        return NumpySlicesDataset({"input_ids": rows.ids}, shuffle=bool(loader.get("shuffle")))

    @classmethod
    def _process_raw_text_data(cls, dataset_config: MindFormerConfig) -> Any:
        """Refuse: a class of one's own reads its texts by itself.

        Raises:
            ConfigError: always, with what to write.
        """
        kind = (dataset_config.data_loader or {}).get("type")
        raise ConfigError(f"data_loader type {kind!r}: override _process_raw_text_data, or write MindDataset")


class ProcessorMixin:
    """What a processor of one's own keeps: tokenizer, max_length, padding, return_tensors.

    Args:
        settings: become attributes.
    """

    def __init__(self, **settings: Any) -> None:
        for name, value in settings.items():
            setattr(self, name, value)


def get_real_rank() -> int:
    """Return this rank's number in the job."""
    return world().rank


def get_real_group_size() -> int:
    """Return the number of ranks of the job."""
    return world().size


def get_input_data_batch_slice_map(
    input_ids: np.ndarray, eos_token_id: int, dis: int, rank_id: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows of a batch with the positions and the mask of documents that end in `eos_token_id`.

    Args:
        input_ids: int [B, S + 1].
        eos_token_id: the id that ends a document, which belongs to it.
        dis: rows of a rank.
        rank_id: whose rows.

    Returns:
        int32 [dis, S + 1] ids, int32 [dis, S] positions in their documents, float32 [dis, S, S] 1 where a position
        sees another.
    """
    rows = input_ids[rank_id * dis : rank_id * dis + dis].astype(np.int32)
    length = rows.shape[1] - 1
    ends = rows[:, :length] == eos_token_id
    document = np.concatenate((np.zeros((len(rows), 1), np.int64), ends.cumsum(1)[:, :-1]), 1)
    places = np.arange(length)
    begins = np.zeros_like(document)
    begins[:, 1:] = np.maximum.accumulate(np.where(ends[:, :-1], places[1:], 0), 1)
    seen = np.tril(np.ones((length, length), np.float32))[None] * (document[:, :, None] == document[:, None, :])
    return rows, (places - begins).astype(np.int32), seen.astype(np.float32)


__all__ = [
    "BaseDataset", "BasePipeline", "BaseTrainer", "ProcessorMixin", "get_input_data_batch_slice_map",
    "get_real_group_size", "get_real_rank",
]  # fmt: skip
