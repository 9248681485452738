"""Rules of bidirectional encoders."""

from __future__ import annotations

from parallel_core.config import table
from parallel_core.config.resolution import Resolution, Rules
from parallel_core.config.schema import DEFAULTS

BERT_CHECKS = Rules()


@BERT_CHECKS
def question_answering(r: Resolution) -> None:
    """Questions have files of their own, and leave their windows room."""
    if r["bert_head"] != "question_answering":
        return
    if not r["data_path"] and not r["train_data_path"]:
        r.fail("bert_head", "needs questions; give data_path (train-v1.1.json's folder) or train_data_path (a file)")
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        if r[name] and len(r[name]) > 1:
            r.fail(f"bert_head {name}", "questions come from one file")
    if r["num_tokentypes"] < 2:
        r.fail("bert_head num_tokentypes", "questions and contexts are two segments; write num_tokentypes 2")
    if not str(r["tokenizer_type"]).startswith("BertWordPiece"):
        r.fail("bert_head tokenizer_type", "reads WordPiece; write BertWordPieceLowerCase, and vocab_file")
    for name in ("doc_stride", "max_query_length"):
        if r[name] < 1:
            r.fail(name, "must be at least 1")
    if r.positive("seq_length") and r["seq_length"] - r["max_query_length"] - 3 < r["doc_stride"]:
        r.fail("seq_length max_query_length doc_stride", "a window is the first less the second and 3, and must not be "
               "shorter than the stride")


_OF_ENCODERS = "num_tokentypes mask_prob short_seq_prob bert_binary_head doc_stride max_query_length"
_OF_DECODERS = """
    multi_latent_attention num_experts mtp_num_layers qk_layernorm use_sandwich_norm parallel_residual
    apply_residual_connection_post_layernorm scale_attn_by_inverse_layer_idx apply_query_key_layer_scaling
    reset_attention_mask reset_position_ids lora_rank sft
"""


@BERT_CHECKS
def encoders(r: Resolution) -> None:
    """An encoder has learned positions, norms after the additions, and whole sequences on a rank."""
    if r["bert_head"] == "none":
        for name in _OF_ENCODERS.split():
            field = table.BY_NAME[name].fields[0]
            if r[name] != (DEFAULTS[field] if table.BY_NAME[name].direct else True):
                r.fail(name, "belongs to bert_head; give that too (bash pretrain_bert.sh does), or leave it out")
        return
    if not 0 < r["mask_prob"] < 1:
        r.fail("mask_prob", "must lie between 0 and 1")
    if not 0 <= r["short_seq_prob"] <= 1:
        r.fail("short_seq_prob", "must lie in 0 to 1")
    if r["mock_data"]:
        r.fail("bert_head mock_data", "mock data has no sentences; give data_path")
    if r["bert_head"] == "encoder":
        r.fail("bert_head", "has no task to be trained for; give pretraining, masked_lm or question_answering")
    if r["bert_head"] == "pretraining" and r["num_tokentypes"] < 2:
        r.fail("bert_head num_tokentypes", "has two segments; write num_tokentypes 2, or bert_head masked_lm")
    if r["num_tokentypes"] < 1:
        r.fail("num_tokentypes", "must be at least 1")
    for name, only in (("position_embedding_type", "learned_absolute"), ("normalization", "LayerNorm")):
        if r[name] != only:
            r.fail(f"bert_head {name}", f"an encoder has {only}; write that, or leave it out")
    if r["top_query_layer"] != "none":
        r.fail("bert_head top_query_layer", "are of two models; give one")
    if r["embedding_multiplier"] != 1.0:
        r.fail("bert_head embedding_multiplier", "an encoder's embeddings are normed; leave one out")
    for name in _OF_DECODERS.split():
        if r[name]:
            r.fail(f"bert_head {name}", "an encoder has no form of it; leave one out")
    if r["attention_backend"] in ("flash", "fused"):  # use_flash_attn alone is what every configuration says
        r.fail("bert_head attention_backend", "an encoder has no form of it; leave one out")
    if r["pre_tockens"] is not None and r["pre_tockens"] != DEFAULTS["model_config.fa_config.pre_tokens"]:
        r.fail("bert_head pre_tockens", "an encoder sees all positions; leave one out")
    if r["context_parallel_size"] != 1:
        r.fail("bert_head context_parallel_size", "an encoder's sequences are whole on every rank; write "
               "context_parallel_size 1, or cut heads by tensor_model_parallel_size")
