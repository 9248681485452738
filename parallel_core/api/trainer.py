"""MindFormers' `Trainer` over `pretrain`: a task, a model, data; trained on the job's ranks, or on this process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from parallel_core.api.auto import AutoModel, AutoTokenizer
from parallel_core.api.configs import PretrainedConfig
from parallel_core.api.models import PreTrainedModel, model_class_of, weights_folder
from parallel_core.api.pipelines import QuestionAnsweringPipeline, TextGenerationPipeline, pipeline
from parallel_core.api.tokenizers import PreTrainedTokenizer
from parallel_core.config.dump import sections_yaml
from parallel_core.config.load import load_config
from parallel_core.config.schema import (
    AllConfig,
    DatasetConfig,
    ModelParallelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from parallel_core.data.squad import DEV, SpanDataset, features_of, read_squad
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import ConfigError
from parallel_core.question_answering.answers import score
from parallel_core.training import pretrain
from parallel_core.training.encoder_steps import encoder_forward_step
from parallel_core.training.forward_step import forward_step
from parallel_core.training.runtime import start_runtime
from parallel_core.transformer import ModelStage
from parallel_core.transformer.models import make_model

TASKS = ("text_generation", "question_answering")
_SCHEDULES = {"linear": "linear", "polynomial": "linear", "cosine": "cosine", "constant": "constant"}


@dataclasses.dataclass(kw_only=True)
class TrainingArguments:
    """How a Trainer trains, by MindFormers' names.

    Attributes:
        output_dir: where checkpoints and logs go.
        num_train_epochs: passes over the training data.
        batch_size: samples of a microbatch; `per_device_train_batch_size` is another name.
        learning_rate: the highest.
        lr_end: the last.
        warmup_steps: iterations in which it grows.
        lr_scheduler_type: linear, polynomial (the same), cosine or constant.
        weight_decay: AdamW's.
        adam_beta1: AdamW's.
        adam_beta2: AdamW's.
        adam_epsilon: AdamW's.
        max_grad_norm: largest norm of the gradients; 0: any.
        seed: of first values, order and dropout.
        save_steps: iterations between checkpoints; 0: one at the end.
        save_total_limit: checkpoints that are kept.
        logging_steps: iterations between lines of the log.
        sink_mode: has no effect: there is no data sinking in PyNative mode.
        sink_size: has no effect.
    """

    output_dir: str = "output"
    num_train_epochs: int = 1
    batch_size: int = 1
    per_device_train_batch_size: int | None = None
    learning_rate: float = 5e-5
    lr_end: float = 0.0
    warmup_steps: int = 0
    lr_scheduler_type: str = "linear"
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 1234
    save_steps: int = 0
    save_total_limit: int = 5
    logging_steps: int = 1
    sink_mode: bool = True
    sink_size: int = 2

    def __post_init__(self) -> None:
        if self.lr_scheduler_type not in _SCHEDULES:
            kinds = ", ".join(_SCHEDULES)
            raise ConfigError(f"lr_scheduler_type={self.lr_scheduler_type!r}: give one of {kinds}")
        if self.per_device_train_batch_size is not None:
            self.batch_size = self.per_device_train_batch_size
        for name in ("num_train_epochs", "batch_size", "logging_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give 1 or more")


class RowDataset:
    """Rows of S + 1 ids as samples of S, in their order, as often as samples are asked for.

    Args:
        rows: int [S + 1] each; of one length.
        num_samples: samples to give.
        seq_length: S.
    """

    def __init__(self, rows: Sequence[np.ndarray], num_samples: int, seq_length: int) -> None:
        wrong = sorted({len(row) for row in rows} - {seq_length + 1})
        if wrong or not rows:
            raise ConfigError(f"rows of {wrong or 'no'} ids: a model of {seq_length} positions takes {seq_length + 1}")
        self.rows, self.num_samples, self.seq_length = rows, num_samples, seq_length

    @property
    def samples_per_epoch(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return sample `index`: tokens, labels, position_ids int32 [S], loss_mask float32 [S]."""
        row = self.rows[index % len(self.rows)].astype(np.int32)
        places = np.arange(self.seq_length, dtype=np.int32)
        mask = np.ones(self.seq_length, np.float32)
        return {"tokens": row[:-1], "labels": row[1:], "loss_mask": mask, "position_ids": places}


