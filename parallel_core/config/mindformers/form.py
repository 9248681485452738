"""A YAML file of MindFormers' `run_mindformer.py` in Megatron's names.

Every key is mapped, ignored with a reason, or refused by name; `keys.txt` says which. Its rows stand under a header:
`[mapped]` (`key -> argument`), `[read: ...]` (a key whose meaning depends on others, which stands in this file),
`[ignored: reason]`, and `[refused: what is missing]` (`key = value that asks for nothing`). A row `section.*` is every
key of a section.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from parallel_core.config import table
from parallel_core.config.mindformers.models import FAMILIES, GENERATION, IGNORED, Family, number_or_word
from parallel_core.config.mindformers.schedule import schedule_arguments
from parallel_core.config.values import Given
from parallel_core.config.yaml_tree import Leaf, read_leaves
from parallel_core.errors import ConfigError, DataError

_MARKS = ("runner_config", "runner_wrapper", "run_mode", "base_config")
_MOST_FILES = 32
_MODES = {"DATA_PARALLEL": 0, "SEMI_AUTO_PARALLEL": 1, "AUTO_PARALLEL": 2, "HYBRID_PARALLEL": 3, "STAND_ALONE": 0}
_TRAINERS = ("CausalLanguageModelingTrainer", "MaskedLanguageModelingTrainer", "GeneralTaskTrainer",
             "TextClassificationTrainer", "QuestionAnsweringTrainer")  # fmt: skip
"""GPT-2's first files call it masked."""
_OPTIMIZERS = ("FusedAdamWeightDecay", "AdamWeightDecay", "FP32StateAdamWeightDecay", "FusedFP32StateAdamWeightDecay",
               "adamw", "AdamW", "FusedCastAdamWeightDecay")  # fmt: skip
_CALLBACKS = ("MFLossMonitor", "SummaryMonitor", "ObsMonitor", "ProfileMonitor", "EvalCallBack", "CheckpointMointor",
              "CheckpointMonitor")  # fmt: skip
_SAVING = ("CheckpointMointor", "CheckpointMonitor")
_SAVING_KEYS = {"save_checkpoint_steps": "save_interval", "keep_checkpoint_max": "keep_checkpoint_max",
                "prefix": "ckpt_prefix", "async_save": "async_save"}  # fmt: skip
_WRAPPERS = ("MFTrainOneStepCell", "MFPipelineWithLossScaleCell", "TrainOneStepCell", "wrapper")
_ATTENTION = {"dense1": "linear_qkv", "dense2": "linear_qkv", "dense3": "linear_qkv", "wq": "linear_qkv",
              "wk": "linear_qkv", "wv": "linear_qkv", "w_qkv": "linear_qkv", "wo": "linear_proj",
              "projection": "linear_proj", "mapping": "linear_fc1", "w1": "linear_fc1", "w3": "linear_fc1",
              "w2": "linear_fc2"}  # fmt: skip
"""Linear layers that adapters may stand beside, theirs -> ours."""
MODEL = "model.model_config."


def is_mindformers(leaves: Iterable[Leaf]) -> bool:
    """Tell whether the values of a file are in MindFormers' form."""
    return any(leaf.path[0] in _MARKS or leaf.path[:2] == ("model", "model_config") for leaf in leaves)


def with_base_files(leaves: list[Leaf], file: str, seen: tuple[str, ...] = ()) -> tuple[list[Leaf], list[str]]:
    """Return the values of a file over those of the files that its `base_config` names, and what is wrong with them.

    Args:
        leaves: values of `file`.
        file: where they stand; names are relative to its folder.
        seen: files that led here.

    Raises:
        ConfigError: a file cannot be read, or files name each other.
    """
    named = [leaf for leaf in leaves if leaf.path == ("base_config",)]
    own = [leaf for leaf in leaves if leaf.path != ("base_config",)]
    if not named:
        return leaves, []
    files = named[0].value if isinstance(named[0].value, list) else [named[0].value]
    chain = (*seen, os.path.realpath(file))
    merged: dict[tuple[str, ...], Leaf] = {}
    problems: list[str] = []
    for name in files:
        path = str(Path(file).parent / str(name))
        if os.path.realpath(path) in chain or len(chain) > _MOST_FILES:
            raise ConfigError(f"{named[0].source}: base_config: {name} leads back to itself; leave it out")
        base, trouble = read_leaves(path)
        base, more = with_base_files(base, path, chain)
        problems += trouble + more
        _put_over(merged, base)
    _put_over(merged, own)
    return list(merged.values()), problems


def _put_over(merged: dict[tuple[str, ...], Leaf], leaves: Iterable[Leaf]) -> None:
    """Let values stand over earlier ones; a section takes the place of a value, and a value that of a section."""
    for leaf in leaves:
        for path in [path for path in merged if path != leaf.path]:
            shorter = min(len(path), len(leaf.path))
            if path[:shorter] == leaf.path[:shorter]:
                del merged[path]
        merged[leaf.path] = leaf


