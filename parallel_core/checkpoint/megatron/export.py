"""How a Megatron run holds this project's tensors: its arguments, and each rank's part of everything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from parallel_core.checkpoint.common import checked_args
from parallel_core.checkpoint.loading import VOCABULARY_TENSORS, read_shard
from parallel_core.checkpoint.megatron.common_state import refuse_unsupported
from parallel_core.checkpoint.megatron.dist_buckets import ChunkLayouts
from parallel_core.checkpoint.megatron.experts import StoredExperts, is_buffer, is_expert, is_whole
from parallel_core.checkpoint.megatron.names import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    canonical_name,
    is_latent,
    num_stacked_parts,
    te_fused_name,
    tensor_parallel_dim,
)
from parallel_core.checkpoint.megatron.pickle_emitter import torch_dtype
from parallel_core.checkpoint.megatron.placement import is_te_spec
from parallel_core.checkpoint.safetensors_file import StreamTensor
from parallel_core.checkpoint.source import TensorInfo, TensorSource
from parallel_core.config.megatron_model import megatron_arguments
from parallel_core.errors import CheckpointError, ConfigError, bullet_list
from parallel_core.layout.derived import padded_vocab_size
from parallel_core.layout.shard import TensorShard

KINDS = ("exp_avg", "exp_avg_sq")
_UNEVEN = {
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None,
}
_TRAINING_DEFAULTS: dict[str, Any] = {
    "lr": 1e-4,
    "min_lr": 0.0,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "use_distributed_optimizer": False,
    "make_vocab_size_divisible_by": 128,
    "context_parallel_size": 1,
    "overlap_grad_reduce": False,
    "ddp_bucket_size": None,
    "seq_length": None,
    "tokenizer_type": None,
    "accumulate_allreduce_grads_in_fp32": True,
}


@dataclass(frozen=True)
class Target:
    """Where to: the layout of the Megatron run that will load the checkpoint; None keeps what the source had.

    Attributes:
        tensor_parallel: tensor parallel size.
        pipeline_parallel: pipeline stages.
        virtual_pipeline: model chunks per stage.
        first_stage_layers: layers of the first stage when stages are uneven.
        last_stage_layers: layers of the last stage when stages are uneven.
        distributed_optimizer: whether the run uses `--use-distributed-optimizer`.
        transformer_engine: whether the run uses `--transformer-impl transformer_engine`.
        with_optimizer: whether to write optimizer state.
        expert_parallel: ranks that share a layer's experts.
        expert_tensor_parallel: ranks that share each expert.
        grouped_gemm: whether the run uses `--moe-grouped-gemm`.
        legacy_grouped_gemm: whether the run uses `--moe-use-legacy-grouped-gemm`.
    """

    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    virtual_pipeline: int | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    distributed_optimizer: bool | None = None
    transformer_engine: bool | None = None
    with_optimizer: bool = True
    expert_parallel: int | None = None
    expert_tensor_parallel: int | None = None
    grouped_gemm: bool | None = None
    legacy_grouped_gemm: bool | None = None


class Export:
    """A source seen as a Megatron run's ranks hold it.

    Attributes:
        args: Megatron's arguments, plain.
        infos: shape (with the target's vocabulary padding) and dtype of every parameter.
        has_optimizer: whether Adam's moments of all parameters are there and wanted.
        layouts: which parameters each model chunk has, and where in its flat buffers.
        latent: whether it has multi-latent attention.
        grid: how its ranks share experts out.
    """

    def __init__(self, source: TensorSource, target: Target, whole: bool = False) -> None:
        """Work out the arguments and check that everything can be written.

        Args:
            source: the checkpoint.
            target: where to.
            whole: write whole tensors, whatever the target's tensor parallel size (as `torch_dist` can).

        Raises:
            CheckpointError: a tensor has no place in Megatron, optimizer state is incomplete, or the layout does not
                divide the model.
        """
        self.source, self.target = source, target
        self._keys = frozenset(source.keys())
        names = [key for key in source.keys() if "@" not in key]  # noqa: SIM118 - a method of the protocol
        foreign = [name for name in names if canonical_name(name) is None]
        if foreign:
            raise CheckpointError(
                f"{source.path}: {len(foreign)} tensors Megatron does not have:\n{bullet_list(foreign)}"
            )
        trained = [name for name in names if not is_buffer(name)]
        if WORD_EMBEDDINGS not in names:
            raise CheckpointError(f"{source.path} holds no {WORD_EMBEDDINGS}")
        for name in {*VOCABULARY_TENSORS} & {*names}:
            if len(source.info(name).shape) != 2:
                shape = list(source.info(name).shape)
                raise CheckpointError(f"{source.path}: {name} of shape {shape} is no matrix of rows and hidden size")
        self.has_optimizer = target.with_optimizer and _has_optimizer(source, trained)
        self.args = _target_args(source.common, target, {name: source.info(name) for name in names}, whole)
        refuse_unsupported(self.args, str(source.path))
        self.tp = 1 if whole else self.args["tensor_model_parallel_size"]
        self.pp = self.args["pipeline_model_parallel_size"]
        self.chunks = int(self.args["virtual_pipeline_model_parallel_size"] or 1)
        self.tied = OUTPUT_LAYER not in names
        self.gated = bool(self.args.get("swiglu"))
        rows = self.args["padded_vocab_size"]
        self.infos = {
            name: TensorInfo((rows, *info.shape[1:]) if name in VOCABULARY_TENSORS else info.shape, info.dtype)
            for name, info in ((name, source.info(name)) for name in names)
        }
        dtypes = sorted({self.infos[name].dtype for name in trained})
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{source.path} holds weights of several dtypes ({', '.join(dtypes)}); Megatron has one"
            )
        self.layouts = ChunkLayouts(self.infos, self.args)
        self.stacked = isinstance(self.args.get("moe_layer_freq", 1), int)
        self.latent = is_latent(names)
        self.grid = self.layouts.grid
        for name in names:  # every cut is tried before anything is written
            if whole or not is_expert(name):
                self.shard(name, self.tp - 1)
        if not whole:
            self.files = self.grid.files() if self.grid.experts else [(tp, 0) for tp in range(self.tp)]
            for stored in self.layouts.experts:
                self.shard(stored, self.tp - 1, ep=self.grid.ep - 1)

    def shard(self, name: str, tp: int, kind: str = "", ep: int = 0) -> TensorShard:
        """Return a rank's part of a parameter, or of its optimizer state of that kind."""
        tensor = self._experts(name)
        if tensor is not None:
            info = self.infos[tensor.canonical]
            etp = self.grid.etp_rank(tp, ep) or 0
            return self.grid.shard(tensor, info, ep, etp, "float32" if kind else info.dtype)
        stored = self.stored_name(name)
        info = self.infos[stored]
        dtype = "float32" if kind else info.dtype
        dim = tensor_parallel_dim(name, is_te_spec(self.args))
        if dim is None:
            return TensorShard.full(stored, info.shape, dtype)
        parts = num_stacked_parts(name, self.gated)
        return TensorShard.split(stored, info.shape, dtype, dim, tp, self.tp, parts)

    def name_in_file(self, name: str, distributed: bool) -> str:
        """Return what a parameter is called in a file of `torch`, or of `torch_dist` (`distributed`)."""
        fused = is_te_spec(self.args) or (distributed and not self.latent)
        before, norm, kind = name.partition("pre_mlp_layernorm")
        if is_te_spec(self.args) and norm and f"{before}mlp.router{kind}" in self.infos:
            return name  # the norm before experts is a module of its own there
        return te_fused_name(name, self.latent) if fused else name

    def stored_name(self, name: str) -> str:
        """Return which tensor fills `name`: the last stage's copy of tied embeddings, say, or one of all experts."""
        tensor = self._experts(name)
        if tensor is not None:
            return tensor.canonical
        return WORD_EMBEDDINGS if name == OUTPUT_LAYER and self.tied else name

    def read(self, name: str, tp: int, kind: str = "", ep: int = 0) -> np.ndarray:
        """Return a rank's local array of a parameter ("" as `kind`), its master, or a moment."""
        stored = self.stored_name(name)
        key = f"{stored}@{kind}" if kind else stored
        if kind == "master" and key not in self._keys:
            key = stored  # float32 weights are their own masters
        array, tensor = read_shard(self.source, key, self.shard(name, tp, kind, ep)), self._experts(name)
        return array if tensor is None else self.grid.arranged(tensor, array)

    def tensor(self, name: str, tp: int, kind: str = "", ep: int = 0) -> StreamTensor:
        """Return a rank's local tensor, read when it is written."""
        shard, tensor = self.shard(name, tp, kind, ep), self._experts(name)
        shape = shard.local_shape if tensor is None else tensor.shape
        return StreamTensor.reading(shape, shard.dtype, lambda: self.read(name, tp, kind, ep))

    def _experts(self, name: str) -> StoredExperts | None:
        """Return which experts of a rank a tensor holds; None for any other, and for one of all experts."""
        return None if is_whole(name) else self.layouts.experts.get(name)

    def namespace(self) -> SimpleNamespace:
        """Return the arguments as they are pickled."""
        values = {key: value for key, value in self.args.items() if not _is_class(value)}
        values["params_dtype"] = torch_dtype(self.params_dtype)
        return SimpleNamespace(**values)

    @property
    def params_dtype(self) -> str:
        """Dtype tag of the weights."""
        return self.infos[WORD_EMBEDDINGS].dtype

    @property
    def step(self) -> int:
        """Adam's step count."""
        return int(self.source.common.get("adam_step", self.source.common.get("iteration", 0)))

    def step_tensor(self) -> StreamTensor:
        """Return Adam's step count as torch's optimizers hold it: a float32 tensor without dims."""
        return StreamTensor.of(np.array(self.step, np.float32), "float32")

    def grad_scaler(self) -> dict[str, Any] | None:
        """Return the dynamic loss scaler's state as Megatron saves it; None for models that have none."""
        scaler = self.source.common.get("loss_scaler")
        if self.params_dtype != "float16" or not scaler or "scale" not in scaler:
            return None
        scale = StreamTensor.of(np.array([scaler["scale"]], np.float32), "float32")
        trackers = ("growth_tracker", "hysteresis_tracker")
        return {**{key: int(scaler[key]) for key in trackers if key in scaler}, "scale": scale}

    def param_group(self, decays: bool, of_experts: bool = False) -> dict[str, Any]:
        """Return a torch parameter group, without its parameters."""
        args = self.args
        return {
            "is_expert_parallel": of_experts,
            "default_config": True,
            "wd_mult": 1.0 if decays else 0.0,
            "lr_mult": 1.0,
            "is_decoupled_lr": False,
            "max_lr": args["lr"],
            "min_lr": args["min_lr"],
            "lr": args["lr"],
            "betas": (args["adam_beta1"], args["adam_beta2"]),
            "eps": args["adam_eps"],
            "weight_decay": args["weight_decay"] if decays else 0.0,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
            "bias_correction": True,
            "step": float(self.step),
        }

    def common_state(self) -> dict[str, Any]:
        """Return the top-level entries that both formats have."""
        common = self.source.common
        state: dict[str, Any] = {
            "args": self.namespace(),
            "checkpoint_version": 3.0,
            "iteration": int(common.get("iteration", 0)),
            "num_floating_point_operations_so_far": 0.0,
        }
        if common.get("opt_param_scheduler"):
            state["opt_param_scheduler"] = dict(common["opt_param_scheduler"])
        return state


def _has_optimizer(source: TensorSource, names: Iterable[str]) -> bool:
    keys = set(source.keys())
    if not any("@" in key for key in keys):
        return False
    missing = [f"{name}@{kind}" for name in names for kind in KINDS if f"{name}@{kind}" not in keys]
    narrow = [name for name in names if source.info(name).dtype != "float32"]
    missing += [f"{name}@master" for name in narrow if f"{name}@master" not in keys]
    if missing:
        raise CheckpointError(f"{source.path}: {len(missing)} optimizer tensors are missing:\n{bullet_list(missing)}")
    return True


def _is_class(value: Any) -> bool:
    # Enums of Megatron: a loader without Megatron would refuse the file, and Megatron does not read them back.
    return isinstance(value, Mapping) and set(value) == {"class", "args"}


def _target_args(
    common: Mapping[str, Any], target: Target, infos: Mapping[str, TensorInfo], whole: bool
) -> dict[str, Any]:
    saved = dict(common.get("megatron_args") or {})
    model = {key: value for key, value in (common.get("model_config") or {}).items() if value is not None}
    if "num_layers" not in model or "num_attention_heads" not in model:
        raise CheckpointError(
            "the checkpoint's `model_config` lacks num_layers or num_attention_heads; without them no "
            "Megatron checkpoint can be written"
        )
    args = {**_TRAINING_DEFAULTS, **checked_args(_known(common.get("config")), "the saved configuration"), **saved}
    try:
        words = megatron_arguments(model)
    except ConfigError as error:
        raise CheckpointError(f"no Megatron run has this model: {error}") from None
    args.update({key: value for key, value in words.items() if key != "vocab_size" or "vocab_size" not in saved})
    if "vocab_size" not in saved and args.get("vocab_size") and args["tokenizer_type"] == "NullTokenizer":
        args["vocab_size"] -= 1  # the tokenizer adds its end-of-document token itself
    mesh = {**(common.get("mesh") or {}), **{key: saved[key] for key in saved if key.endswith("parallel_size")}}
    sizes = {
        "tensor_model_parallel_size": target.tensor_parallel,
        "pipeline_model_parallel_size": target.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": target.virtual_pipeline,
    }
    uneven = target.first_stage_layers is not None or target.last_stage_layers is not None
    kept = not uneven and all(value is None or value == (mesh.get(key) or 1) for key, value in sizes.items())
    for key, value in sizes.items():
        args[key] = int(value or (mesh.get(key) if value is None and (kept or "virtual" not in key) else 1) or 1)
    if args["virtual_pipeline_model_parallel_size"] == 1:
        args["virtual_pipeline_model_parallel_size"] = None
    if not kept:
        args.update(_UNEVEN)
        args["decoder_first_pipeline_num_layers"] = target.first_stage_layers
        args["decoder_last_pipeline_num_layers"] = target.last_stage_layers
    if args.get("num_experts"):
        _share_experts(args, mesh, target, kept, whole)
        # Megatron stacks its layers where the pattern is a number.
        args["moe_layer_freq"] = 1 if all(args.get("moe_layer_freq") or [1]) else list(args["moe_layer_freq"])
    elif given := [name for name in _OF_EXPERTS if (x := getattr(target, name)) is True or (x or 1) > 1]:
        raise CheckpointError(f"{', '.join(given)} of the target: this model has no experts; leave it out")
    _set_switches(args, common, target, infos)
    return args


_OF_EXPERTS = "expert_parallel", "expert_tensor_parallel", "grouped_gemm", "legacy_grouped_gemm"


def _share_experts(args: dict[str, Any], mesh: Mapping[str, Any], target: Target, kept: bool, whole: bool) -> None:
    """Set how ranks share experts out: as the target says, else as the source where its layout is kept."""
    ep, etp = mesh.get("expert_model_parallel_size"), mesh.get("expert_tensor_parallel_size")
    if whole:  # of no layout
        ep, etp = 1, None
    elif target.expert_parallel or target.expert_tensor_parallel or not kept:
        ep, etp = target.expert_parallel or ep, target.expert_tensor_parallel
    args["expert_model_parallel_size"], args["expert_tensor_parallel_size"] = int(ep or 1), etp
    for name, value in (
        ("moe_grouped_gemm", target.grouped_gemm), ("moe_use_legacy_grouped_gemm", target.legacy_grouped_gemm),
    ):  # fmt: skip
        args[name] = bool(args.get(name)) if value is None else value


def _set_switches(
    args: dict[str, Any], common: Mapping[str, Any], target: Target, infos: Mapping[str, TensorInfo]
) -> None:
    tp = args["tensor_model_parallel_size"]
    groups = args.get("num_query_groups") or args["num_attention_heads"]
    if groups % tp:
        raise CheckpointError(f"num_query_groups={groups} is not a multiple of tensor_model_parallel_size={tp}")
    args["group_query_attention"] = groups != args["num_attention_heads"]
    args["data_parallel_size"] = int(args.get("data_parallel_size") or 1)
    if args.get("num_experts"):  # data parallel ranks hold the experts of one another's layers
        ranks = args["expert_model_parallel_size"] * int(args["expert_tensor_parallel_size"] or tp)
        args["data_parallel_size"] = math.lcm(args["data_parallel_size"] * tp, ranks) // tp
    args["world_size"] = tp * args["pipeline_model_parallel_size"] * args["data_parallel_size"]
    args["transformer_pipeline_model_parallel_size"] = args["pipeline_model_parallel_size"]
    if target.distributed_optimizer is not None:
        args["use_distributed_optimizer"] = target.distributed_optimizer
    if target.transformer_engine is not None:
        args["transformer_impl"] = "transformer_engine" if target.transformer_engine else "local"
    args.setdefault("transformer_impl", "local")
    args["untie_embeddings_and_output_weights"] = OUTPUT_LAYER in infos
    args["add_position_embedding"] = args.get("position_embedding_type") == "learned_absolute"
    args["padded_vocab_size"] = _padded_vocab(args, common, infos[WORD_EMBEDDINGS].shape[0])
    for key in ("consumed_train_samples", "consumed_valid_samples", "iteration"):
        args[key] = int(common.get(key) or 0)
    dtype = infos[WORD_EMBEDDINGS].dtype
    args["bf16"], args["fp16"] = dtype == "bfloat16", dtype == "float16"
    args["no_save_rng"], args["no_save_optim"] = True, not target.with_optimizer


def _padded_vocab(args: Mapping[str, Any], common: Mapping[str, Any], stored: int) -> int:
    """Return the vocabulary size that Megatron pads to for the target's tensor parallel size."""
    tp = args["tensor_model_parallel_size"]
    true_size = (common.get("model_config") or {}).get("vocab_size")
    if true_size is None:
        if stored % tp:
            raise CheckpointError(
                f"the vocabulary is padded to {stored} rows, which tensor_model_parallel_size={tp} does "
                "not divide, and its true size is not known"
            )
        return stored
    if true_size > stored:
        raise CheckpointError(f"the vocabulary has {stored} rows, its saved vocab_size={true_size} does not fit")
    return padded_vocab_size(int(true_size), int(args["make_vocab_size_divisible_by"] or 1), tp)


def _known(config: Any) -> dict[str, Any]:
    """Return the training settings this module needs from a nested configuration, wherever in it they are."""
    found: dict[str, Any] = {}
    if isinstance(config, Mapping):
        for key, value in config.items():
            if isinstance(value, Mapping):
                found.update(_known(value))
            elif key in _TRAINING_DEFAULTS and value is not None:
                found[key] = value
    return found
