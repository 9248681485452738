"""What `--to megatron` records is the model: a run that takes its arguments from there has it, and so does Megatron."""

from __future__ import annotations

import pytest
from own_models import LLAMA, config_of, model_of, save

from parallel_core.checkpoint import find_checkpoint, open_checkpoint
from parallel_core.config import load_config
from parallel_core.config.model_keys import DEFINING, value_of
from parallel_core.convert.cli import main

YARN = "--position-embedding-type yarn --rotary-scaling-factor 4"


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--no-bias-gelu-fusion --apply-layernorm-1p --apply-residual-connection-post-layernorm",
        "--squared-relu --kv-channels 16 --norm-epsilon 1e-6 --tokenizer-type NullTokenizer",
        LLAMA,
        f"{LLAMA} --use-rope-scaling --rope-scaling-factor 32 --add-qkv-bias --qk-layernorm",
        f"{LLAMA} --rotary-seq-len-interpolation-factor 2 --rotary-base 500 --rotary-percent 0.5",
        f"{LLAMA} {YARN} --mscale 2 --mscale-all-dim 1 --yarn-original-max-position-embeddings 8",
        f"{LLAMA} --window-size 5 0 --window-attn-skip-freq [1,0]",
    ],
)
def test_the_model_is_recorded_for_megatron(tmp_path, words):
    config = config_of(words)
    native = save(tmp_path / "native", config, model_of(config))
    written = tmp_path / "megatron"
    assert main(["--to", "megatron", "--load", str(native), "--save", str(written), "--no-optim", "--quiet"]) == 0
    common = open_checkpoint(find_checkpoint(written)).common
    assert common["model_config"]["vocab_size"] == (91 if "Null" in words else 90)
    args = common["megatron_args"]
    assert not {"hidden_act", "qkv_has_bias", "add_dense_bias", "pre_tockens", "softmax_scale"} & args.keys()
    if "--window-size" in words:
        assert args["window_size"] == [5, 0] and args["window_attn_skip_freq"] == [1, 0]
    flags = f"--load {written} --use-checkpoint-args --micro-batch-size 1 --seq-length 16 --mock-data --swiglu"
    model = load_config(flags.split()).config.model_config
    for field in DEFINING:
        assert value_of(model, field) == value_of(config.model_config, field), field


@pytest.mark.parametrize(("words", "named"), [("--parallel-residual", "parallel_residual=True"),
                                              ("--hidden-act relu", "hidden_act='relu'")])  # fmt: skip
def test_what_megatron_has_no_argument_for_is_named(tmp_path, capsys, words, named):
    config = config_of(words)
    native = save(tmp_path / "native", config, model_of(config))
    assert main(["--to", "megatron", "--load", str(native), "--save", str(tmp_path / "m"), "--quiet"]) == 2
    assert f"no Megatron run has this model: {named}" in capsys.readouterr().err