def read_mindformers(
    leaves: Iterable[Leaf], user_names: Iterable[str] = ()
) -> tuple[list[Given], list[str], list[str]]:
    """Return what the values mean in Megatron's names, what is wrong with them, and notes on what is ignored."""
    form = _Form({".".join(leaf.path): leaf for leaf in leaves}, frozenset(user_names))
    form.read()
    return form.given, form.problems, form.notes


# ---- what becomes of each key ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """What becomes of a key: `read`, `mapped` (to `argument`), `ignored` or `refused` (for `reason`)."""

    status: str
    reason: str = ""
    argument: str = ""
    harmless: object = None


@lru_cache(maxsize=1)
def key_rows() -> dict[str, Row]:
    """Return the rows of `keys.txt` by key."""
    rows: dict[str, Row] = {}
    status = reason = ""
    for line in (Path(__file__).parent / "keys.txt").read_text(encoding="utf-8").splitlines():
        header = re.fullmatch(r"\[(\w+)(?:: (.*))?\]", line)
        if header:
            status, reason = header[1], header[2] or ""
        elif line and not line.startswith("#"):
            key, _, rest = line.partition(" ")
            argument = rest.removeprefix("-> ") if rest.startswith("-> ") else ""
            harmless = ast.literal_eval(rest.removeprefix("= ")) if rest.startswith("= ") else None
            rows[key] = Row(status, reason, argument, harmless)
    return rows


def row_of(key: str) -> Row | None:
    """Return what becomes of a dotted key outside the model's section; None for an unknown one."""
    return key_rows().get(row_name(key))


def row_name(key: str) -> str:
    """Return the name of a key's row: itself, or a section with all of its keys; itself where there is none."""
    sections = [f"{key[:at]}.*" for at, sign in enumerate(key) if sign == "."]
    return next((name for name in (key, f"{key}.*", *sections) if name in key_rows()), key)


