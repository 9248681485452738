"""MindFormers' `Trainer` over `pretrain`: a task, a model, data; trained on the job's ranks, or on this process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn

from parallel_core.api.auto import AutoModel, AutoTokenizer
from parallel_core.api.configs import PretrainedConfig
from parallel_core.api.contexts import shards_optimizer
from parallel_core.api.data import RowDataset, Rows, same_rows
from parallel_core.api.job import on_rank_0, rows_of_rank_0, shared_out, tell, world
from parallel_core.api.models import PreTrainedModel, model_class_of, weights_folder
from parallel_core.api.pipelines import pipeline
from parallel_core.api.run_file import RunFile
from parallel_core.api.tokenizers import PreTrainedTokenizer
from parallel_core.config.dump import sections_yaml
from parallel_core.config.experts import MoEConfig
from parallel_core.config.load import load_config
from parallel_core.config.schema import (
    AllConfig,
    DatasetConfig,
    ModelParallelConfig,
    OptimizerConfig,
    TrainingConfig,
    TransformerConfig,
)
from parallel_core.data.classified import ClassifiedDataset, classified_rows
from parallel_core.data.squad import DEV, SpanDataset, features_of, read_squad
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import CheckpointError, ConfigError
from parallel_core.question_answering.answers import score
from parallel_core.training import pretrain
from parallel_core.training.classification import model_forward_step
from parallel_core.training.runtime import start_runtime
from parallel_core.transformer import ModelStage
from parallel_core.transformer.models import make_model

_OTHER_WAYS = {
    "pet_method": "adapters are trained from a .yaml with model.model_config.pet_config, or by "
                  "bash pretrain_gpt.sh --lora-rank 8 --load DIR",
    **dict.fromkeys(("callbacks", "eval_callbacks"), "a step's and an evaluation's numbers are in the run's log; "
                                                     "TrainingArguments say how often"),
    **dict.fromkeys(("optimizers", "wrapper"), "TrainingArguments say how weights are updated"),
    "compute_metrics": "a task has its own scores", "save_config": "save_pretrained(DIR) of a model writes it",
    **dict.fromkeys(("image_processor", "audio_processor"), "tasks are of texts"),
}  # fmt: skip
"""MindFormers' keywords of a Trainer that have no place here, with what there is in theirs."""
TASKS = ("text_generation", "question_answering", "text_classification")
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


