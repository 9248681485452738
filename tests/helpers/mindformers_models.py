"""Models of Hugging Face's goldens as MindFormers' directories: names and orientations written down by hand."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import yaml
from mindspore.train.checkpoint_pb2 import Checkpoint
from safetensors.numpy import load_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "hf"
SIZES = {"seq_length": 256, "vocab_size": 320, "hidden_size": 64, "num_layers": 3, "num_heads": 4}
MODELS = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**SIZES, "expand_ratio": 4, "hidden_act": "gelu"}),
    "llama": ("LlamaConfig", "LlamaForCausalLM",
              {**SIZES, "n_kv_heads": 2, "intermediate_size": 176, "rms_norm_eps": "1e-6", "multiple_of": 256}),
    "bert": ("BertConfig", "BertForQuestionAnswering",
             {**SIZES, "seq_length": 48, "max_position_embeddings": 64, "type_vocab_size": 2, "embedding_size": 64,
              "use_relative_positions": False, "expand_ratio": 2, "hidden_dropout_prob": 0.0}),
    "bert_words": ("BertConfig", "BertForPreTraining",
                   {"seq_length": 48, "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3,
                    "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64,
                    "hidden_act": "gelu", "post_layernorm_residual": True, "use_one_hot_embeddings": False}),
}  # fmt: skip


def write(path: Path, tensors: dict[str, np.ndarray], parts: int = 1, checksum: bool = False) -> None:
    """Write a `.ckpt` as MindSpore does; tensors in several parts as it writes those above 512 MiB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    message = Checkpoint()
    for name, array in tensors.items():
        for part in np.array_split(array.reshape(-1), parts):
            value = message.value.add()
            value.tag = name
            value.tensor.dims.extend(array.shape)
            value.tensor.tensor_type = {"float32": "Float32", "float16": "Float16", "int32": "Int32"}[array.dtype.name]
            value.tensor.tensor_content = part.tobytes()
    data = message.SerializeToString()
    if checksum:
        data += b"crc_num" + zlib.crc32(data).to_bytes(10, "big")
    path.write_bytes(data)


def gpt2_names(hf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's GPT-2 under MindFormers' names: c_attn in three, each transposed, other matrices as they are."""
    found = {
        "backbone.embedding.word_embedding.embedding_table": hf["transformer.wte.weight"],
        "backbone.embedding.position_embedding.embedding_table": hf["transformer.wpe.weight"],
        "backbone.layernorm.gamma": hf["transformer.ln_f.weight"],
        "backbone.layernorm.beta": hf["transformer.ln_f.bias"],
    }  # fmt: skip
    for i in range(3):
        there, here = f"transformer.h.{i}.", f"backbone.blocks.{i}."
        for n in "12":
            found[f"{here}layernorm{n}.gamma"] = hf[f"{there}ln_{n}.weight"]
            found[f"{here}layernorm{n}.beta"] = hf[f"{there}ln_{n}.bias"]
        for kind in ("weight", "bias"):
            parts = np.split(hf[f"{there}attn.c_attn.{kind}"], 3, axis=-1)
            found.update({f"{here}attention.dense{n}.{kind}": part.T for n, part in enumerate(parts, 1)})
            for mine, theirs in (("attention.projection", "attn.c_proj"), ("output.mapping", "mlp.c_fc"),
                                 ("output.projection", "mlp.c_proj")):  # fmt: skip
                found[f"{here}{mine}.{kind}"] = hf[f"{there}{theirs}.{kind}"]
    return found


def llama_names(hf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's LLaMA under MindFormers' names."""
    words = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "embed_tokens.weight": "tok_embeddings.embedding_weight",
             "model.norm.": "model.norm_out."}  # fmt: skip
    found = {}
    for name, array in hf.items():
        for theirs, mine in words.items():
            name = name.replace(theirs, mine)
        found[name] = array
    return found


def bert_names(hf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's BERT under MindFormers' names: its first norm behind the MLP, matrices of outputs [in, out]."""
    e, p = "bert.embeddings.", "bert.embedding_postprocessor."
    found = {
        "bert.word_embedding.embedding_table": hf[f"{e}word_embeddings.weight"],
        f"{p}full_position_embedding.embedding_table": hf[f"{e}position_embeddings.weight"],
        f"{p}token_type_embedding.embedding_table": hf[f"{e}token_type_embeddings.weight"],
        f"{p}layernorm.gamma": hf[f"{e}LayerNorm.weight"], f"{p}layernorm.beta": hf[f"{e}LayerNorm.bias"],
    }  # fmt: skip
    tops = {"qa_outputs": "qa_outputs", "bert.pooler.dense": "bert.dense", "cls.seq_relationship": "nsploss.dense",
            "cls.predictions.transform.dense": "mlmloss.dense"}  # fmt: skip
    for name, array in hf.items():
        module, _, kind = name.rpartition(".")
        if module in tops:
            found[f"{tops[module]}.{kind}"] = array
        elif module == "cls.predictions.transform.LayerNorm":
            found[f"mlmloss.layernorm.{ {'weight': 'gamma', 'bias': 'beta'}[kind] }"] = array
        elif name == "cls.predictions.bias":
            found["mlmloss.output_bias"] = array
    linear = {"attention.self.query": "attention.dense1", "attention.self.key": "attention.dense2",
              "attention.self.value": "attention.dense3", "attention.output.dense": "attention.projection",
              "intermediate.dense": "output.mapping", "output.dense": "output.projection"}  # fmt: skip
    for i in range(3):
        there, here = f"bert.encoder.layer.{i}.", f"bert.bert_encoder.encoder.blocks.{i}."
        for theirs, mine in linear.items():
            weight = hf[f"{there}{theirs}.weight"]
            found[f"{here}{mine}.weight"] = weight if "self" in theirs else weight.T
            found[f"{here}{mine}.bias"] = hf[f"{there}{theirs}.bias"]
        for theirs, mine in (("attention.output.LayerNorm", "layernorm2"), ("output.LayerNorm", "layernorm1")):
            found[f"{here}{mine}.gamma"] = hf[f"{there}{theirs}.weight"]
            found[f"{here}{mine}.beta"] = hf[f"{there}{theirs}.bias"]
    return found


def published(name: str) -> dict[str, np.ndarray]:
    if name == "bert":
        return bert_names(load_file(GOLDEN / "bert" / "model.safetensors"))
    return {"gpt2": gpt2_names, "llama": llama_names}[name](load_file(GOLDEN / "weights" / f"{name}.safetensors"))


def make(folder: Path, name: str, tensors: dict[str, np.ndarray] | None = None, **changes: object) -> Path:
    folder.mkdir(parents=True)
    kind, architecture, values = MODELS[name]
    model = {"model_config": {"type": kind, **values, **changes}, "arch": {"type": architecture}}
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": model, "seed": 0}), encoding="utf-8")
    if tensors is not None:
        write(folder / "model.ckpt", {key: np.ascontiguousarray(value) for key, value in tensors.items()})
    return folder