@dataclass
class _Form:
    """One file on its way."""

    leaves: dict[str, Leaf]
    user: frozenset[str]
    given: list[Given] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self) -> None:
        """Read every key."""
        self._keys()
        steps: tuple[Callable[[], None], ...] = (
            self._model, self._batches, self._weights, self._data, self._optimizer, self._wrapper, self._experts,
            self._recomputation, self._callbacks, self._kinds,
        )  # fmt: skip
        for step in steps:
            try:
                step()
            except ConfigError as error:
                self.problems.append(str(error))

    # ---- values ----------------------------------------------------------------------------------------------------
    def value(self, key: str, default: Any = None) -> Any:
        """Return the value of a key; `default` where there is none, or none is said."""
        leaf = self.leaves.get(key)
        return default if leaf is None or leaf.value is None or leaf.value == "None" else leaf.value

    def number(self, key: str, default: Any, least: float = 1, whole: bool = True) -> Any:
        """Return the number of a key."""
        value = number_or_word(self.value(key, default))
        fits = isinstance(value, int) if whole else isinstance(value, (int, float))
        if value is not None and (not fits or isinstance(value, bool) or value < least):
            self.fail(key, f"give a {'whole ' if whole else ''}number, {least} or more")
            return default
        return value

    def switch(self, key: str, default: bool = False) -> bool:
        """Return the truth of a key."""
        value = self.value(key, default)
        if not isinstance(value, bool):
            self.fail(key, "give True or False")
            return default
        return value

    def entries(self, key: str) -> list[dict[str, Any]]:
        """Return the entries of a list of sections; none where it is something else."""
        value = self.value(key, [])
        return value if isinstance(value, list) and all(isinstance(one, dict) for one in value) else []

    def fail(self, key: str, text: str) -> None:
        """Record what is wrong with a key's value."""
        self.problems.append(f"{self.terms(key)}: {text}")

    def terms(self, key: str) -> str:
        """Return a key with its value, as its reader knows it."""
        leaf = self.leaves.get(key)
        return f"{key} (not given)" if leaf is None else Given(key, leaf.value, leaf.source, key, leaf.written).terms

    def give(self, name: str, value: object, *keys: str) -> None:
        """Set an argument; the first of the keys that is there says where it comes from."""
        leaf = next((self.leaves[key] for key in keys if key in self.leaves), None)
        some = next(iter(self.leaves.values()))
        if leaf is None:
            file = some.source.rpartition(":")[0]
            self.given.append(Given(name, value, file, name, value))
            return
        written = " x ".join(key for key in keys if key in self.leaves)
        self.given.append(Given(name, value, leaf.source, written, leaf.written if len(keys) == 1 else value))

    # ---- keys ------------------------------------------------------------------------------------------------------
    def _keys(self) -> None:
        ignored: dict[str, set[str]] = {}
        for key, leaf in self.leaves.items():
            if key.startswith(MODEL) or leaf.value == {}:
                continue
            row = row_of(key)
            if row is None:
                if leaf.path[-1] in self.user and len(leaf.path) == 1:
                    self.given.append(Given(key, leaf.value, leaf.source, key, leaf.written))
                else:
                    self.problems.append(f"{leaf.source}: {key}: unknown key of MindFormers{_nearest(key)}")
            elif row.status == "mapped":
                self.give(row.argument, leaf.value, key)
            elif row.status == "ignored":
                ignored.setdefault(row.reason, set()).add(row_name(key))
            elif row.status == "refused" and leaf.value not in (row.harmless, None):
                self.fail(key, f"not built: {row.reason}")
        self.notes += [f"{', '.join(sorted(keys))}: ignored; {reason}" for reason, keys in ignored.items()]

    def _kinds(self) -> None:
        """Refuse trainers, optimizers and callbacks by name."""
        for key, known in (("trainer.type", _TRAINERS), ("runner_wrapper.type", _WRAPPERS),
                           ("optimizer.type", _OPTIMIZERS)):  # fmt: skip
            if self.value(key) not in (None, *known):
                self.fail(key, f"not built; there are {', '.join(known)}")
        readers = {"question_answering": "SQuADDataLoader", "pretraining": "TFRecordDataset"}
        reader = readers.get(self.encoder, "MindDataset")
        reads = {"SQuADDataLoader": "SQuAD v1.1's folders", "MindDataset": "folders of MindRecord files"}
        for key in ("train_dataset.data_loader.type", "eval_dataset.data_loader.type"):
            if self.value(key) not in (None, reader):
                told = f"{reader} reads {reads[reader]}, --data-path any others" if reader in reads else "leave it out"
                self.fail(key, f"not built; {told}")

    # ---- the model -------------------------------------------------------------------------------------------------
    def family(self) -> Family | None:
        """Return the family of the model; None where it is none that is known."""
        return FAMILIES.get(str(self.value(MODEL + "type")))

    def _model(self) -> None:
        family, kind = self.family(), self.value(MODEL + "type")
        trained = [one.name for one in FAMILIES.values() if one.architectures]
        if family is None or not family.architectures:
            raise ConfigError(f"{self.terms(MODEL + 'type')}: {kind} is not trained from such a file; "
                              f"{', '.join(trained)} are")  # fmt: skip
        head = self.value("model.arch.type", next(iter(family.architectures)))
        if str(head) not in family.architectures:
            self.fail("model.arch.type", f"not built; of {family.name} there are {', '.join(family.architectures)}")
        values: dict[str, Any] = {"head": self.encoder} if self.encoder else {}
        spelled = {**{name: name for name in family.settings}, "head": "head"}
        for key in self.leaves:
            name = key.removeprefix(MODEL)
            if not key.startswith(MODEL) or name == "type" or name.startswith("pet_config"):
                continue
            setting = family.aliases.get(name, name)
            if setting in family.settings and setting != "head":
                value = number_or_word(self.value(key))
                if value is not None and values.get(setting, value) != value:
                    self.fail(key, f"another than {spelled[setting]}, which means the same; leave one out")
                elif value is not None:
                    values[setting], spelled[setting] = value, name
            elif not self._other_model_key(key, name, family):
                self.problems.append(f"{self.leaves[key].source}: {key}: unknown key of {family.name}")
        if self.classes:
            self.give("num_labels", self.number(MODEL + "num_labels", 2), MODEL + "num_labels", "model.arch.type")
        for path, (value, names) in family.fields_of(values).items():
            keys = [MODEL + spelled[name] for name in names]
            if path == "vocab_size" and self.encoder:
                self._pieces(value, keys)
            elif path == "vocab_size":
                self._vocabulary(value, keys)
            elif path == "bert":
                self.give("bert_head", value.bert_head, "model.arch.type")
                self.give("num_tokentypes", value.num_tokentypes, MODEL + "type_vocab_size")
            elif path not in ("params_dtype", "compute_dtype"):
                self.give(table.DIRECT[f"model_config.{path}"].name, value, *keys[:1])
        self._precision(family, values)
        self._adapters()
        if self.encoder:
            unused = sorted(key.removeprefix(MODEL) for key in self.leaves if key.removeprefix(MODEL) in family.ignored)
            if unused:
                self.notes.append(f"{', '.join(unused)}: ignored; of heads for classes, or how tables are looked up, "
                                  "which changes nothing; norms are of float32")  # fmt: skip

    @property
    def encoder(self) -> str:
        """The head of an encoder; empty: the model is none."""
        family = self.family()
        if family is None or family.name != "BertConfig":
            return ""
        usual = next(iter(family.architectures))
        return family.architectures.get(str(self.value("model.arch.type", usual)), family.architectures[usual])

    @property
    def classes(self) -> bool:
        """Whether the model has a head for whole texts."""
        family = self.family()
        return family is not None and family.architectures.get(str(self.value("model.arch.type"))) == "classes"

    def _other_model_key(self, key: str, name: str, family: Family) -> bool:
        """Read a key of the model that is none of its settings, and tell whether it is known."""
        value = self.value(key)
        if name == "use_flash_attention":
            self.give("use_flash_attn", bool(value), key)
            return True
        if name == "initializer_range" and self.encoder:
            self.give("init_method_std", self.number(key, 0.02, 0, whole=False), key)
            return True
        if name in family.ignored:
            return True
        harmless: dict[str, tuple[Any, ...]] = {
            "extend_method": (None, "PI"), "num_labels": (None, 1, 2), "use_relative_positions": (None, False),
            "post_layernorm_residual": (None, bool(self.encoder)),  # an encoder's norms stand behind the additions
            "use_moe": (None, False), "parallel_config": (None, {}), "moe_config": (None, {}), "is_npu_acceleration":
            (None, True, False), "repetition_penalty": (value,),
        }  # fmt: skip
        if name == "scaling_factor":
            factor = self.number(key, 1.0, 0, whole=False)
            if factor != 1.0 and self.value(MODEL + "extend_method") == "PI":
                self.give("rotary_seq_len_interpolation_factor", factor, key)
            elif factor != 1.0:
                self.fail(key, "needs extend_method PI; other ways to longer sequences are not read from such a file")
            return True
        if name in harmless:
            if value not in harmless[name]:
                self.fail(key, "not built")
            return True
        of_prediction = (*GENERATION, "max_length", "max_new_tokens", "ignore_token_id", "checkpoint_name_or_path")
        return name in IGNORED or name in of_prediction

    def _vocabulary(self, rows: int, keys: list[str]) -> None:
        """Say the vocabulary's size, and that records are read as ids; texts of classes need their tokenizer."""
        self.give("make_vocab_size_divisible_by", 1, *keys)  # rows that are there beside would be in the loss
        if self.classes and self._words():
            self.give("vocab_size", rows, *keys)
            return
        self.give("tokenizer_type", "NullTokenizer", *keys)
        self.give("vocab_size", rows - 1, *keys)  # its end of document comes after the vocabulary

    def _pieces(self, rows: int, keys: list[str]) -> None:
        """Say the table's rows, and how an encoder's texts are cut: by the vocab.txt beside the weights."""
        self.give("padded_vocab_size", rows, *keys)
        lower = next((key for key in ("train_dataset.tokenizer.do_lower_case", "processor.tokenizer.do_lower_case")
                      if key in self.leaves), "")  # fmt: skip
        kind = "BertWordPieceLowerCase" if not lower or self.switch(lower, True) else "BertWordPieceCase"
        self.give("tokenizer_type", kind, lower)
        named = ("train_dataset.tokenizer.vocab_file", "load_checkpoint", MODEL + "checkpoint_name_or_path")
        for key in named:
            place = Path(str(self.value(key) or "nowhere"))
            file = place / "vocab.txt" if place.suffix != ".txt" else place
            if self.value(key) and file.is_file():
                self.give("vocab_file", str(file), key)
                return
        self.notes.append("model.arch.type: no vocab.txt lies beside the weights; give --vocab-file")

    def _words(self) -> bool:
        """Read texts with GPT-2's two files beside the weights; tell whether the data are texts, not records of ids."""
        from parallel_core.data.record_dataset import mindrecord_files  # as in `config/vocabulary.py`

        place = self.value("train_dataset.data_loader.dataset_dir")
        if place and mindrecord_files(str(place)):
            return False
        for key in ("load_checkpoint", MODEL + "checkpoint_name_or_path"):
            folder = Path(str(self.value(key) or ""))
            if self.value(key) and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                self.give("tokenizer_type", "GPT2BPETokenizer", key)
                self.give("vocab_file", str(folder / "vocab.json"), key)
                self.give("merge_file", str(folder / "merges.txt"), key)
                return True
        if place:
            self.notes.append("model.arch.type: no vocab.json and merges.txt lie beside the weights; give "
                              "--tokenizer-type GPT2BPETokenizer with --vocab-file and --merge-file")  # fmt: skip
        return bool(place)

    def _precision(self, family: Family, values: Mapping[str, Any]) -> None:
        compute = str(values.get("compute_dtype", family.settings["compute_dtype"].default)).replace("mindspore.", "")
        if compute in ("float16", "bfloat16"):
            self.give("fp16" if compute == "float16" else "bf16", True, MODEL + "compute_dtype")
        if MODEL + "param_init_type" in self.leaves:
            self.notes.append(f"{self.terms(MODEL + 'param_init_type')}: ignored; weights have the type of "
                              "compute_dtype, and float32 masters")  # fmt: skip

    def _adapters(self) -> None:
        pet = MODEL + "pet_config."
        named = [key for key in self.leaves if key.startswith(pet)]
        if not named:
            return
        if str(self.value(pet + "pet_type", "lora")) != "lora":
            self.fail(pet + "pet_type", "not built; lora is")
            return
        self.give("lora_rank", self.number(pet + "lora_rank", 8), pet + "lora_rank")
        self.give("lora_alpha", self.number(pet + "lora_alpha", 16, 0, whole=False), pet + "lora_alpha")
        self.give("lora_dropout", self.number(pet + "lora_dropout", 0.01, 0, whole=False), pet + "lora_dropout")
        targets = next((key for key in (pet + "target_modules", pet + "reg_rules") if key in named), None)
        words = ".*dense1.*|.*dense3.*|.*wq.*|.*wv.*" if targets is None else str(self.value(targets))
        found: dict[str, None] = {}
        for word in words.split("|"):
            name = word.strip(".*$^()\\ ")
            if name not in _ATTENTION:
                self.fail(targets or pet, f"{word!r} is no linear layer; there are {', '.join(_ATTENTION)}")
                return
            found[_ATTENTION[name]] = None
        self.give("lora_target_modules", list(found), *(key for key in (targets,) if key))
        if "linear_qkv" in found:
            self.notes.append("lora_target_modules: queries, keys and values are one layer here, with one adapter")
        for key in named:
            known = ("pet_type", "in_channels", "out_channels", "lora_rank", "lora_alpha", "lora_dropout",
                     "target_modules", "reg_rules", "lora_a_init", "lora_b_init")  # fmt: skip
            if key.removeprefix(pet) not in known:
                self.problems.append(f"{self.leaves[key].source}: {key}: unknown key of adapters")

    # ---- layout and batches ----------------------------------------------------------------------------------------
    def mode(self) -> int:
        """Return the parallel mode: 0 data parallel, 1 semi-automatic, 2 automatic, 3 hybrid."""
        word = self.value("parallel.parallel_mode", 0)
        found = _MODES.get(str(word), word)
        if found not in (0, 1, 2, 3):
            self.fail("parallel.parallel_mode", f"give 0 to 3, or one of {', '.join(_MODES)}")
            return 0
        return int(found)

    def global_batch(self) -> int | None:
        """Return the samples of a step; None where the number of ranks decides."""
        copies = self._copies()
        return None if copies is None else self._microbatch() * self._per_step() * copies

    def _parts(self) -> int:
        """Return the parts of a microbatch, one computed beside the communication of another."""
        cut = self.switch("use_parallel") and self.mode() > 0
        return int(self.number("micro_batch_interleave_num", 1)) if cut else 1

    def _microbatch(self) -> int:
        return int(self.number("runner_config.batch_size", 1)) * self._parts()

    def _copies(self) -> int | None:
        if not self.switch("use_parallel"):
            return 1
        return None if self.mode() == 0 else int(self.number("parallel_config.data_parallel", 1))

    def _per_step(self) -> int:
        """Return the microbatches of a copy of the model in a step."""
        piped = self.switch("use_parallel") and self.mode() and self.number("parallel_config.pipeline_stage", 1) > 1
        number = self.number("parallel_config.micro_batch_num", 1) if piped else 1
        return int(number * self.number("runner_config.gradient_accumulation_steps", 1))

    def _batches(self) -> None:
        sizes = {"model_parallel": "tensor_model_parallel_size", "pipeline_stage": "pipeline_model_parallel_size",
                 "context_parallel": "context_parallel_size",
                 "expert_parallel": "expert_model_parallel_size"}  # fmt: skip
        cut = self.switch("use_parallel") and self.mode() > 0
        for word, name in sizes.items():
            key = f"parallel_config.{word}"
            size = self.number(key, 1)
            if cut and key in self.leaves and (word in ("model_parallel", "pipeline_stage") or size > 1):
                self.give(name, size, key)
            elif size > 1:
                why = "parallel_mode is data parallel" if self.switch("use_parallel") else "use_parallel is False"
                self.notes.append(f"{self.terms(key)}: not used, {why}")
        if cut and self.mode() == 2:
            self.notes.append(f"{self.terms('parallel.parallel_mode')}: layouts are written down here; that of "
                              "parallel_config is used")  # fmt: skip
        if cut and not self.switch("parallel.full_batch", True):
            self.fail("parallel.full_batch", "write True: batch_size is that of a data parallel rank")
        if cut and self.switch("parallel_config.use_seq_parallel"):
            self.give("sequence_parallel", True, "parallel_config.use_seq_parallel")
        shard = next((key for key in ("parallel.enable_parallel_optimizer", "parallel_config.optimizer_shard")
                      if key in self.leaves), None)  # fmt: skip
        if shard is not None and self.switch(shard) and self.switch("use_parallel"):
            self.give("use_distributed_optimizer", True, shard)
        self.give("micro_batch_size", self._microbatch(), "runner_config.batch_size")
        if self._parts() > 1:
            self.give("micro_batch_interleave_num", self._parts(), "micro_batch_interleave_num")
        self.give("micro_batch_num", self._per_step(), "parallel_config.micro_batch_num",
                  "runner_config.gradient_accumulation_steps")  # fmt: skip
        if self.global_batch() is not None:
            self.give("global_batch_size", self.global_batch(), "runner_config.batch_size",
                      "parallel_config.data_parallel", "parallel_config.micro_batch_num")  # fmt: skip

    # ---- weights ---------------------------------------------------------------------------------------------------
    def _weights(self) -> None:
        mode = str(self.value("run_mode", "train"))
        if mode not in ("train", "finetune", "eval", "predict"):
            self.fail("run_mode", "give train, finetune, eval or predict")
        if mode == "predict" and self.encoder:
            self.fail("run_mode", "a training program gives no answers: python -m parallel_core.question_answering "
                      "predict --load DIR")  # fmt: skip
        elif mode == "predict":
            self.fail("run_mode", "a training program continues no text: python run_mindformer.py --run_mode predict, "
                      "or python -m parallel_core.generate --load DIR")  # fmt: skip
        if mode == "eval":
            self.give("skip_train", True, "run_mode")
        old = "resume_or_finetune_checkpoint"
        loads = next((key for key in ("load_checkpoint", old) if self.value(key)), None)
        named = MODEL + "checkpoint_name_or_path"
        adapts = any(key.startswith(MODEL + "pet_config.") for key in self.leaves)
        begins = loads or (named if self.value(named) and (adapts or mode != "train") else None)
        if begins is None and self.value(named):
            self.notes.append(f"{self.terms(named)}: not used: run_mode train begins with first values; write "
                              "load_checkpoint to begin with weights")  # fmt: skip
        if begins is None and mode == "finetune":
            self.problems.append(f"{self.terms('run_mode')}: needs weights; give load_checkpoint, a folder")
        if begins is not None:
            self.give("load", self._folder(begins), begins)
            self.give("exit_on_missing_checkpoint", True, begins)
            goes_on = self.switch("resume_training") or (begins == old and mode == "train")
            if not goes_on and not adapts:
                self.give("finetune", True, "run_mode", "resume_training")
        output = self.value("output_dir")
        monitors = self.entries("callbacks")
        saves = not monitors or any(one.get("type") in _SAVING for one in monitors)
        if output and saves and mode in ("train", "finetune"):
            self.give("save", str(Path(str(output)) / "checkpoint"), "output_dir")
        if output:
            self.give("log_dir", str(Path(str(output)) / "log"), "output_dir")

    def _folder(self, key: str) -> str:
        """Return the folder of a checkpoint; of a `.ckpt` file the one that it lies in."""
        path = Path(str(self.value(key)))
        if path.suffix != ".ckpt":
            return str(path)
        others = [file.name for file in path.parent.glob("*.ckpt") if file.name not in (path.name, "strategy.ckpt")]
        if others:
            self.fail(key, f"lies beside {others[0]}; put it into a folder of its own, with its .yaml, and name that")
        return str(path.parent)

    # ---- data ------------------------------------------------------------------------------------------------------
    def _data(self) -> None:
        if self.encoder:
            self._texts()
            return
        train, held = (self.value(f"{part}_dataset.data_loader.dataset_dir") for part in ("train", "eval"))
        train_key, held_key = (f"{part}_dataset.data_loader.dataset_dir" for part in ("train", "eval"))
        only_evaluates = self.value("run_mode") == "eval"
        evaluates = bool(held) and (self.switch("do_eval") or only_evaluates)
        if not train and not only_evaluates:
            self.notes.append(f"{self.terms(train_key)}: no data yet; give the folder there, or --data-path")
        elif evaluates:
            self.give("train_data_path", [str(train or held)], train_key, held_key)
            self.give("valid_data_path", [str(held)], held_key)
        elif train:
            self.give("data_path", [str(train)], train_key)
            self.give("split", "1,0,0", train_key)
        if only_evaluates and not held:
            self.fail("run_mode", f"needs data: {held_key}, or --eval_dataset_dir")
        if train and self.switch("train_dataset.data_loader.shuffle") and not self.classes:
            self.give("dataloader_type", "cyclic", "train_dataset.data_loader.shuffle")
        for key in ("train_dataset.eod_reset", "train_dataset.eos_reset"):
            if self.switch(key):
                self.give("reset_position_ids", True, key)
                self.give("reset_attention_mask", True, key)
        end = "train_dataset.eod_token_id"
        family = self.family()
        if self.value(end) is not None:
            self.give("eos_token_id", self.value(end), end)
        elif family is not None and family.name == "PanguAlphaConfig":
            self.give("eos_token_id", 6)
        if family is not None and family.name == "PanguAlphaConfig":  # no loss where the input is their padding
            self.give("eod_mask_loss", True, MODEL + "type")
        padding = MODEL + "pad_token_id"
        if family is not None and family.name == "LlamaConfig" and self.value(padding) is not None:
            self.give("pad_token_id", self.value(padding), padding)
        self._lengths(str(train or ""), str(held or "") if evaluates else "", only_evaluates)

    def _texts(self) -> None:
        """Say where an encoder's texts are: a folder of questions, or sentences that were put into files."""
        key, only_evaluates = "train_dataset.data_loader.dataset_dir", self.value("run_mode") == "eval"
        train, held = str(self.value(key) or ""), str(self.value("eval_dataset.data_loader.dataset_dir") or "")
        evaluates = self.switch("do_eval") or only_evaluates
        if not self.switch("train_dataset.data_loader.shuffle", True):
            self.fail("train_dataset.data_loader.shuffle", "an encoder's samples are shuffled by epoch; write True")
        for one in ("train_dataset.eod_reset", "train_dataset.eos_reset", "train_dataset.eod_token_id"):
            if self.value(one):
                self.fail(one, "an encoder's samples are of one document each; leave it out")
        if only_evaluates:
            scored = "answers are scored by python -m parallel_core.question_answering evaluate --load DIR"
            words = "an encoder of words is trained; give train or finetune"
            self.fail("run_mode", scored if self.encoder == "question_answering" else words)
        elif self.encoder == "question_answering" and train and evaluates and held:
            from parallel_core.data.squad import DEV  # as in `config/vocabulary.py`

            self.give("train_data_path", [train], key)
            self.give("valid_data_path", [str(Path(held) / DEV)], "eval_dataset.data_loader.dataset_dir")
        elif self.encoder == "question_answering" and train:
            self.give("data_path", [train], key)
        elif train and Path(f"{train}.idx").is_file():
            self.give("data_path", [train], key)
            self.give("split", "1,0,0", key)
        elif self.encoder == "question_answering":
            self.notes.append(f"{self.terms(key)}: no questions yet; give the folder of train-v1.1.json there, or "
                              "--data-path")  # fmt: skip
        else:
            self.notes.append(f"{self.terms(key)}: records whose words are masked once and for all are not read; give "
                              "--data-path, sentences of tools/preprocess_data.py --split-sentences, or write the "
                              "files' prefix here")  # fmt: skip
        self._lengths("", held if evaluates and self.encoder == "question_answering" else "", only_evaluates)

    def _lengths(self, train: str, held: str, only_evaluates: bool) -> None:
        """Say how long the run is, how often it evaluates, and on how many batches."""
        batch, epochs = self.global_batch(), self.number("runner_config.epochs", 1)
        each = self._batches_of("train_dataset", train, batch)
        steps = None if each is None else epochs * each
        if steps is not None and not only_evaluates:
            self.give("train_iters", steps, "runner_config.epochs")
        elif "runner_config.epochs" in self.leaves and not only_evaluates:
            self.notes.append(f"{self.terms('runner_config.epochs')}: the records are not here to be counted; "
                              "--train-iters says how long the run is")  # fmt: skip
        held_batches = self._batches_of("eval_dataset", held, batch)
        self.give("eval_iters", held_batches or (1 if held else 0), "eval_dataset.data_loader.dataset_dir")
        every = self.number("eval_step_interval", -1, -1)
        by_epoch = self.number("eval_epoch_interval", 1, -1)
        if held and every > 0:
            self.give("eval_interval", every, "eval_step_interval")
        elif held and each and by_epoch > 0:
            self.give("eval_interval", by_epoch * each, "eval_epoch_interval")
        self._schedule(steps, each)

    def _batches_of(self, part: str, place: str, batch: int | None) -> int | None:
        """Return the whole batches of MindRecord files, or of texts with classes; None where that cannot be told."""
        if not place or batch is None:
            return None
        from parallel_core.data.classified import read_classified  # as in `config/vocabulary.py`
        from parallel_core.data.record_dataset import count_records

        records = count_records(place)
        if records is None and self.classes:
            try:
                records = len(read_classified(place))
            except DataError:
                return None  # the run says what is wrong with it
        if records is not None and records < batch:
            key = f"{part}.data_loader.dataset_dir"
            self.fail(key, f"{records} records make no batch of {batch}; lower batch_size")
            return None
        return None if records is None else records // batch

    def _schedule(self, steps: int | None, each: int | None) -> None:
        key = "lr_schedule."
        usual = self.number("optimizer.learning_rate", None, 0, whole=False)
        rate = self.number(key + "learning_rate", usual, 0, whole=False)
        if rate is None:
            return
        total = self.number(key + "total_steps", -1, -1)
        warmup = self.number(key + "warmup_steps", 0, 0)
        by_epoch = self.number(key + "warmup_epochs", 0, 0)
        if by_epoch and each is None:
            self.fail(key + "warmup_epochs", "the records are not here to be counted; write warmup_steps")
        elif by_epoch and each is not None:
            warmup = by_epoch * each
        found = schedule_arguments(
            str(self.value(key + "type", "constant")),
            rate,
            self.number(key + "lr_end", None, 0, whole=False),
            warmup,
            self.number(key + "warmup_ratio", None, 0, whole=False),
            self.number(key + "warmup_lr_init", 0.0, 0, whole=False),
            total if total > 0 else steps,
            self.number(key + "power", 1.0, 0, whole=False),
            self.number(key + "num_cycles", 0.5, 0, whole=False),
        )
        from_key = {"lr": "learning_rate", "lr_decay_style": "type", "min_lr": "lr_end",
                    "lr_warmup_iters": "warmup_steps", "lr_warmup_fraction": "warmup_ratio",
                    "lr_warmup_init": "warmup_lr_init", "lr_decay_iters": "total_steps"}  # fmt: skip
        for name, value in found.items():
            self.give(name, value, key + from_key[name])

    # ---- the update ------------------------------------------------------------------------------------------------
    def _optimizer(self) -> None:
        self.give("optimizer", "adam", "optimizer.type")
        self.give("adam_bias_correction", False, "optimizer.type")
        pair = self.value("optimizer.betas")
        first, second = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        usual = 0.999 if self.encoder else 0.95
        for name, beta, default in (("adam_beta1", first, 0.9), ("adam_beta2", second, usual)):
            key = f"optimizer.{name.removeprefix('adam_')}"
            chosen = "optimizer.betas" if beta is not None else key
            self.give(name, beta if beta is not None else self.number(key, default, 0, whole=False), chosen)

    def _wrapper(self) -> None:
        sense = "runner_wrapper.scale_sense"
        kind = str(self.value(sense + ".type", "DynamicLossScaleUpdateCell"))
        uses = str(self.value(MODEL + "compute_dtype", "float32")) == "float16"
        plain = self.value(sense)
        static = kind.startswith("FixedLossScale") or number_or_word(plain) is not None
        first = self.number(sense if plain is not None else f"{sense}.loss_scale_value", None, 1, whole=False)
        if kind not in ("DynamicLossScaleUpdateCell", "AdaptiveLossScaleUpdateCell", "FixedLossScaleUpdateCell"):
            self.fail(f"{sense}.type", "not built; there are DynamicLossScaleUpdateCell and FixedLossScaleUpdateCell")
        if self.number(f"{sense}.scale_factor", 2) != 2:
            self.fail(f"{sense}.scale_factor", "the scale is halved and doubled; write 2")
        if uses and first is not None:
            chosen = sense if plain is not None else f"{sense}.loss_scale_value"
            self.give("loss_scale" if static else "initial_loss_scale", float(first), chosen)
            if not static:
                window = self.number(f"{sense}.scale_window", 1000)
                self.give("loss_scale_window", window, f"{sense}.scale_window")
                self.give("hysteresis", 1, f"{sense}.type")
        clips = self.switch("runner_wrapper.use_clip_grad")
        most = self.number("runner_wrapper.max_grad_norm", 1.0, 0, whole=False)
        self.give("clip_grad", float(most) if clips else 0.0, "runner_wrapper.use_clip_grad")

    def _experts(self) -> None:
        number = self.number("moe_config.expert_num", 1)
        if number == 1:
            return
        self.give("num_experts", number, "moe_config.expert_num")
        self.give("moe_router_rounds", True, "moe_config.expert_num")
        chosen = self.number("moe_config.num_experts_chosen", 1)
        self.give("moe_router_topk", chosen, "moe_config.num_experts_chosen")
        self.give("moe_expert_capacity_factor", self.number("moe_config.capacity_factor", 1.1, 0, whole=False),
                  "moe_config.capacity_factor")  # fmt: skip
        self.give("moe_aux_loss_coeff", [self.number("moe_config.aux_loss_factor", 0.05, 0, whole=False)],
                  "moe_config.aux_loss_factor")  # fmt: skip
        self.give("expert_tensor_parallel_size", 1, "moe_config.expert_num")

    def _recomputation(self) -> None:
        whole, attention = (self.switch(f"recompute_config.{name}") for name in ("recompute", "select_recompute"))
        if whole:
            self.give("recompute_granularity", "full", "recompute_config.recompute")
            self.give("recompute_method", "uniform", "recompute_config.recompute")
            self.give("recompute_num_layers", 1, "recompute_config.recompute")
        elif attention:
            self.give("recompute_granularity", "selective", "recompute_config.select_recompute")

    def _callbacks(self) -> None:
        for key in ("callbacks", "eval_callbacks"):
            if self.value(key, []) and not self.entries(key):
                self.fail(key, "give a list of entries with a type each")
            for one in self.entries(key):
                kind = one.get("type")
                if kind not in _CALLBACKS:
                    self.fail(key, f"{kind} is not built; there are {', '.join(_CALLBACKS)}")
                elif kind in _SAVING and self.value("run_mode", "train") in ("train", "finetune"):
                    for word, name in _SAVING_KEYS.items():
                        if one.get(word) is not None:
                            self._of_callback(key, name, one[word])
                elif kind == "MFLossMonitor":
                    self._of_callback(key, "log_interval", one.get("per_print_times", 1))

    def _of_callback(self, key: str, name: str, value: object) -> None:
        leaf = self.leaves[key]
        self.given.append(Given(name, value, leaf.source, key, value))


def _nearest(key: str) -> str:
    import difflib

    near = difflib.get_close_matches(key, [name for name in key_rows() if not name.endswith("*")], n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def overridden(leaves: Iterable[Leaf], changes: Mapping[str, object], source: str) -> list[Leaf]:
    """Return the values with some of them replaced, by dotted key."""
    merged = {leaf.path: leaf for leaf in leaves}
    _put_over(merged, [Leaf(tuple(key.split(".")), value, source, value) for key, value in changes.items()])
    return [replace(leaf) for leaf in merged.values()]
