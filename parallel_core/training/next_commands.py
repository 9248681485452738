"""The commands that a run ends with: each runs as it is printed. Pure Python."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel_core.bundled import PROGRAMS, bundled_program, is_checkout
from parallel_core.config import table
from parallel_core.config.flags import split_words
from parallel_core.config.load import is_legal, load_config
from parallel_core.config.schema import AllConfig
from parallel_core.config.values import Given
from parallel_core.environment import HANDOVER_VARIABLE, LOG_DIR_VARIABLE

_RESUME = """
    load ckpt_step train_iters train_samples finetune resume_training pretrained_checkpoint no_load_optim new_dataset
    use_checkpoint_opt_param_scheduler override_opt_param_scheduler skip_train
"""
"""Arguments about where a run starts and ends, which the next one gives anew."""
_LAYOUT = """
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    num_layers_per_virtual_pipeline_stage microbatch_group_size_per_vp_stage num_layer_list
    pipeline_model_parallel_layout decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split standalone_embedding_stage
    recompute select_recompute select_comm_recompute micro_batch_num
"""
_OTHER_LAYOUTS = ((1, 2), (2, 1), (1, 1), (1, 4), (4, 1))
"""(tensor, pipeline) parallel sizes to propose: the first that fits the model and is not the run's own."""


@dataclass(frozen=True)
class Invocation:
    """The command line that a run was started by."""

    script: str
    arguments: tuple[str, ...]
    given: Mapping[str, Given] = field(default_factory=dict)
    """What it gave, by argument name."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The script's own arguments and defaults, for `load_config`: `extra_args_provider`, `args_defaults`."""

    def without(self, names: Sequence[str], anew: Sequence[str] = ()) -> list[str]:
        """Return the arguments less those `names`, taken back where a file gives them but for those given `anew`."""
        words: list[str] = []
        for flag, values in split_words(self.arguments)[0]:
            found = table.find(flag)
            if found is None or found[0].name not in names:
                words += [flag, *values]
        for name in names:
            if name in self.given and name not in anew and not self.given[name].written.startswith("--"):
                argument = table.BY_NAME[name]
                words += [argument.flags[0], str(bool(argument.default)).lower() if argument.is_switch else "null"]
        return words


def command_again(invocation: Invocation, more: Sequence[str], world_size: int, log_dir: str) -> str | None:
    """Return the command that a run was started by with further arguments, or None where it is not known.

    Args:
        invocation: how it was started.
        more: the arguments.
        world_size: its number of ranks.
        log_dir: where the ranks of the job then log, so that the logs of the run stay.
    """
    starter = _starter(invocation.script)
    if starter is None:
        return None
    words = [*invocation.arguments, *more]
    return f"{_environment(words, world_size, invocation, log_dir)}{shlex.join([*starter, *words])}"


def next_commands(config: AllConfig, iteration: int, world_size: int, invocation: Invocation | None) -> list[str]:
    """Return what to try after a run that saved checkpoints.

    Args:
        config: the run's configuration.
        iteration: the iterations it has done.
        world_size: its number of ranks.
        invocation: how it was started; None where the configuration was made in Python.
    """
    folder = config.training_config.output_dir
    if not folder:
        return []
    inspect = shlex.join(["python", "-m", "parallel_core.convert", "--inspect", folder])
    lines = [f"{inspect}    # look inside"]
    if invocation is not None and (starter := _starter(invocation.script)) is not None:
        for (words, ranks), what in zip(_proposals(config, iteration, world_size, invocation), _WHAT):
            lines.insert(-1, f"{_environment(words, ranks, invocation)}{shlex.join([*starter, *words])}    # {what}")
    return [f"Checkpoints are in {folder}. Next:", *(f"  {line}" for line in lines)]


_WHAT = ("train on", "in another layout")


def _proposals(
    config: AllConfig, iteration: int, world_size: int, invocation: Invocation
) -> Iterator[tuple[list[str], int]]:
    """Yield (arguments, ranks) to train on, and to do so in another layout, as far as they are legal."""
    on = _train_on(config, iteration)
    anew = [found[0].name for flag in on if (found := table.find(flag))]
    same = [*invocation.without(_RESUME.split(), anew), *on]
    if not is_legal(same, world_size, **invocation.options):
        return
    yield same, world_size
    parallel = config.parallel_config
    for tensor, pipeline in _OTHER_LAYOUTS if "MS_ROLE" in os.environ else ():
        sizes = ["--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)]
        anew += ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
        words = [*invocation.without([*_RESUME.split(), *_LAYOUT.split()], anew), *on, *sizes]
        own = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
        if (tensor, pipeline) != own and is_legal(words, tensor * pipeline, **invocation.options):
            yield words, tensor * pipeline
            return


def _train_on(config: AllConfig, iteration: int) -> list[str]:
    """Return the arguments that load the run's last checkpoint and go on at least as long again."""
    training = config.training_config
    more = max(2 * iteration, iteration + 50)
    length = ["--train-iters", str(more)]
    if training.train_samples:
        length = ["--train-samples", str(training.train_samples * more // max(iteration, 1))]
    state = "--no-load-optim" if training.no_save_optim else "--override-opt_param-scheduler"
    return ["--load", training.output_dir, *length, state]


def _starter(script: str) -> list[str] | None:
    """Return the words that start `script` as it was started, or None when something else than this project did."""
    if HANDOVER_VARIABLE in os.environ and not is_checkout() and Path(script) == bundled_program():
        return ["parallel-core", "train"]
    shell = Path(script).with_suffix(".sh")
    if HANDOVER_VARIABLE in os.environ:
        if Path(script).name in PROGRAMS and shell.is_file():
            return ["bash", str(shell)]
        return ["python", "-m", "parallel_core.launch", script]
    if LOG_DIR_VARIABLE in os.environ:
        return ["python", "-m", "parallel_core.launch", "--plain", script]
    return None if "MS_ROLE" in os.environ else ["python", script]


def _environment(words: list[str], ranks: int, invocation: Invocation, log_dir: str = "") -> str:
    """Return the variables that the launcher needs in front of the command: NPROC where the layout says otherwise.

    The directory of logs is the one in LOG_DIR, or `log_dir`.
    """
    if LOG_DIR_VARIABLE not in os.environ:
        return ""
    variables = []
    plain = HANDOVER_VARIABLE not in os.environ
    if plain or "NPROC" in os.environ or load_config(words, **invocation.options).world_size != ranks:
        variables.append(f"NPROC={ranks} ")
    if log_dir := log_dir or os.environ.get("LOG_DIR", ""):
        variables.append(f"LOG_DIR={shlex.quote(log_dir)} ")
    return "".join(variables)
