"""`run_mindformer.py`: MindFormers' script arguments, in which a YAML file is trained, evaluated or used.

    python run_mindformer.py --config run_gpt2.yaml --run_mode train --train_dataset_dir data
    python run_mindformer.py --config run_gpt2_13b.yaml --use_parallel True --run_mode finetune --load_checkpoint DIR
    python run_mindformer.py --config run_gpt2.yaml --run_mode predict --load_checkpoint DIR --predict_data "Once upon"

The arguments stand over the file, and so does any pair `--section.key VALUE`. One command starts all ranks of this
node; `python -m parallel_core.launch run-distribute` prints it for several. Megatron's flags stand after `--`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from parallel_core.config.mindformers.form import MODEL, overridden, with_base_files
from parallel_core.config.mindformers.models import number_or_word
from parallel_core.config.mindformers.sampling import mindformers_before_0_8
from parallel_core.config.yaml_tree import read_leaves
from parallel_core.errors import ConfigError, ParallelCoreError

_SWITCHES = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_KEYS = {
    "run_mode": "run_mode", "use_parallel": "use_parallel", "mode": "context.mode", "device_id": "context.device_id",
    "device_target": "context.device_target", "do_eval": "do_eval",
    "train_dataset_dir": "train_dataset.data_loader.dataset_dir",
    "eval_dataset_dir": "eval_dataset.data_loader.dataset_dir", "load_checkpoint": "load_checkpoint",
    "resume_or_finetune_checkpoint": "resume_or_finetune_checkpoint",
    "src_strategy_path_or_dir": "src_strategy_path_or_dir", "auto_trans_ckpt": "auto_trans_ckpt",
    "only_save_strategy": "only_save_strategy", "resume_training": "resume_training",
    "strategy_load_checkpoint": "strategy_load_checkpoint", "remote_save_url": "remote_save_url", "seed": "seed",
    "profile": "profile", "epochs": "runner_config.epochs", "batch_size": "runner_config.batch_size",
    "sink_mode": "runner_config.sink_mode", "output_dir": "output_dir",
}  # fmt: skip
"""Their argument -> the key that it sets."""
_OTHER_WORDS = {"train_dataset": "train_dataset_dir", "eval_dataset": "eval_dataset_dir"}
_OF_SWITCHES = ("use_parallel", "do_eval", "auto_trans_ckpt", "only_save_strategy", "resume_training", "profile",
                "sink_mode")  # fmt: skip
_OF_SAMPLING = ("do_sample", "top_k", "top_p", "repetition_penalty", "temperature")
_PROGRAMS = {"PanguAlphaConfig": "pretrain_pangu.py", "BertConfig": "pretrain_bert.py"}
_START = "import sys; sys.path[:] = [p for p in sys.path if p]; from {} import main; sys.exit(main())"


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Attributes:
        file: the configuration that it names.
        changes: values over the file's, by dotted key.
        texts: what is to be continued.
        further: flags of Megatron's, after `--`.
    """

    file: str
    changes: dict[str, Any]
    texts: tuple[str, ...] = ()
    further: tuple[str, ...] = ()