class Trainer:
    """Trains, evaluates and uses a model for a task.

    Args:
        args: how it trains: arguments, a dictionary of them, or a MindFormers `.yaml`, which may say all the rest too.
        task: text_generation, question_answering or text_classification; "general": what `args` says.
        model: a directory, a preset's name (first values), a configuration (first values), or a model, which keeps its
            weights and has the trained ones afterwards.
        model_name: a preset's name, where `model` is not given.
        train_dataset: for texts a MindSpore dataset, a folder of MindRecord files, or anything that can be iterated,
            whose `input_ids` are rows of seq_length + 1 ids or batches of them; for answers a SQuAD file or the folder
            with train-v1.1.json; for classes a file or folder of texts (`data.classified`).
        eval_dataset: the same; a folder's dev-v1.1.json; rows may be shorter.
        tokenizer: of texts; None: that of the model's directory. Rows of ids need none.
        window: for answers: seq_length, doc_stride, max_query_length; for classes: seq_length.
        others: MindFormers' further keywords, which may say nothing (None, False, "").

    Raises:
        ConfigError: the task is another, a setting cannot be, or a further keyword says something.
        TypeError: a keyword is unknown.
    """

    def __init__(
        self,
        args: TrainingArguments | Mapping[str, Any] | str | Path | None = None,
        task: str = "general",
        model: str | Path | PreTrainedModel | PretrainedConfig | None = None,
        model_name: str | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: PreTrainedTokenizer | None = None,
        *,
        window: dict[str, int] | None = None,
        **others: Any,
    ) -> None:
        for name, value in others.items():
            if name not in _OTHER_WAYS:
                raise TypeError(f"Trainer has no argument {name!r}")
            if value is not None and value is not False and value != "":
                raise ConfigError(f"{name}={value!r}: not built: {_OTHER_WAYS[name]}; leave it out")
        told = RunFile() if args is None or isinstance(args, TrainingArguments) else RunFile.of(args)
        task = told.task if task == "general" and told.task else task
        if task not in TASKS:
            raise ConfigError(f"task={task!r}: give one of {', '.join(TASKS)}")
        self.task, self.args = task, args if isinstance(args, TrainingArguments) else TrainingArguments(**told.args)
        self.train_dataset = told.train_dataset() if train_dataset is None else train_dataset
        self.eval_dataset = told.eval_dataset() if eval_dataset is None else eval_dataset
        self.window = window or {}
        self._parallel = ModelParallelConfig()
        self._micro_batch_num, self._data_parallel, self._distributed = 1, 0, False
        self._recompute: dict[str, Any] = {}
        self._experts: MoEConfig | None = None
        self.labels: list[str] | None = None
        self._folder: Path | None = None
        model = told.model() if model is None and model_name is None else model_name if model is None else model
        if model is None:
            raise ConfigError("there is no model; give model or model_name")
        self._model = model if isinstance(model, PreTrainedModel) else None
        if isinstance(model, PretrainedConfig):
            self.config = model
        elif isinstance(model, PreTrainedModel):
            self.config, self._folder = model.config, model.weights if model.is_untouched else None
        else:
            self._folder = folder_of(model)
            self.config = PretrainedConfig.from_pretrained(self._folder or model)
        if self._model is None and self.config.checkpoint_name_or_path:
            self._folder = weights_folder(self.config.checkpoint_name_or_path)
        self.tokenizer, self._first_folder = tokenizer, self._folder
        if tokenizer is None and self._folder is not None and self.task != "text_generation":
            self.tokenizer = AutoTokenizer.from_pretrained(self._folder)
        if task == "question_answering":
            self._words()
        if task == "text_classification" and self.tokenizer is None:
            raise ConfigError("text_classification reads texts; give tokenizer")
        for set_up, given in ((self.set_parallel_config, told.parallel), (self.set_recompute_config, told.recompute),
                              (self.set_moe_config, told.experts)):  # fmt: skip
            try:
                set_up(**given) if given else None
            except TypeError as error:
                raise ConfigError(f"{args}: {error}") from None
        if told.tree.load_checkpoint:
            self._start_from(weights_folder(told.tree.load_checkpoint))

    # ---- how -------------------------------------------------------------------------------------------------------
    def set_parallel_config(
        self,
        data_parallel: int = 1,
        model_parallel: int = 1,
        expert_parallel: int = 1,
        pipeline_stage: int = 1,
        micro_batch_interleave_num: int = 1,
        micro_batch_num: int = 1,
        use_seq_parallel: bool = False,
        optimizer_shard: bool = False,
        gradient_aggregation_group: int = 4,  # noqa: ARG002
        vocab_emb_dp: bool = True,  # noqa: ARG002
    ) -> None:
        """Say how the model is cut over the ranks, whose number is data_parallel x model_parallel x pipeline_stage.

        Args:
            data_parallel: copies of the model.
            model_parallel: ranks that share each layer.
            expert_parallel: ranks of `data_parallel` that share a layer's experts.
            pipeline_stage: ranks that share the layers.
            micro_batch_interleave_num: parts of a microbatch, each of `batch_size` samples; one is computed beside the
                communication of another.
            micro_batch_num: microbatches of a copy in one iteration.
            use_seq_parallel: activations between layers are cut along the sequence.
            optimizer_shard: copies share the optimizer's state.
            gradient_aggregation_group: has no effect: gradients are reduced in buckets.
            vocab_emb_dp: has no effect: the word embedding is cut over `model_parallel`, which gives the same numbers.
        """
        self._parallel = ModelParallelConfig(
            tensor_model_parallel_size=model_parallel,
            pipeline_model_parallel_size=pipeline_stage,
            expert_model_parallel_size=expert_parallel,
            expert_tensor_parallel_size=1 if expert_parallel > 1 else 0,
            micro_batch_interleave_num=micro_batch_interleave_num,
            sequence_parallel=use_seq_parallel,
        )
        self._data_parallel, self._micro_batch_num = data_parallel, micro_batch_num
        self._distributed = optimizer_shard

    def set_recompute_config(
        self,
        recompute: bool = False,
        select_recompute: bool = False,
        parallel_optimizer_comm_recompute: bool = False,  # noqa: ARG002
        mp_comm_recompute: bool = True,  # noqa: ARG002
        recompute_slice_activation: bool = False,  # noqa: ARG002
    ) -> None:
        """Say what is computed again in backward: whole layers, or attention.

        Args:
            recompute: whole layers.
            select_recompute: attention alone.
            parallel_optimizer_comm_recompute: has no effect: weights are whole in forward and backward.
            mp_comm_recompute: has no effect: what is computed again communicates again.
            recompute_slice_activation: has no effect: `use_seq_parallel` cuts what is kept.

        Raises:
            ConfigError: both are asked for.
        """
        if recompute and select_recompute:
            raise ConfigError("recompute and select_recompute ask for two different things; give one")
        self._recompute = {"recompute_granularity": "selective"} if select_recompute else {}
        if recompute:
            whole = {"recompute_method": "uniform", "recompute_num_layers": 1}
            self._recompute = {"recompute_granularity": "full", **whole}

    def set_moe_config(
        self,
        expert_num: int = 1,
        capacity_factor: float = 1.1,
        aux_loss_factor: float = 0.05,
        num_experts_chosen: int = 1,
        expert_group_size: int | None = None,
        group_wise_a2a: bool = False,  # noqa: ARG002
        comp_comm_parallel: bool = False,  # noqa: ARG002
        comp_comm_parallel_degree: int = 2,  # noqa: ARG002
    ) -> None:
        """Put experts in place of the MLP, chosen in rounds as MindFormers does it; one expert: the MLP.

        Args:
            expert_num: experts of a layer.
            capacity_factor: tokens that an expert takes, in shares of an even load.
            aux_loss_factor: of the loss that keeps loads even.
            num_experts_chosen: experts of a token.
            expert_group_size: tokens among which an expert's places are counted; None: a microbatch, which is all that
                is built.
            group_wise_a2a: has no effect on what is computed.
            comp_comm_parallel: has no effect on what is computed.
            comp_comm_parallel_degree: has no effect on what is computed.

        Raises:
            ConfigError: groups of tokens are asked for, or a model that is given has no experts.
        """
        if expert_group_size is not None:
            raise ConfigError(f"expert_group_size={expert_group_size}: a microbatch is the group; leave it out")
        if expert_num < 1 or not 1 <= num_experts_chosen <= expert_num:
            raise ConfigError(f"expert_num={expert_num}, num_experts_chosen={num_experts_chosen}: from 1 to the first")
        if expert_num > 1 and (self._model is not None or self._folder is not None):
            raise ConfigError("expert_num: the model that is given has its layers; give a configuration or a preset")
        self._experts = None if expert_num == 1 else MoEConfig(
            num_experts=expert_num, moe_router_topk=num_experts_chosen, moe_router_rounds=True,
            moe_expert_capacity_factor=capacity_factor, moe_aux_loss_coeff=(aux_loss_factor,),
            moe_token_drop_policy="position",
        )  # fmt: skip

    # ---- what ------------------------------------------------------------------------------------------------------
    def train(
        self,
        train_checkpoint: bool | str | Path | None = None,
        resume_training: bool | None = None,
        do_eval: bool = False,
        *,
        resume_or_finetune_from_checkpoint: bool | str | Path | None = None,
        do_finetune: bool = False,
    ) -> None:
        """Train on `train_dataset`; checkpoints go to `output_dir/checkpoint`, the last one into the model.

        Args:
            train_checkpoint: a directory of checkpoints of such a run, which goes on; True: this trainer's own; None:
                a new run.
            resume_training: False: take the checkpoint's weights alone.
            do_eval: evaluate afterwards.
            resume_or_finetune_from_checkpoint: the older name of `train_checkpoint`.
            do_finetune: the older name of `resume_training=False`.

        Raises:
            ConfigError: a setting cannot be, or as many ranks run as the layout has not.
            CheckpointError: the checkpoint is not there; the folder is named.
        """
        given = resume_or_finetune_from_checkpoint if train_checkpoint is None else train_checkpoint
        folder = self._checkpoint_of(given)
        if do_finetune or resume_training is False:
            self._start_from(folder)
            folder = None
        if self.train_dataset is None:
            raise ConfigError("there is nothing to train on; give train_dataset")
        self._run(folder)
        if do_eval:
            self.evaluate()

    def _run(self, folder: Path | None) -> None:
        loaded = {"load_checkpoint": str(folder)} if folder is not None else self._initial()
        rank, world_size = start_runtime()
        args, parallel = self.args, self._parallel
        per_copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        copies = self._data_parallel or world_size // per_copy
        if copies * per_copy != world_size:
            raise ConfigError(
                f"data_parallel={copies} x model_parallel={parallel.tensor_model_parallel_size} x pipeline_stage="
                f"{parallel.pipeline_model_parallel_size} is not the number of ranks, {world_size}"
            )
        own = self._model if self._model is not None and not self._model.is_built_in else None
        if own is not None and per_copy > 1:
            raise ConfigError(f"{type(own).__name__} has cells of its own, which are not cut; give data_parallel alone")
        micro = args.batch_size * parallel.micro_batch_interleave_num
        batch = micro * copies * self._micro_batch_num
        model = dataclasses.replace(self._described(), **self._recompute, **self._length())
        if model.bert.is_encoder:  # the default is a kernel of decoders', which a run's file would ask for
            model = dataclasses.replace(model, use_flash_attention=False)
        if self._experts is not None:
            model = dataclasses.replace(model, moe=self._experts)
        data = self._training_data(model.seq_length)
        iterations = args.num_train_epochs * data.samples_per_epoch // batch
        if not iterations:
            raise ConfigError(f"{data.samples_per_epoch} samples make no batch of {batch}; give more data or epochs")
        config = AllConfig(
            model_config=model,
            parallel_config=parallel,
            dataset_config=DatasetConfig(
                batch_size=micro, micro_batch_num=self._micro_batch_num, global_batch_size=batch, **self._sources(),
            ),
            training_config=TrainingConfig(
                seed=args.seed, training_iters=iterations, eval_iters=0, log_interval=args.logging_steps,
                save_interval=args.save_steps or iterations, keep_checkpoint_max=args.save_total_limit,
                output_dir=str(self.checkpoint), log_dir=str(Path(args.output_dir) / "log"),
                use_distributed_optimizer=self._distributed or shards_optimizer(), **loaded,
            ),
            optimizer_config=OptimizerConfig(
                learning_rate=args.learning_rate, min_lr=args.lr_end, weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, clip_grad=args.max_grad_norm,
                lr_decay_style=_SCHEDULES[args.lr_scheduler_type], lr_warmup_iters=args.warmup_steps,
                lr_decay_iters=max(iterations, args.warmup_steps + 1),  # a warm-up may be longer than the run
                override_opt_param_scheduler=folder is not None,
            ),
        )  # fmt: skip
        written = Path(args.output_dir) / f"trainer_{rank}.yaml"  # the rules of a run are those of its file
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(sections_yaml(config), encoding="utf-8")
        checked = load_config(["--config", str(written)], world_size=world_size).config
        data.num_samples = iterations * batch
        pretrain(
            lambda _: (data, None, None),
            (lambda pre_process, post_process: own) if own is not None else _provider,
            forward_step_func=own_forward_step if own is not None else model_forward_step,
            all_config=checked,
        )
        self._folder = self.checkpoint
        if self._model is not None and own is None:
            self._model.load(self.checkpoint)

    def finetune(self, finetune_checkpoint: bool | str | Path | None = None) -> None:
        """Train from the weights of a directory (True: this trainer's checkpoint), or of the model.

        Raises:
            ConfigError: there are neither.
        """
        if finetune_checkpoint:
            self._start_from(self._checkpoint_of(finetune_checkpoint))
        elif self._model is None and self._folder is None:
            raise ConfigError("there are no weights to train from; give finetune_checkpoint, or a directory as model")
        self.train()

    def evaluate(self, eval_checkpoint: bool | str | Path | None = None) -> dict[str, Any]:
        """Return and print the scores of the model, or of a checkpoint, on `eval_dataset`; each rank does its part.

        Args:
            eval_checkpoint: a directory; True: this trainer's newest checkpoint; None: the model as it is.

        Returns:
            For texts {"loss", "PPL", "batch_loss", "batch_PPL"}: over all tokens, and the mean over batches of
            `batch_size` rows, each batch counting alike (MindFormers' PerplexityMetric). For answers {"exact_match",
            "f1"}, for classes {"Acc"}.

        Raises:
            ConfigError: there is nothing to evaluate on, or there are no weights.
        """
        if self.eval_dataset is None:
            raise ConfigError("there is nothing to evaluate on; give eval_dataset")
        model = self._with_weights(self._checkpoint_of(eval_checkpoint))
        if self.task == "question_answering":
            questions = read_squad(self.eval_dataset, DEV)
            given: Any = [{"context": question.context, "question": question.text} for question in questions]
            found = shared_out(given, self._pipeline(model))
            scores = score(questions, {q.name: one[0]["text"] for q, one in zip(questions, found)})
            tell(f"QA Metric = {{'QA Metric': {scores}}}")
            return dict(scores)
        if self.task == "text_classification":
            it = self._pipeline(model)
            if self.labels is None and self.train_dataset is not None:
                self.labels = classified_rows(self.train_dataset, it.tokenizer.encode)[1]
            rows, self.labels = classified_rows(self.eval_dataset, it.tokenizer.encode, self.labels)
            chosen = shared_out([ids for ids, _ in rows], it.labels)
            right = sum(found == label for found, (_, label) in zip(chosen, rows))
            accuracy = {"Acc": right / len(rows)}
            tell(f"Accuracy = {accuracy}")
            return accuracy
        texts = same_rows(self.eval_dataset, rows_of_rank_0)
        longest = self._described().seq_length + 1
        if not texts.ids or max(map(len, texts.ids)) > longest or min(map(len, texts.ids)) < 2:
            sizes = sorted(set(map(len, texts.ids)))
            raise ConfigError(f"rows of {sizes or 'no'} ids: a model of {longest - 1} positions takes 2 to {longest}")
        sums = shared_out(range(len(texts.ids)), lambda part: [_row_loss(model, texts, number) for number in part])
        result = perplexities(sums, self.args.batch_size)
        tell(f"PerplexityMetric = {result}")
        return result

    def predict(
        self,
        predict_checkpoint: bool | str | Path | None = None,
        input_data: Any = None,
        batch_size: int | None = None,  # noqa: ARG002 - texts have the batches that fit
        **settings: Any,
    ) -> Any:
        """Return what `pipeline` of the task gives for `input_data`; every rank does it, and has it.

        Args:
            predict_checkpoint: a directory; True: this trainer's newest checkpoint; None: the model as it is.
            input_data: a text or several.
            batch_size: has no effect.
            settings: of the pipeline's call.

        Raises:
            ConfigError: there is no input, or there are no weights.
        """
        if input_data is None:
            raise ConfigError("there is nothing to predict on; give input_data")
        return self._pipeline(self._with_weights(self._checkpoint_of(predict_checkpoint)))(input_data, **settings)

    # ---- parts -----------------------------------------------------------------------------------------------------
    @property
    def checkpoint(self) -> Path:
        """The directory of this run's checkpoints."""
        return Path(self.args.output_dir) / "checkpoint"

    def _checkpoint_of(self, given: bool | str | Path | None) -> Path | None:
        """Return the directory that an argument means.

        Raises:
            ConfigError: True, and this trainer has none yet.
            CheckpointError: there is no such directory; it is named.
        """
        if given is None or given is False:
            return None
        if given is True:
            if not self.checkpoint.is_dir():
                raise ConfigError(f"True means the newest checkpoint in {self.checkpoint.resolve()}, and there is none")
            return self.checkpoint
        return weights_folder(given)

    def _start_from(self, folder: Path | None) -> None:
        """Let training begin from a directory's weights; a model that is given has them."""
        if folder is None:
            if self._model is None and self._folder is None:
                raise ConfigError("there are no weights to train from; give a directory")
            return
        self._folder = folder
        if self._model is not None:
            self._model.load(folder)

    def _initial(self) -> dict[str, Any]:
        """Return what loads the weights that training begins with; nothing for first values."""
        folder, model = self._folder, self._model
        if model is not None and not model.is_built_in:
            return {}  # its own parameters are trained
        if model is not None and not model.is_untouched:
            folder = Path(self.args.output_dir) / "initial"
            number = 0
            while folder.exists():
                number += 1
                folder = folder.with_name(f"initial_{number}")
            world().barrier()  # all have looked
            on_rank_0(lambda: model.save_pretrained(folder))
        if folder is None:
            return {}
        return {"load_checkpoint": str(folder), "finetune": True, "resume_training": False}

    def _described(self) -> TransformerConfig:
        """Return the model of the task."""
        if self._model is not None:
            return self._model.described()
        if self.task != "text_classification":
            return self.config.model_config()
        model = self.config.model_config()
        return dataclasses.replace(model, num_labels=model.num_labels or vars(self.config)["num_labels"])

    def _length(self) -> dict[str, Any]:
        length = self.window.get("seq_length")
        return {} if length is None else {"seq_length": length}

    def _sources(self) -> dict[str, Any]:
        """Return what a run's rules and its checkpoints say of the data."""
        if self.task != "question_answering":
            rows = self._described().vocab_size
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

    def _training_data(self, seq_length: int) -> RowDataset | SpanDataset | ClassifiedDataset:
        if self.task == "text_generation":
            return RowDataset(same_rows(self.train_dataset, rows_of_rank_0), 0, seq_length)
        if self.task == "text_classification":
            words: Any = self.tokenizer
            rows, names = classified_rows(self.train_dataset, words.encode)
            if self._described().num_labels < len(names):
                raise ConfigError(f"num_labels={self._described().num_labels}: the data has {len(names)} classes")
            self.labels = names
            return ClassifiedDataset(rows, 0, seq_length, int(words.pad_token_id), self.args.seed)
        pieces, sizes = self._words(), {**self.window, "seq_length": seq_length}
        features = features_of(read_squad(self.train_dataset), pieces, **sizes, training=True)
        return SpanDataset(features, 0, seq_length, int(pieces.pad or 0), self.args.seed)

    def _with_weights(self, folder: Path | None) -> PreTrainedModel:
        if folder is not None:
            if self._model is not None and not self._model.is_built_in:
                raise ConfigError(f"{type(self._model).__name__} has cells of its own: load a checkpoint into it first")
            return AutoModel.from_pretrained(folder)
        if self._model is not None:
            return self._model
        if self._folder is None:
            raise ConfigError("there are no weights; train first, or give a directory")
        model = model_class_of(self.config, labels=self.task == "text_classification")(self.config)
        model.load(self._folder)
        return model

    def _pipeline(self, model: PreTrainedModel) -> Any:
        if self.tokenizer is None and (self._first_folder or self._folder) is None:
            raise ConfigError("texts need a tokenizer; give tokenizer")
        words = self.tokenizer or AutoTokenizer.from_pretrained(self._first_folder or self._folder or "")
        return pipeline(self.task, model, words, **(self.window if self.task == "question_answering" else {}))


