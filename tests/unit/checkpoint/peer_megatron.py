"""Runs in an environment with torch and megatron-core: loads a checkpoint into a real GPTModel and saves its logits.

Usage: python peer_megatron.py ITER_DIR TOKENS.npy LOGITS.npy
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
import warnings
from pathlib import Path

import numpy as np

warnings.filterwarnings("ignore")
os.environ.update(
    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + os.getpid() % 20000), CUDA_DEVICE_MAX_CONNECTIONS="1"
)

import torch  # noqa: E402


def gmm(rows, matrices, batch_sizes, trans_b=False):
    """Return the product of each expert's rows with its matrix, as the package grouped_gemm does on a GPU."""
    parts = torch.split(rows, batch_sizes.tolist())
    return torch.cat([part @ (w.t() if trans_b else w) for part, w in zip(parts, matrices)])


sys.modules["grouped_gemm"] = types.SimpleNamespace(ops=types.SimpleNamespace(gmm=gmm))

torch.cuda.current_device = lambda: torch.device("cpu")  # Megatron asks where its tensors go

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel import random as tp_random  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.moe.experts import GroupedMLP  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


def said_to_be_bfloat16(function):
    """Return a method of Megatron's GroupedMLP, which wants to be of that type, for a model that becomes float32."""

    def call(self, *arguments, **options):
        config = self.config if hasattr(self, "config") else arguments[1]
        config.params_dtype, config.bf16 = torch.bfloat16, True
        result = function(self, *arguments, **options)
        config.params_dtype, config.bf16 = torch.float32, False
        return result

    return call


GroupedMLP.__init__ = said_to_be_bfloat16(GroupedMLP.__init__)
GroupedMLP.forward = said_to_be_bfloat16(GroupedMLP.forward)
moe_utils.te_general_gemm = None  # the name is missing without TransformerEngine

for tracker in (tp_random.CudaRNGStatesTracker,):  # no dropout here, so no CUDA generator is needed
    tracker.fork = lambda self, name="": contextlib.nullcontext()


def experts(args):
    """Return what the configuration says of experts."""
    if not getattr(args, "num_experts", None):
        return {}
    same = ("moe_router_topk", "moe_ffn_hidden_size", "moe_router_load_balancing_type", "moe_aux_loss_coeff",
            "moe_z_loss_coeff", "moe_grouped_gemm")  # fmt: skip
    return {"num_moe_experts": args.num_experts, **{name: getattr(args, name) for name in same}}


def build(args):
    """Return a GPTModel of the checkpoint's own arguments."""
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        ffn_hidden_size=args.ffn_hidden_size,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        add_bias_linear=args.add_bias_linear,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=True,
        **experts(args),
    )
    spec = get_gpt_layer_local_spec(
        num_experts=getattr(args, "num_experts", None),
        moe_grouped_gemm=getattr(args, "moe_grouped_gemm", False),
        normalization=args.normalization,
    )
    return GPTModel(
        config,
        spec,
        args.padded_vocab_size,
        args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
    )


def main(path, tokens_file, logits_file):
    """Load and run."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    if (path / ".metadata").exists():
        common = dist_checkpointing.load_common_state_dict(str(path))
        model = build(common["args"])
        wanted = {"model": model.sharded_state_dict()}
        model.load_state_dict(dist_checkpointing.load(wanted, str(path))["model"], strict=True)
    else:
        state = torch.load(path / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
        model = build(state["args"])
        model.float().load_state_dict(state["model"], strict=True)
    tokens = torch.from_numpy(np.load(tokens_file)).long()
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        logits = model.float().eval()(tokens, positions, mask)
    np.save(logits_file, logits.float().numpy())


main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
