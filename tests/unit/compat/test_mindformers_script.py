"""`run_mindformer.py`: MindFormers' script arguments over a YAML file, and what is started for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from parallel_core.compat.mindformers.run import commands, main, read_words
from parallel_core.config import load_config
from parallel_core.errors import ConfigError
from tests.helpers.launching import REPO

FILES = REPO / "tests" / "golden" / "mindformers"
GPT2 = str(FILES / "run_gpt2.yaml")


def started(words: list[str], **environment: str):
    """The command for some arguments: its words after the program, its environment, and the file that is written."""
    found, variables, text = commands(read_words(words, FILES), environment)
    return found[2:], variables, yaml.safe_load(text) if text else None


def test_arguments_stand_over_the_file_and_the_run_reads_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--config", GPT2, "--run_mode", "train", "--use_parallel", "True", "--epochs", "2", "--batch_size=4",
             "--train_dataset_dir", "data", "--parallel.parallel_mode", "1", "--parallel_config.model_parallel", "2",
             "--options", "optimizer.weight_decay=0.5", "lr_schedule.warmup_steps=3", "--seed", "9", "--device_id", "5",
             "--output_dir", "out", "--", "--train-iters", "7"]  # fmt: skip
    found, _, written = started(words)
    assert found[1:] == ["pretrain_gpt.py", "--config", "out/run_mindformer.yaml", "--train-iters", "7"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
    loaded = load_config(["--config", "run.yaml", "--train-iters", "7"])
    config = loaded.config
    assert (loaded.world_size, config.parallel_config.tensor_model_parallel_size) == (2, 2)
    assert (config.dataset_config.batch_size, config.dataset_config.data_path) == (4, ("data",))
    assert (config.training_config.seed, config.training_config.output_dir) == (9, "out/checkpoint")
    assert (config.optimizer_config.weight_decay, config.optimizer_config.lr_warmup_iters) == (0.5, 3)


def test_a_configuration_is_looked_for_beside_the_script_too_and_each_model_has_its_program(tmp_path):
    for kind, program in (("PanguAlphaConfig", "pretrain_pangu.py"), ("BertConfig", "pretrain_bert.py")):
        (tmp_path / "p.yaml").write_text(f"model: {{model_config: {{type: {kind}}}}}\nrunner_config: {{epochs: 1}}\n")
        asked = read_words(["--config", "p.yaml"], tmp_path)
        assert commands(asked, {})[0][3] == program
    with pytest.raises(ConfigError, match="question_answering predict"):
        commands(read_words(["--config", "p.yaml", "--run_mode", "predict", "--predict_data", "a - b"], tmp_path), {})
    assert started(["--config", "run_gpt2.yaml", "--device_target", "CPU"])[1] == {"DEVICE_TARGET": "CPU"}
    assert started(["--config", "run_gpt2.yaml", "--device_target", "CPU"], DEVICE_TARGET="Ascend")[1][
        "DEVICE_TARGET"
    ] == "Ascend"  # fmt: skip


def test_prediction_continues_texts_by_the_rules_of_the_files_releases(tmp_path):
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    words = ["--config", GPT2, "--run_mode", "predict", "--load_checkpoint", str(tmp_path),
             "--model.model_config.repetition_penalty", "1.5"]  # fmt: skip
    found, _, written = started([*words, "--predict_data", str(tmp_path / "texts.txt"), "three"])
    assert written is None and "generate.command" in found[0]
    assert found[1:3] == ["--load", str(tmp_path)]
    assert [found[i + 1] for i, word in enumerate(found) if word == "--prompt"] == ["one", "two", "three"]
    told = " ".join(found)
    assert "--no-renormalize --frequency-penalty 1.5 --presence-penalty 1.5 --top-k 5" in told
    assert "--total-length 1024" in told and "--stop-token-ids 50256" in told and told.endswith("--seed 0")
    greedy = started([*words, "--predict_data", "x", "--model.model_config.do_sample", "False"])[0]
    assert "--temperature 0.0" in " ".join(greedy) and "--top-k" not in greedy


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", GPT2, "--nonsense", "1"], "--nonsense: no such argument"),
        (["--config", GPT2, "--runner_config.epochs"], "no such argument, or one without a value"),
        (["--config", GPT2, "--use_parallel", "perhaps"], "--use_parallel perhaps: give True or False"),
        (["--config", GPT2, "--options", "seed"], "--options seed: write KEY=VALUE"),
        (["--config", GPT2, "--num_samples", "3"], "--num_samples: not built"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--config", GPT2, "--predict_data", "x"], "belongs to --run_mode predict"),
        (["--config", GPT2, "--run_mode", "predict", "--predict_data", "x"], "'gpt2' is no folder with weights"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence_before_anything_starts(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not any(Path(tmp_path).iterdir())


def test_missing_weights_of_finetune_are_an_error_that_names_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"run_mode: finetune.*: needs weights; give load_checkpoint"):
        _, _, written = started(["--config", GPT2, "--run_mode", "finetune",
                                 "--model.model_config.checkpoint_name_or_path", ""])  # fmt: skip
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
        load_config(["--config", str(tmp_path / "run.yaml")])


def test_the_script_tells_its_arguments(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--train_dataset_dir" in capsys.readouterr().out
