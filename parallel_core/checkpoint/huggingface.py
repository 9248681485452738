"""Hugging Face directories (`config.json` and safetensors) of GPT-2 and LLaMA-like models, read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.checkpoint.dtypes import storage_dtype
from parallel_core.checkpoint.layout_files import write_durably
from parallel_core.checkpoint.safetensors_file import StreamTensor, read_header, write_safetensors
from parallel_core.checkpoint.source import Blob, Piece, PieceSource, TensorInfo, TensorSource
from parallel_core.errors import CheckpointError, bullet_list

INDEX_NAME = "model.safetensors.index.json"
_LLAMA_TYPES = ("llama", "mistral", "qwen2")
_IGNORED = re.compile(r".*(rotary_emb\.inv_freq|attn\.(masked_)?bias)")


@dataclass(frozen=True)
class Part:
    """Rows of one of our tensors that are rows of one of theirs.

    Attributes:
        name: their tensor.
        ours: first row in our tensor.
        theirs: first row in their tensor (after `transpose`).
        rows: how many; 0 for the whole tensor.
        transpose: whether theirs is stored [in, out], as GPT-2's are.
    """

    name: str
    ours: int = 0
    theirs: int = 0
    rows: int = 0
    transpose: bool = False


def is_hugging_face(path: Path) -> bool:
    """Tell whether a directory holds a Hugging Face model in safetensors files."""
    return (path / "config.json").exists() and any(path.glob("*.safetensors"))


def _qkv_parts(config: Mapping[str, Any], query: Part, key: Part, value: Part) -> list[Part]:
    """Return the parts of a group-interleaved qkv: per group its query heads, its key, its value.

    Args:
        config: model settings.
        query: where their query rows begin.
        key: where their key rows begin.
        value: where their value rows begin.
    """
    size, groups = config["kv_channels"], config["num_query_groups"]
    queries = config["num_attention_heads"] // groups * size
    parts, at = [], 0
    for group in range(groups):
        for base, rows in ((query, queries), (key, size), (value, size)):
            parts.append(Part(base.name, at, base.theirs + group * rows, rows, base.transpose))
            at += rows
    return parts


def _parts(model_type: str, config: Mapping[str, Any]) -> dict[str, list[Part]]:
    """Return, for every tensor this model could have, which of theirs it consists of."""
    table = _gpt2_parts(config) if model_type == "gpt2" else _llama_parts(config)
    return {ours: theirs if isinstance(theirs, list) else [theirs] for ours, theirs in table.items()}


def _llama_parts(config: Mapping[str, Any]) -> dict[str, Part | list[Part]]:
    ffn = config["ffn_hidden_size"]
    table: dict[str, Part | list[Part]] = {
        "embedding.word_embeddings.weight": Part("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": Part("model.norm.weight"),
        "output_layer.weight": Part("lm_head.weight"),
    }
    for i in range(config["num_layers"]):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        table[f"{ours}.input_layernorm.weight"] = Part(f"{theirs}.input_layernorm.weight")
        table[f"{ours}.pre_mlp_layernorm.weight"] = Part(f"{theirs}.post_attention_layernorm.weight")
        for kind in ("weight", "bias"):
            names = [f"{theirs}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            table[f"{ours}.self_attention.linear_qkv.{kind}"] = _qkv_parts(config, *map(Part, names))
            table[f"{ours}.self_attention.linear_proj.{kind}"] = Part(f"{theirs}.self_attn.o_proj.{kind}")
            table[f"{ours}.mlp.linear_fc1.{kind}"] = [
                Part(f"{theirs}.mlp.gate_proj.{kind}", 0, 0, ffn),
                Part(f"{theirs}.mlp.up_proj.{kind}", ffn, 0, ffn),
            ]
            table[f"{ours}.mlp.linear_fc2.{kind}"] = Part(f"{theirs}.mlp.down_proj.{kind}")
    return table


def _gpt2_parts(config: Mapping[str, Any]) -> dict[str, Part | list[Part]]:
    hidden = config["hidden_size"]
    table: dict[str, Part | list[Part]] = {
        "embedding.word_embeddings.weight": Part("wte.weight"),
        "embedding.position_embeddings.weight": Part("wpe.weight"),
    }
    for kind in ("weight", "bias"):
        turned = kind == "weight"
        table[f"decoder.final_layernorm.{kind}"] = Part(f"ln_f.{kind}")
        for i in range(config["num_layers"]):
            ours, theirs = f"decoder.layers.{i}", f"h.{i}"
            qkv = f"{theirs}.attn.c_attn.{kind}"
            table[f"{ours}.input_layernorm.{kind}"] = Part(f"{theirs}.ln_1.{kind}")
            table[f"{ours}.pre_mlp_layernorm.{kind}"] = Part(f"{theirs}.ln_2.{kind}")
            table[f"{ours}.self_attention.linear_qkv.{kind}"] = _qkv_parts(
                config, *(Part(qkv, theirs=n * hidden, transpose=turned) for n in range(3))
            )
            table[f"{ours}.self_attention.linear_proj.{kind}"] = Part(f"{theirs}.attn.c_proj.{kind}", transpose=turned)
            table[f"{ours}.mlp.linear_fc1.{kind}"] = Part(f"{theirs}.mlp.c_fc.{kind}", transpose=turned)
            table[f"{ours}.mlp.linear_fc2.{kind}"] = Part(f"{theirs}.mlp.c_proj.{kind}", transpose=turned)
    return table


class HuggingFaceCheckpoint(PieceSource):
    """A Hugging Face model directory as global tensors; iteration 0, no optimizer state."""

    def __init__(self, path: str | Path) -> None:
        """Read `config.json` and the headers of the safetensors files.

        Raises:
            CheckpointError: the model is of another kind, or a tensor is missing, unexpected or damaged.
        """
        path = Path(path)
        model_type, config = _read_config(path)
        blobs: dict[str, Blob] = {}
        for file in sorted(path.glob("*.safetensors")):
            blobs.update({name.removeprefix("transformer."): blob for name, blob in read_header(file)[0].items()})
        tied = config["untie_embeddings_and_output_weights"] is False
        if tied:
            blobs.pop("lm_head.weight", None)
        tensors, used = {}, set()
        for name, parts in _parts(model_type, config).items():
            if all(part.name in blobs for part in parts):
                used |= {part.name for part in parts}
                tensors[name] = _assembled(path, name, parts, blobs)
        left = [name for name in sorted(set(blobs) - used) if not _IGNORED.fullmatch(name)]
        needed = [name for name in _parts(model_type, config) if name.endswith(".weight")]
        missing = [name for name in needed if name not in tensors and not (tied and name == "output_layer.weight")]
        if left or missing:
            raise CheckpointError(
                f"{path}: {len(left)} tensors of no known place, {len(missing)} missing:\n"
                f"{bullet_list([*left, *(f'missing {name}' for name in missing)])}"
            )
        config["padded_vocab_size"] = tensors["embedding.word_embeddings.weight"][0].shape[0]
        common = {"iteration": 0, "consumed_train_samples": 0, "consumed_valid_samples": 0, "model_config": config}
        super().__init__(path, "hugging face", tensors, common)


def _assembled(path: Path, name: str, parts: list[Part], blobs: Mapping[str, Blob]) -> tuple[TensorInfo, list[Piece]]:
    pieces, rows = [], 0
    for part in parts:
        blob = blobs[part.name].transposed() if part.transpose else blobs[part.name]
        count = part.rows or blob.shape[0]
        if part.theirs + count > blob.shape[0]:
            raise CheckpointError(
                f"{path}: {part.name} has {blob.shape[0]} rows, config.json needs {part.theirs + count}"
            )
        cut = blob.crop([(part.theirs, part.theirs + count), *((0, n) for n in blob.shape[1:])])
        pieces.append(Piece((part.ours, *(0 for _ in blob.shape[1:])), cut.shape, cut))
        rows = max(rows, part.ours + count)
    first = blobs[parts[0].name]
    width = (first.transposed() if parts[0].transpose else first).shape[1:]
    return TensorInfo((rows, *width), first.dtype), pieces


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    file = path / "config.json"
    try:
        found = json.loads(file.read_bytes())
        model_type = found["model_type"]
        if model_type == "gpt2":
            return model_type, _from_gpt2(found)
        if model_type in _LLAMA_TYPES:
            return model_type, _from_llama(file, found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from None
    raise CheckpointError(f"{file}: model_type {model_type!r} is not gpt2 or one of {', '.join(_LLAMA_TYPES)}")


def _from_gpt2(found: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = found["n_embd"], found["n_head"]
    return {
        "num_layers": found["n_layer"], "hidden_size": hidden, "ffn_hidden_size": found.get("n_inner") or 4 * hidden,
        "num_attention_heads": heads, "num_query_groups": heads, "kv_channels": hidden // heads,
        "max_position_embeddings": found["n_positions"], "vocab_size": found["vocab_size"],
        "position_embedding_type": "learned_absolute", "normalization": "LayerNorm",
        "norm_epsilon": found.get("layer_norm_epsilon", 1e-5), "swiglu": False, "add_bias_linear": True,
        "add_qkv_bias": True, "qk_layernorm": False, "untie_embeddings_and_output_weights": False,
    }  # fmt: skip


def _from_llama(file: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    if found.get("rope_scaling"):
        raise CheckpointError(f"{file}: rope_scaling={found['rope_scaling']!r} has no counterpart here")
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    attention_bias = bool(found.get("attention_bias")) or found["model_type"] == "qwen2"
    return {
        "num_layers": found["num_hidden_layers"], "hidden_size": hidden, "ffn_hidden_size": found["intermediate_size"],
        "num_attention_heads": heads, "num_query_groups": found.get("num_key_value_heads") or heads,
        "kv_channels": found.get("head_dim") or hidden // heads, "vocab_size": found["vocab_size"],
        "max_position_embeddings": found["max_position_embeddings"], "position_embedding_type": "rope",
        "rotary_base": int(found.get("rope_theta", 10000)), "rotary_percent": 1.0, "rotary_interleaved": False,
        "normalization": "RMSNorm", "norm_epsilon": found.get("rms_norm_eps", 1e-6), "swiglu": True,
        "add_bias_linear": False, "add_qkv_bias": attention_bias, "qk_layernorm": False,
        "untie_embeddings_and_output_weights": not found.get("tie_word_embeddings", False),
    }  # fmt: skip


def write_hugging_face(
    source: TensorSource, path: Path, progress: Callable[[int], None], max_file_bytes: int = 5_000_000_000
) -> None:
    """Write a model's parameters as a Hugging Face directory, one tensor in memory at a time.

    Padding rows of the vocabulary are left out when its true size is known.

    Args:
        source: the opened checkpoint.
        path: an existing empty directory.
        progress: told after each tensor how many bytes it had.
        max_file_bytes: size at which a new file begins.

    Raises:
        CheckpointError: the model is neither GPT-2 nor LLaMA-like.
    """
    config = dict(source.common.get("model_config") or {})
    names = [key for key in source.keys() if "@" not in key]  # noqa: SIM118 - a method of the protocol
    model_type = _model_type(source, config, set(names))
    info = source.info("embedding.word_embeddings.weight")
    table = _parts(model_type, config)
    theirs = _their_tensors(source, names, table, int(config.get("vocab_size") or info.shape[0]), progress)
    files = _files(theirs, max_file_bytes)
    total = 0
    where: dict[str, str] = {}
    for i, members in enumerate(files):
        several = len(files) > 1
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" if several else "model.safetensors"
        write_safetensors(path / file, {name: theirs[name] for name in members}, {"format": "pt"})
        where.update(dict.fromkeys(members, file))
        total += sum(theirs[name].nbytes for name in members)
    if len(files) > 1:
        write_durably(path / INDEX_NAME, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
    vocabulary = int(config.get("vocab_size") or info.shape[0])
    write_durably(path / "config.json", json.dumps(_to_config(model_type, config, vocabulary, info.dtype), indent=2))


def _model_type(source: TensorSource, config: Mapping[str, Any], names: set[str]) -> str:
    shape = (config.get("normalization"), config.get("position_embedding_type"), bool(config.get("swiglu")))
    qkv_bias = "decoder.layers.0.self_attention.linear_qkv.bias" in names
    if shape == ("LayerNorm", "learned_absolute", False) and "output_layer.weight" not in names and qkv_bias:
        return "gpt2"
    interleaved = config.get("rotary_interleaved") or (config.get("rotary_percent") or 1.0) != 1.0
    if shape == ("RMSNorm", "rope", True) and not interleaved:
        return "qwen2" if qkv_bias else "llama"
    raise CheckpointError(
        f"{source.path} is neither GPT-2 (LayerNorm, learned positions, biases, tied) nor LLaMA-like (RMSNorm, full "
        f"RoPE, swiglu): normalization={shape[0]}, position_embedding_type={shape[1]}, swiglu={shape[2]}"
    )


def _their_tensors(
    source: TensorSource, names: list[str], table: Mapping[str, list[Part]], vocabulary: int,
    progress: Callable[[int], None],
) -> dict[str, StreamTensor]:  # fmt: skip
    """Return their tensors by name, each put together from our rows when it is written."""
    foreign = [name for name in names if name not in table]
    if foreign:
        raise CheckpointError(f"{source.path}: {len(foreign)} tensors have no place there:\n{bullet_list(foreign)}")
    rows_of: dict[str, list[tuple[str, Part]]] = {}
    for name in names:
        for part in table[name]:
            rows_of.setdefault(part.name, []).append((name, part))
    result = {}
    for theirs, parts in rows_of.items():
        info = source.info(parts[0][0])
        count = sum(part.rows or info.shape[0] for _, part in parts)
        if parts[0][0] in ("embedding.word_embeddings.weight", "output_layer.weight"):
            count = min(count, vocabulary)
        shape = (count, *info.shape[1:])
        stored = shape[::-1] if parts[0][1].transpose else shape

        def read(
            parts: list[tuple[str, Part]] = parts, shape: tuple[int, ...] = shape, dtype: str = info.dtype
        ) -> np.ndarray:
            out = np.empty(shape, storage_dtype(dtype))
            for ours, part in parts:
                rows = part.rows or shape[0]
                target = out[part.theirs : part.theirs + rows]
                source.read_into(ours, [(part.ours, part.ours + rows), *((0, n) for n in shape[1:])], target)
            progress(out.nbytes)
            return out.T if parts[0][1].transpose else out

        result[theirs] = StreamTensor.reading(stored, info.dtype, read)
    return result


def _files(tensors: Mapping[str, StreamTensor], max_file_bytes: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.nbytes
    return files


def _to_config(model_type: str, config: Mapping[str, Any], vocabulary: int, dtype: str) -> dict[str, Any]:
    if model_type == "gpt2":
        return {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": config["hidden_size"],
            "n_layer": config["num_layers"], "n_head": config["num_attention_heads"],
            "n_inner": config["ffn_hidden_size"], "n_positions": config["max_position_embeddings"],
            "n_ctx": config["max_position_embeddings"], "vocab_size": vocabulary, "torch_dtype": dtype,
            "layer_norm_epsilon": config.get("norm_epsilon") or 1e-5, "tie_word_embeddings": True,
        }  # fmt: skip
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[model_type]
    return {
        "model_type": model_type, "architectures": [architecture], "hidden_act": "silu",
        "hidden_size": config["hidden_size"], "num_hidden_layers": config["num_layers"],
        "intermediate_size": config["ffn_hidden_size"], "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_query_groups"], "head_dim": config["kv_channels"],
        "max_position_embeddings": config["max_position_embeddings"], "vocab_size": vocabulary,
        "rope_theta": float(config.get("rotary_base") or 10000), "rms_norm_eps": config.get("norm_epsilon") or 1e-5,
        "tie_word_embeddings": not config.get("untie_embeddings_and_output_weights"), "torch_dtype": dtype,
    }  # fmt: skip
