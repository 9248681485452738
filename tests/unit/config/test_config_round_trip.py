"""Random legal configurations come back the same through every written form."""

from __future__ import annotations

import shlex

import pytest
from config_helpers import ROOT, load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel_core.config import load_config
from parallel_core.config.dump import FORMS, resolved_yaml, write_form


def maybe(draw, words: list[str], flag: str, values) -> None:
    if draw(st.booleans()):
        value = draw(values) if values is not None else None
        words += [flag] if value is None else [flag, *str(value).split()]


RATES = st.sampled_from(["0.0", "0.1", "0.25", "1e-3"])


def model(draw, tp: int) -> list[str]:
    heads = draw(st.sampled_from([4, 8]))
    head = draw(st.sampled_from([8, 16]))
    words = ["--num-attention-heads", str(heads), "--hidden-size", str(heads * head),
             "--seq-length", "32", "--padded-vocab-size", str(64 * tp)]
    words += draw(st.sampled_from([[], ["--swiglu"], ["--squared-relu"], ["--hidden-act", "silu"],
                                   ["--no-bias-gelu-fusion"], ["--hidden-act", "gelu"]]))
    words += draw(st.sampled_from([[], ["--disable-bias-linear"], ["--disable-bias-linear", "--add-qkv-bias"],
                                   ["--no-qkv-has-bias"], ["--disable-bias-linear", "--add-dense-bias"]]))
    words += draw(st.sampled_from([[], ["--use-rotary-position-embeddings", "--rotary-base", "5e5"],
                                   ["--position-embedding-type", "none"],
                                   ["--position-embedding-type", "rope", "--rotary-percent", "0.5",
                                    "--no-rope-fusion"]]))
    words += draw(st.sampled_from([[], ["--bf16"], ["--fp16"], ["--compute-dtype", "bfloat16"],
                                   ["--bf16", "--params-dtype", "fp32", "--fp32-residual-connection"],
                                   ["--fp16", "--loss-scale", "128", "--fp16-lm-cross-entropy"]]))
    words += draw(st.sampled_from([[], ["--recompute-activations"], [
        "--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1"]]))
    maybe(draw, words, "--normalization", st.just("RMSNorm"))
    maybe(draw, words, "--norm-epsilon", st.sampled_from(["1e-6", "1e-5"]))
    maybe(draw, words, "--group-query-attention", None)
    if "--group-query-attention" in words:
        words += ["--num-query-groups", "4"]
    maybe(draw, words, "--kv-channels", st.sampled_from([8, 24]))
    maybe(draw, words, "--ffn-hidden-size", st.sampled_from([64, 96]))
    maybe(draw, words, "--attention-dropout", RATES)
    maybe(draw, words, "--hidden-dropout", RATES)
    maybe(draw, words, "--use-sandwich-norm", None)
    maybe(draw, words, "--untie-embeddings-and-output-weights", None)
    maybe(draw, words, "--init-method-std", st.floats(0.001, 0.1))
    maybe(draw, words, "--embedding-init-method-std", st.floats(0.001, 0.1))
    maybe(draw, words, "--kernels", st.just("local"))
    return words


def layout(draw) -> tuple[list[str], int, int]:
    tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    dp, number = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4]))
    words = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    maybe(draw, words, "--sequence-parallel", None)
    if pp == 2:
        words += draw(st.sampled_from([[], ["--num-layers-per-virtual-pipeline-stage", "2"],
                                       ["--num-layer-list", "[[3,1],[2,2]]"], ["--num-layer-list", "[5,3]"],
                                       ["--decoder-first-pipeline-num-layers", "3"], ["--recompute", "[1,2]"]]))
    micro = draw(st.integers(1, 3))
    words += ["--num-layers", "8", "--micro-batch-size", str(micro), "--global-batch-size", str(micro * dp * number)]
    if "--recompute" in words and "--num-layers-per-virtual-pipeline-stage" in words:
        words = words[:-2]
    return words, tp, tp * pp * dp


