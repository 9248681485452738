"""Every field of the configuration is read by the program, not only filled in."""

from __future__ import annotations

import ast

from config_helpers import ROOT
from test_table_coverage import all_fields

# Fields that do their work within the configuration, through the values that its rules make of them.
WITHIN_THE_CONFIG = {
    "model_config.group_query_attention": "num_query_groups",
    "dataset_config.make_vocab_size_divisible_by": "vocab_size",
    "parallel_config.num_layers_per_virtual_pipeline_stage": "virtual_pipeline_model_parallel_size",
    "training_config.exit_on_missing_checkpoint": "checkpoint_args.NEEDS_CHECKPOINT",
    "training_config.bf16": "compute_dtype and params_dtype",
    "training_config.fp16": "compute_dtype and params_dtype",
    "model_config.fa_config.pre_tokens": "TransformerConfig.window_of",
    "model_config.mla.rope_type": "TransformerConfig.has_yarn",
    "model_config.window_attn_skip_freq": "TransformerConfig.window_of",
    "parallel_config.expert_tensor_parallel_size": "ModelParallelConfig.expert_tensor_size",
    "model_config.moe.moe_layer_freq": "MoEConfig.has_experts",
    "model_config.moe.moe_expert_capacity_factor": "MoEConfig.capacity",
    "model_config.moe.moe_aux_loss_coeff": "MoEConfig.balancing_losses",
    "model_config.recompute_modules": "TransformerConfig.recomputes",
    "model_config.moe.moe_layer_recompute": "TransformerConfig.recomputes",
    # Refused unless they ask for nothing.
    "model_config.fa_config.next_tokens": "refused above 0",
}
# Fields that nothing reads: arguments that are accepted and do nothing. The set is to be empty.
UNREAD: set[str] = set()


def names_read() -> set[str]:
    """Attribute names that the code outside parallel_core/config loads."""
    found: set[str] = set()
    for file in [*(ROOT / "parallel_core").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), ROOT / "pretrain_gpt.py"]:
        if (ROOT / "parallel_core" / "config") in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
    return found


def test_every_field_is_read():
    read = names_read()
    unread = {path for path in all_fields() if path.split(".")[-1] not in read}
    assert unread - set(WITHIN_THE_CONFIG) - UNREAD == set(), "fields that nothing reads"
    assert UNREAD - unread == set(), "these are read now: take them out of UNREAD"