class Trainer:
    """Trains, evaluates and uses a model for a task.

    Args:
        task: text_generation or question_answering.
        model: a directory, a preset's name (first values), a configuration (first values), or a model, which keeps its
            weights and has the trained ones afterwards (on one process).
        args: how it trains.
        train_dataset: for texts a MindSpore dataset or anything that can be iterated, whose `input_ids` are rows of
            seq_length + 1 ids or batches of them; for answers a SQuAD file or the folder with train-v1.1.json.
        eval_dataset: the same; a folder's dev-v1.1.json.
        tokenizer: of texts; None: that of the model's directory. Rows of ids need none.
        window: for answers: seq_length, doc_stride, max_query_length.

    Raises:
        ConfigError: the task is another, or a setting cannot be.
    """

    def __init__(
        self,
        *,
        task: str,
        model: str | Path | PreTrainedModel | PretrainedConfig,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: PreTrainedTokenizer | None = None,
        window: dict[str, int] | None = None,
    ) -> None:
        if task not in TASKS:
            raise ConfigError(f"task={task!r}: give one of {', '.join(TASKS)}")
        self.task, self.args = task, args or TrainingArguments()
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.window = window or {}
        self._parallel = ModelParallelConfig()
        self._micro_batch_num, self._data_parallel, self._distributed = 1, 0, False
        self._recompute: dict[str, Any] = {}
        self._folder: Path | None = None
        self._model = model if isinstance(model, PreTrainedModel) else None
        if isinstance(model, PretrainedConfig):
            self.config = model
        elif isinstance(model, PreTrainedModel):
            self.config = model.config
        else:
            self._folder = Path(model) if Path(model).is_dir() else None
            self.config = PretrainedConfig.from_pretrained(model)
        if self.config.checkpoint_name_or_path:
            self._folder = weights_folder(self.config.checkpoint_name_or_path)
        self.tokenizer = tokenizer
        if tokenizer is None and self._folder is not None and self.task == "question_answering":
            self.tokenizer = AutoTokenizer.from_pretrained(self._folder)
        if task == "question_answering":
            self._words()

    # ---- how -------------------------------------------------------------------------------------------------------
    def set_parallel_config(
        self,
        data_parallel: int = 1,
        model_parallel: int = 1,
        pipeline_stage: int = 1,
        micro_batch_num: int = 1,
        use_seq_parallel: bool = False,
        optimizer_shard: bool = False,
    ) -> None:
        """Say how the model is cut over the ranks, whose number is the product of the first three.

        Args:
            data_parallel: copies of the model.
            model_parallel: ranks that share each layer.
            pipeline_stage: ranks that share the layers.
            micro_batch_num: microbatches of a copy in one iteration.
            use_seq_parallel: activations between layers are cut along the sequence.
            optimizer_shard: copies share the optimizer's state.
        """
        self._parallel = ModelParallelConfig(
            tensor_model_parallel_size=model_parallel,
            pipeline_model_parallel_size=pipeline_stage,
            sequence_parallel=use_seq_parallel,
        )
        self._data_parallel, self._micro_batch_num = data_parallel, micro_batch_num
        self._distributed = optimizer_shard

    def set_recompute_config(self, recompute: bool = False, select_recompute: bool = False) -> None:
        """Say what is computed again in backward: whole layers, or attention.

        Raises:
            ConfigError: both are asked for.
        """
        if recompute and select_recompute:
            raise ConfigError("recompute and select_recompute ask for two different things; give one")
        self._recompute = {"recompute_granularity": "selective"} if select_recompute else {}
        if recompute:
            whole = {"recompute_method": "uniform", "recompute_num_layers": 1}
            self._recompute = {"recompute_granularity": "full", **whole}

    # ---- what ------------------------------------------------------------------------------------------------------
    def train(self, train_checkpoint: str | Path | None = None) -> None:
        """Train on `train_dataset`; checkpoints go to `output_dir/checkpoint`, the last one into the model.

        Args:
            train_checkpoint: a directory of checkpoints of such a run, which goes on; None: a new run.

        Raises:
            ConfigError: a setting cannot be, or as many ranks run as the layout has not.
        """
        if self.train_dataset is None:
            raise ConfigError("there is nothing to train on; give train_dataset")
        loaded = {"load_checkpoint": str(train_checkpoint)} if train_checkpoint is not None else self._initial()
        rank, world = start_runtime()
        per_copy = self._parallel.tensor_model_parallel_size * self._parallel.pipeline_model_parallel_size
        copies = self._data_parallel or world // per_copy
        if copies * per_copy != world:
            raise ConfigError(
                f"data_parallel={copies} x model_parallel={self._parallel.tensor_model_parallel_size} x pipeline_stage="
                f"{self._parallel.pipeline_model_parallel_size} is not the number of ranks, {world}"
            )
        args, batch = self.args, self.args.batch_size * copies * self._micro_batch_num
        model = dataclasses.replace(self.config.model_config(), **self._recompute, **self._length())
        if model.bert.is_encoder:  # the default is a kernel of decoders', which a run's file would ask for
            model = dataclasses.replace(model, use_flash_attention=False)
        data = self._training_data(model.seq_length)
        iterations = args.num_train_epochs * data.samples_per_epoch // batch
        if not iterations:
            raise ConfigError(f"{data.samples_per_epoch} samples make no batch of {batch}; give more data or epochs")
        config = AllConfig(
            model_config=model,
            parallel_config=self._parallel,
            dataset_config=DatasetConfig(
                batch_size=args.batch_size, micro_batch_num=self._micro_batch_num, global_batch_size=batch,
                **self._sources(),
            ),
            training_config=TrainingConfig(
                seed=args.seed, training_iters=iterations, eval_iters=0, log_interval=args.logging_steps,
                save_interval=args.save_steps or iterations, keep_checkpoint_max=args.save_total_limit,
                output_dir=str(self.checkpoint), log_dir=str(Path(args.output_dir) / "log"),
                use_distributed_optimizer=self._distributed, **loaded,
            ),
            optimizer_config=OptimizerConfig(
                learning_rate=args.learning_rate, min_lr=args.lr_end, weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, clip_grad=args.max_grad_norm,
                lr_decay_style=_SCHEDULES[args.lr_scheduler_type], lr_warmup_iters=args.warmup_steps,
                override_opt_param_scheduler=train_checkpoint is not None,
            ),
        )  # fmt: skip
        written = Path(args.output_dir) / f"trainer_{rank}.yaml"  # the rules of a run are those of its file
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(sections_yaml(config), encoding="utf-8")
        checked = load_config(["--config", str(written)], world_size=world).config
        data.num_samples = iterations * batch
        answers = self.task == "question_answering"
        pretrain(
            lambda _: (data, None, None),
            _provider,
            forward_step_func=encoder_forward_step if answers else forward_step,
            all_config=checked,
        )
        self._folder = self.checkpoint
        if self._model is not None:
            self._model.load(self.checkpoint)

    def finetune(self, finetune_checkpoint: str | Path | None = None) -> None:
        """Train from the weights of a directory, or of the model.

        Raises:
            ConfigError: there are neither.
        """
        if finetune_checkpoint is not None:
            self._folder = weights_folder(finetune_checkpoint)
        elif self._model is None and self._folder is None:
            raise ConfigError("there are no weights to train from; give finetune_checkpoint, or a directory as model")
        self.train()

    def evaluate(self, eval_checkpoint: str | Path | None = None) -> dict[str, Any]:
        """Return and print the scores of the model, or of a checkpoint, on `eval_dataset`, on one process.

        Returns:
            For texts {"loss", "PPL"} over all tokens, for answers {"exact_match", "f1"}.

        Raises:
            ConfigError: there is nothing to evaluate on, or there are no weights.
        """
        if self.eval_dataset is None:
            raise ConfigError("there is nothing to evaluate on; give eval_dataset")
        model = self._with_weights(eval_checkpoint)
        if self.task == "question_answering":
            questions = read_squad(self.eval_dataset, DEV)
            given: Any = [{"context": question.context, "question": question.text} for question in questions]
            found = self._pipeline(model)(given)
            scores = score(questions, {q.name: one[0]["text"] for q, one in zip(questions, found)})
            print(f"QA Metric = {{'QA Metric': {scores}}}", flush=True)
            return dict(scores)
        data = RowDataset(_rows(self.eval_dataset), 0, model.network.config.seq_length)
        total, tokens = 0.0, 0
        for row in data.rows:
            inputs, labels = (Tensor(np.ascontiguousarray(part[None], np.int32)) for part in (row[:-1], row[1:]))
            total += float(model.network(inputs, None, None, labels).sum().asnumpy())
            tokens += len(row) - 1
        result = {"loss": total / tokens, "PPL": math.exp(total / tokens)}
        print(f"PerplexityMetric = {result}", flush=True)
        return result

    def predict(self, predict_checkpoint: str | Path | None = None, *, input_data: Any, **settings: Any) -> Any:
        """Return what `pipeline` of the task gives for `input_data`, on one process.

        Args:
            predict_checkpoint: a directory; None: the model as it is.
            input_data: a text or several.
            settings: of the pipeline's call.
        """
        return self._pipeline(self._with_weights(predict_checkpoint))(input_data, **settings)

    # ---- parts -----------------------------------------------------------------------------------------------------
    @property
    def checkpoint(self) -> Path:
        """The directory of this run's checkpoints."""
        return Path(self.args.output_dir) / "checkpoint"

    def _initial(self) -> dict[str, Any]:
        """Return what loads the weights that training begins with; nothing for first values."""
        folder = self._folder
        if self._model is not None and folder is None:
            folder = Path(self.args.output_dir) / "initial"
            number = 0
            while folder.exists():
                number += 1
                folder = folder.with_name(f"initial_{number}")
            self._model.save_pretrained(folder)
        if folder is None:
            return {}
        return {"load_checkpoint": str(folder), "finetune": True, "resume_training": False}

    def _length(self) -> dict[str, int]:
        length = self.window.get("seq_length")
        return {} if length is None else {"seq_length": length}

    def _sources(self) -> dict[str, Any]:
        """Return what a run's rules and its checkpoints say of the data."""
        if self.task == "text_generation":
            rows = self.config.model_config().vocab_size
            return {"mock_data": True, "tokenizer_type": "NullTokenizer", "unpadded_vocab_size": rows - 1}
        words = self._words()
        return {
            "data_path": (str(self.train_dataset),), "vocab_file": words.vocab_file,
            "tokenizer_type": "BertWordPieceLowerCase" if words.lower_case else "BertWordPieceCase",
            **{name: value for name, value in self.window.items() if name != "seq_length"},
        }  # fmt: skip

    def _words(self) -> BertWordPieceTokenizer:
        words = getattr(self.tokenizer, "tokenizer", None)
        if not isinstance(words, BertWordPieceTokenizer):
            raise ConfigError("question_answering needs a WordPiece tokenizer; give tokenizer")
        return words

    def _training_data(self, seq_length: int) -> RowDataset | SpanDataset:
        if self.task == "text_generation":
            return RowDataset(_rows(self.train_dataset), 0, seq_length)
        words, sizes = self._words(), {**self.window, "seq_length": seq_length}
        features = features_of(read_squad(self.train_dataset), words, **sizes, training=True)
        return SpanDataset(features, 0, seq_length, int(words.pad or 0), self.args.seed)

    def _with_weights(self, folder: str | Path | None) -> PreTrainedModel:
        if folder is not None:
            return AutoModel.from_pretrained(folder)
        if self._model is not None:
            return self._model
        if self._folder is None:
            raise ConfigError("there are no weights; train first, or give a directory")
        model = model_class_of(self.config)(self.config)
        model.load(self._folder)
        return model

    def _pipeline(self, model: PreTrainedModel) -> TextGenerationPipeline | QuestionAnsweringPipeline:
        if self.tokenizer is None and self._folder is None:
            raise ConfigError("texts need a tokenizer; give tokenizer")
        words = self.tokenizer or AutoTokenizer.from_pretrained(self._folder or "")
        return pipeline(self.task, model, words, **(self.window if self.task == "question_answering" else {}))