def _provider(pre_process: bool, post_process: bool, stage: ModelStage) -> nn.Cell:
    """Return the part of the model that one pipeline stage holds."""
    return make_model(stage)


def folder_of(name: str | Path) -> Path | None:
    """Return the directory that a name means, None where it is a preset's and there is none."""
    try:
        return weights_folder(name)
    except CheckpointError:
        return None


def own_forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """Return the loss that a model of one's own gives for the next microbatch's ids [B, S + 1]."""
    batch = next(data_iterator)
    ids = mint.cat((batch["tokens"][:, :1], batch["labels"]), 1)
    model.set_train(model.training)  # its phase too, which is not its cells' business
    loss = model(ids)

    def told(output: Any) -> tuple[Any, dict[str, tuple[Any, Any]]]:
        return output, {"lm loss": (output, Tensor(1.0, ms.float32))}

    return loss, told


def _row_loss(model: PreTrainedModel, rows: Rows, number: int) -> list[float]:
    """Return the summed loss of a row's tokens, and how many count."""
    row, counted = rows.ids[number], rows.counted(number)
    if model.is_built_in:
        inputs, labels = (Tensor(np.ascontiguousarray(part[None], np.int32)) for part in (row[:-1], row[1:]))
        losses = model.network(inputs, None, None, labels).asnumpy()[0].astype(np.float64)
    else:
        model.set_train(False)
        logits = model(Tensor(row[None]))
        logits = (logits[0] if isinstance(logits, tuple) else logits).asnumpy().astype(np.float64)
        logits = logits.reshape(-1, logits.shape[-1])[: len(row) - 1]
        shifted = logits - logits.max(-1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, row[1:, None], -1)[:, 0]
    return [float((losses * counted).sum()), float(counted.sum())]


def perplexities(sums: Sequence[Sequence[float]], batch_size: int) -> dict[str, float]:
    """Return the loss and perplexity over all tokens, and those of the mean over batches.

    Args:
        sums: of each row the summed loss, and how many tokens count.
        batch_size: rows of a batch; a last one of fewer counts like the others.
    """
    table = np.array(sums, np.float64).reshape(-1, 2)
    begins = range(0, len(table), batch_size)
    of_batches = [table[i : i + batch_size].sum(0) for i in begins]
    loss = float(table[:, 0].sum() / max(table[:, 1].sum(), 1.0))
    mean = float(np.mean([total / max(count, 1.0) for total, count in of_batches]))
    return {"loss": loss, "PPL": math.exp(loss), "batch_loss": mean, "batch_PPL": math.exp(mean)}
