"""The commands printed at the end of a run are legal for the configuration they follow."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from parallel_core.config.load import load_config
from parallel_core.environment import HANDOVER_VARIABLE, LOG_DIR_VARIABLE
from parallel_core.training.next_commands import Invocation, next_commands

REPO = Path(__file__).resolve().parents[3]
MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --padded-vocab-size 256 --lr 1e-3
    --micro-batch-size 1 --global-batch-size 8
""".split()
VPP = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (HANDOVER_VARIABLE, LOG_DIR_VARIABLE, "MS_ROLE", "NPROC", "LOG_DIR"):
        monkeypatch.delenv(name, raising=False)


def after(words, script="own.py", world_size=None, iteration=10, **options):
    loaded = load_config(words, world_size=world_size, **options)
    invocation = Invocation(script, tuple(words), loaded.given, options)
    return next_commands(loaded.config, iteration, loaded.world_size, invocation)


def under_launcher(monkeypatch, plain=False):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv(LOG_DIR_VARIABLE, "/logs")
    if not plain:
        monkeypatch.setenv(HANDOVER_VARIABLE, "/logs/resolved.json")


@pytest.mark.parametrize("run", [
    "--train-iters 10", "--train-samples 100 --rampup-batch-size 2 2 20", "--train-iters 10 --finetune --load else",
    "--train-iters 10 --load else --use-checkpoint-opt_param-scheduler --ckpt-step 3", "--skip-train --load else",
    "--train-iters 10 --pretrained-checkpoint else", "--train-iters 10 --no-save-optim --no-load-optim --load else",
    f"--train-iters 10 {VPP}", "--train-iters 10 --pipeline-model-parallel-size 2 --num-layer-list 3,1",
    "--train-iters 10 --tensor-model-parallel-size 2 --sequence-parallel --no-resume-training",
    "--train-iters 10 --decoder-first-pipeline-num-layers 1 --pipeline-model-parallel-size 2",
])  # fmt: skip
@pytest.mark.parametrize("in_a_file", [False, True])
def test_they_resume_whatever_the_run_was_told(run, in_a_file, tmp_path, monkeypatch):
    under_launcher(monkeypatch)
    words = [*MODEL, *run.split(), "--save", "my run"]
    if in_a_file:
        (tmp_path / "run.yaml").write_text(_yaml(words))
        words = ["--config", str(tmp_path / "run.yaml")]
    head, on, elsewhere, inspect = after(words)
    assert head == "Checkpoints are in my run. Next:"
    assert shlex.split(inspect, comments=True)[-2:] == ["--inspect", "my run"]
    before = load_config(words).config
    for line in (on, elsewhere):
        program = shlex.split(line, comments=True)
        flags = [word for word in program if word.startswith("--")]
        assert len(flags) == len(set(flags)), "what is given anew is not taken back before"
        config = load_config(program[program.index("own.py") + 1 :]).config
        training = config.training_config
        assert training.load_checkpoint == "my run" and training.resume_training and not training.skip_train
        assert not training.finetune and not training.ckpt_step
        assert training.no_load_optim == before.training_config.no_save_optim
        assert training.training_iters > 10 and config.model_config == before.model_config
    assert config.parallel_config != before.parallel_config


def _yaml(words: list[str]) -> str:
    lines = []
    for flag, *values in (group.split() for group in " ".join(words).split(" --") if group):
        name = flag.removeprefix("--").replace("-", "_")
        known = {"no_resume_training": "resume_training: false"}
        value = "true" if not values else " ".join(values) if len(values) < 3 else f"[{', '.join(values)}]"
        lines.append(known.get(name, f"{name}: {value}"))
    return "\n".join(lines) + "\n"


def test_they_start_the_script_as_it_was_started(monkeypatch):
    words = [*MODEL, "--train-iters", "10", "--save", "ck"]
    assert after(words, "my own.py")[1].startswith("  python 'my own.py' --num-layers 4 ")
    assert len(after(words)) == 3  # one process has no other layout
    under_launcher(monkeypatch)
    assert after(words)[1].startswith("  python -m parallel_core.launch own.py --num-layers 4 ")
    assert after(words, str(REPO / "pretrain_gpt.py"))[1].startswith(f"  bash {REPO}/pretrain_gpt.sh --num-layers 4 ")
    assert after(words, world_size=2)[1].startswith("  NPROC=2 python -m parallel_core.launch own.py ")
    monkeypatch.setenv("LOG_DIR", "my logs")
    monkeypatch.delenv(HANDOVER_VARIABLE)
    assert after(words)[1].startswith("  NPROC=1 LOG_DIR='my logs' python -m parallel_core.launch --plain own.py ")
    monkeypatch.delenv(LOG_DIR_VARIABLE)
    assert len(after(words)) == 2  # started by somebody else's launcher


def test_arguments_of_the_script_stay(monkeypatch):
    def provider(parser):
        parser.add_argument("--mine", nargs="*")
        return parser

    under_launcher(monkeypatch, plain=True)
    words = [*MODEL, "--train-iters", "10", "--save", "ck", "--mine", "a", "b c"]
    lines = after(words, extra_args_provider=provider)
    assert "--mine a 'b c' --load ck" in lines[1] and "--mine a 'b c' --load ck" in lines[2]


def test_without_a_command_line_only_looking_is_proposed():
    config = load_config([*MODEL, "--train-iters", "10", "--save", "ck"]).config
    assert next_commands(config, 10, 1, None) == [
        "Checkpoints are in ck. Next:", "  python -m parallel_core.convert --inspect ck    # look inside"]
    assert next_commands(load_config(MODEL).config, 10, 1, None) == []