def _provider(pre_process: bool, post_process: bool, stage: ModelStage) -> nn.Cell:
    """Return the part of the model that one pipeline stage holds."""
    return make_model(stage)


def _rows(dataset: Any) -> list[np.ndarray]:
    """Return the rows of ids of a MindSpore dataset, or of anything that gives arrays or {"input_ids": array}.

    Raises:
        ConfigError: it gives something else.
    """
    rows: list[np.ndarray] = []
    with _alone(dataset):
        found: Iterable[Any] = dataset
        if hasattr(dataset, "create_dict_iterator"):
            found = dataset.create_dict_iterator(num_epochs=1, output_numpy=True)
        for one in found:
            ids = np.asarray(one["input_ids"] if isinstance(one, dict) else one)
            if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
                raise ConfigError(f"input_ids of shape {ids.shape}, {ids.dtype}: give rows of ids, or batches of them")
            rows += list(np.atleast_2d(ids))
    return rows


@contextmanager
def _alone(dataset: Any) -> Iterator[None]:
    """Let a MindSpore dataset be read though another one is made of the same source, which MindSpore refuses."""
    parents: list[tuple[Any, list[Any]]] = []
    nodes = [dataset]
    for node in nodes:
        for child in getattr(node, "children", ()):
            parents.append((child, child.parent))
            child.parent = [node]
            nodes.append(child)
    try:
        yield
    finally:
        for child, before in parents:
            child.parent = before