def run(draw) -> list[str]:
    words = ["--lr", draw(st.sampled_from(["1e-3", "0.5"]))]
    if draw(st.booleans()):
        words += ["--train-iters", "100"]
        maybe(draw, words, "--lr-warmup-iters", st.integers(1, 20))
        maybe(draw, words, "--lr-decay-iters", st.integers(50, 200))
    else:
        words += ["--train-samples", "1000"]
        maybe(draw, words, "--lr-warmup-samples", st.integers(1, 20))
    words += draw(st.sampled_from([[], ["--use-distributed-optimizer"], [
        "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]]))
    words += draw(st.sampled_from([[], ["--weight-decay-incr-style", "linear", "--start-weight-decay", "0.1",
                                        "--end-weight-decay", "0.2"]]))
    words += draw(st.sampled_from([[], ["--data-path", "a b"], ["--data-path", "0.3", "a", "0.7", "b"],
                                   ["--mock-data"]]))
    maybe(draw, words, "--weight-decay", RATES)
    maybe(draw, words, "--adam-beta2", st.sampled_from(["0.95", "0.99"]))
    maybe(draw, words, "--clip-grad", st.sampled_from(["0.0", "0.5"]))
    maybe(draw, words, "--seed", st.integers(0, 2**31))
    maybe(draw, words, "--lr-decay-style", st.sampled_from(["constant", "cosine", "inverse-square-root"]))
    maybe(draw, words, "--save", st.sampled_from(["out", "a:b", "0", "true", "1e3", "#x"]))
    maybe(draw, words, "--save-interval", st.integers(1, 9))
    maybe(draw, words, "--eod-mask-loss", None)
    maybe(draw, words, "--eos-token-id", st.integers(0, 5))
    maybe(draw, words, "--profile", None)
    maybe(draw, words, "--no-save-optim", None)
    maybe(draw, words, "--accumulate-allreduce-grads-in-fp32", None)
    return words


@st.composite
def configurations(draw) -> tuple[list[str], int]:
    words, tp, world = layout(draw)
    return [*words, *model(draw, tp), *run(draw)], world


def again(text: str, form: str, tmp_path, world: int):
    if form == "flags":
        return load_config(shlex.split(text.replace("\\\n", " ")), world_size=world)
    (tmp_path / "c.yaml").write_text(text)
    return load_config(["--config", str(tmp_path / "c.yaml")], world_size=world)


FEW, MANY = (
    settings(max_examples=n, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    for n in (60, 600)
)


@FEW
@given(case=configurations())
def test_every_form_brings_the_configuration_back(tmp_path, case):
    comes_back(tmp_path, *case)


@pytest.mark.slow
@MANY
@given(case=configurations())
def test_every_form_brings_many_configurations_back(tmp_path, case):
    comes_back(tmp_path, *case)


def comes_back(tmp_path, words: list[str], world: int) -> None:
    first = load_config(words, world_size=world)
    for form in FORMS:
        text = write_form(first, form)
        assert again(text, form, tmp_path, world).config == first.config, text
    assert again(resolved_yaml(first), "sections", tmp_path, world).config == first.config


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_configurations_come_back(file, tmp_path):
    first = load_config(["--config", str(file)])
    for form in FORMS:
        assert again(write_form(first, form), form, tmp_path, first.world_size).config == first.config


def test_written_forms_are_short():
    words = shlex.split(write_form(load("--swiglu", "--bf16", "--disable-bias-linear"), "flags").replace("\\\n", " "))
    assert {"--swiglu", "--bf16", "--disable-bias-linear"} <= set(words)
    assert not {"--ffn-hidden-size", "--kv-channels", "--params-dtype", "--no-qkv-has-bias"} & set(words)


def test_string_values_that_look_like_other_types(tmp_path):
    first = load("--save", "0", "--data-path", "1", "2")
    for form in FORMS:
        assert again(write_form(first, form), form, tmp_path, 1).config == first.config


def test_values_that_look_like_flags_and_switches_without_an_opposite_come_back(tmp_path):
    (tmp_path / "given.yaml").write_text("no_load_optim: false\nsave: --x\nload: 'a b'\nuse_mcore_models: true\n")
    first = load("--config", str(tmp_path / "given.yaml"))
    for form in FORMS:
        assert again(write_form(first, form), form, tmp_path, 1).config == first.config


def test_what_a_flash_attention_by_default_has_no_form_of_comes_back(tmp_path):
    """Sections say `use_flash_attention: true` of every model; that is no wish."""
    first = load("--apply-query-key-layer-scaling", "--fp16")
    for form in FORMS:
        assert again(write_form(first, form), form, tmp_path, 1).config == first.config