def read_words(words: Sequence[str], folder: Path) -> Asked:
    """Return what a command line asks for.

    Args:
        words: the arguments.
        folder: of the script: a configuration that is not in the working directory is looked for there.

    Raises:
        ConfigError: an argument is unknown or has no value, or the configuration is not named.
    """
    words, further = _split(words)
    parser = argparse.ArgumentParser(
        prog="run_mindformer.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", required=True)
    for name in (*_KEYS, *_OTHER_WORDS):
        parser.add_argument(f"--{name}")
    parser.add_argument("--predict_data", nargs="+", default=[])
    parser.add_argument("--predict_batch_size")
    parser.add_argument("--num_samples")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    args, rest = parser.parse_known_args(words)
    if args.num_samples is not None:
        raise ConfigError("--num_samples: not built; give a folder with as many records")
    changes = {key: _value(word) for key, word in _pairs(rest)}
    for option in args.options:
        key, sign, word = option.partition("=")
        if not sign:
            raise ConfigError(f"--options {option}: write KEY=VALUE")
        changes[key] = _value(word)
    for name in (*_OTHER_WORDS, *_KEYS):
        if getattr(args, name) is not None:
            name, word = _OTHER_WORDS.get(name, name), getattr(args, name)
            changes[_KEYS[name]] = _switch(name, word) if name in _OF_SWITCHES else _value(word)
    file = args.config if Path(args.config).exists() else str(folder / args.config)
    return Asked(file, changes, tuple(_texts(args.predict_data)), tuple(further))


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    at = list(words).index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def _pairs(rest: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs `--section.key VALUE`."""
    joined: list[str] = []
    for word in rest:
        joined += word.split("=", 1) if word.startswith("--") else [word]
    pairs = list(zip(joined[::2], joined[1::2]))
    unknown = [key for key in joined[::2] if not key.startswith("--") or "." not in key]
    if unknown or len(joined) % 2:
        known = ", ".join(f"--{name}" for name in ("config", *_KEYS, *_OTHER_WORDS, "predict_data", "options"))
        first = (unknown or joined[-1:])[0]
        raise ConfigError(f"{first}: no such argument, or one without a value; there are {known}, and --section.key "
                          "VALUE for a key of the file; Megatron's flags stand after --")  # fmt: skip
    return [(key.removeprefix("--"), value) for key, value in pairs]


def _value(word: str) -> Any:
    return {"True": True, "False": False, "true": True, "false": False}.get(word, number_or_word(word))


def _switch(name: str, word: str) -> bool:
    if word.lower() not in _SWITCHES:
        raise ConfigError(f"--{name} {word}: give True or False")
    return _SWITCHES[word.lower()]


def _texts(words: Sequence[str]) -> list[str]:
    """Return the texts of `--predict_data`; a file's are its lines, a folder's those of its files."""
    found: list[str] = []
    for word in words:
        path = Path(word)
        try:
            files = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
        except OSError:  # a text is longer than names of files may be
            files = []
        for file in files:
            found += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        found += [] if files else [word]
    return found


# ---- what is started ------------------------------------------------------------------------------------------------
def commands(asked: Asked, environment: Mapping[str, str]) -> tuple[list[str], dict[str, str], str]:
    """Return the words of the command that does what is asked, its environment, and a configuration to write first.

    The configuration names the file as its base, and has the changes; it is written to where the second word after
    `--config` says, below the output directory, and is empty where texts are continued.

    Raises:
        ConfigError: the file cannot be read, or asks for what cannot be.
    """
    leaves, problems = read_leaves(asked.file)
    leaves, more = with_base_files(leaves, asked.file)
    if problems or more:
        raise ConfigError("\n".join([*problems, *more]))
    values = {".".join(leaf.path): leaf.value for leaf in overridden(leaves, asked.changes, "command line")}
    target = asked.changes.get("context.device_target")
    variables = dict(environment)
    if target in ("CPU", "Ascend"):
        variables.setdefault("DEVICE_TARGET", str(target))
    if values.get("run_mode") == "predict":
        return _predicting(asked, values), variables, ""
    if asked.texts:
        raise ConfigError("--predict_data: belongs to --run_mode predict")
    program = _PROGRAMS.get(str(values.get(f"{MODEL}type")), "pretrain_gpt.py")
    tree: dict[str, Any] = {"base_config": [str(Path(asked.file).resolve())]}
    for key, value in asked.changes.items():
        section = tree
        *outer, last = key.split(".")
        for name in outer:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--{key}: {name} has a value of its own on this command line")
        section[last] = value
    file = Path(str(values.get("output_dir") or "output")) / "run_mindformer.yaml"
    words = [sys.executable, "-c", _START.format("parallel_core.launch.train"), program, "--config", str(file)]
    return [*words, *asked.further], variables, yaml.safe_dump(tree, allow_unicode=True)


def _predicting(asked: Asked, values: Mapping[str, Any]) -> list[str]:
    """Return the command that continues texts as the file's model section says."""
    if values.get(f"{MODEL}type") == "BertConfig":
        raise ConfigError("--run_mode predict: an encoder continues no text; answers are given by "
                          "python -m parallel_core.question_answering predict --load DIR TEXT")  # fmt: skip
    load = values.get("load_checkpoint") or values.get(f"{MODEL}checkpoint_name_or_path")
    if not load or not Path(str(load)).is_dir():
        raise ConfigError(f"--run_mode predict: {load!r} is no folder with weights; give --load_checkpoint DIR")
    if not asked.texts:
        raise ConfigError("--run_mode predict: there is nothing to continue; give --predict_data TEXT")
    words = [sys.executable, "-c", _START.format("parallel_core.generate.command"), "--load", str(load)]
    for text in asked.texts:
        words += ["--prompt", text]
    if values.get("use_parallel"):
        if values.get("parallel_config.data_parallel", 1) != 1:
            raise ConfigError("--run_mode predict: parallel_config.data_parallel must be 1; texts are few")
        for name, flag in (("model_parallel", "tensor"), ("pipeline_stage", "pipeline")):
            words += [f"--{flag}-model-parallel-size", str(values.get(f"parallel_config.{name}", 1))]
    given = {name: values[MODEL + name] for name in _OF_SAMPLING if values.get(MODEL + name) is not None}
    for name, value in mindformers_before_0_8(**{name: number_or_word(value) for name, value in given.items()}).items():
        words += ["--no-renormalize"] if name == "renormalize" else [f"--{name.replace('_', '-')}", str(value)]
    longest = values.get(f"{MODEL}max_decode_length")
    if longest:
        words += ["--total-length", str(longest)]
    if values.get(f"{MODEL}eos_token_id") is not None:
        words += ["--stop-token-ids", str(values[f"{MODEL}eos_token_id"])]
    return [*words, "--seed", str(values.get("seed", 0)), *asked.further]


def main(argv: Sequence[str] | None = None, folder: Path | None = None) -> int:
    """Do what the arguments ask for, in this process's place; return 2 for what cannot be, said in a sentence."""
    try:
        asked = read_words(list(sys.argv[1:] if argv is None else argv), folder or Path.cwd())
        words, variables, text = commands(asked, os.environ)
        if text:
            file = Path(words[words.index("--config") + 1])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    except (ParallelCoreError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return _become(words, variables)


def _become(words: list[str], variables: dict[str, str]) -> NoReturn:
    """Run a command in this process's place, with this package."""
    root = str(Path(__file__).resolve().parents[3])
    paths = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    variables["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([root, *paths]))
    sys.stdout.flush()
    os.execve(words[0], words, variables)
