"""Adapters in runs and checkpoints: small directories that go on to the bit, know their base, and merge into it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from parallel_core.checkpoint import find_checkpoint, open_checkpoint, read_tensor
from parallel_core.checkpoint.native import NativeCheckpoint
from parallel_core.config import load_config
from parallel_core.convert.cli import main as convert
from parallel_core.errors import CheckpointError, ConfigError
from parallel_core.generate.command import main as generate
from tests.helpers.one_process import evaluations, iterations, run

LORA = "--load {place}/base --lora-rank 4 --lora-alpha 8 --save ck --lr 5e-2 --num-layers 2"


def go(place: Path, name: str, words: str):
    """Run in a folder of its own below `place`; `{place}` in the words is that one."""
    return run(place / name, words.replace("{place}", str(place)))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    go(folder, "first", "--save {place}/base --num-layers 2")
    return folder


@pytest.fixture(scope="module")
def adapted(place):
    return go(place, "adapted", f"{LORA} --save {{place}}/ad --eval-iters 2")


def losses(seen) -> list[float]:
    return [row["loss"] for row in seen.rows if "split" not in row]


def test_the_first_loss_is_the_bases_to_the_bit_and_the_checkpoint_is_small(place, adapted):
    base = go(place, "base_on", "--load {place}/base --finetune --num-layers 2 --lr 5e-2")
    assert losses(adapted)[0] == losses(base)[0] and losses(adapted)[2] != losses(base)[2]
    held = NativeCheckpoint(find_checkpoint(place / "ad"))
    names = {key.partition("@")[0] for key in held.keys()}  # noqa: SIM118
    assert names and all(".lora_" in name for name in names)
    assert {key.partition("@")[2] for key in held.keys()} == {"", "exp_avg", "exp_avg_sq"}  # noqa: SIM118
    assert held.common["lora"]["rank"] == 4 and held.common["lora"]["base"].endswith("base/iter_0000004")
    assert any("Loaded base model" in line and "frozen" in line for line in adapted.lines)


def test_a_resumed_adapter_goes_on_to_the_bit(place, adapted):
    go(place, "half", f"{LORA} --save {{place}}/half_ck --exit-interval 2")
    rest = go(place, "rest", f"{LORA} --load {{place}}/half_ck --save {{place}}/half_ck")
    assert losses(rest) == losses(adapted)[2:]
    one, other = (NativeCheckpoint(find_checkpoint(place / name)) for name in ("ad", "half_ck"))
    for key in one.keys():  # noqa: SIM118
        np.testing.assert_array_equal(read_tensor(one, key), read_tensor(other, key))


@pytest.mark.parametrize("how", ["read as merged", "converted"])
def test_merged_is_the_adapter(how, place, adapted):
    load = "ad"
    if how == "converted":
        load = "merged"
        assert convert(["--load", str(place / "ad"), "--save", str(place / "merged"), "--quiet"]) == 0
    words = f"--load {{place}}/{load} --skip-train --eval-iters 2 --num-layers 2"
    ((_, _, got), *_) = evaluations(go(place, f"evaluated_{load}", words))
    ((_, _, wanted), *_) = evaluations(adapted)
    assert got == pytest.approx(wanted, rel=1e-6)
    base, found = (open_checkpoint(find_checkpoint(place / name)) for name in ("base", load))
    name = "decoder.layers.1.mlp.linear_fc1"
    adapter = NativeCheckpoint(find_checkpoint(place / "ad"))
    product = read_tensor(adapter, f"{name}.lora_B.weight") @ read_tensor(adapter, f"{name}.lora_A.weight")
    want = read_tensor(base, f"{name}.weight") + 2.0 * product
    np.testing.assert_allclose(read_tensor(found, f"{name}.weight"), want, rtol=0, atol=1e-6)
    rows = np.empty((3, 8), np.float32)
    found.read_into(f"{name}.weight", [(2, 5), (0, 8)], rows)
    np.testing.assert_allclose(rows, want[2:5], rtol=0, atol=1e-6)


def test_a_run_begins_with_the_adapters_of_a_peft_directory(place, adapted):
    base, adapter = "{place}/plain", "{place}/llama_ad"
    llama = "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --num-layers 2"
    llama += " --untie-embeddings-and-output-weights"
    own = f"{LORA} {llama} --lora-rank 4 --save {adapter}".replace("{place}/base", base)
    go(place, "plain_run", f"{llama} --save {base}")
    first = go(place, "llama_adapted", own)
    for to, load in (("peft", "llama_ad"), ("hf", "plain")):
        words = ["--to", to, "--load", str(place / load), "--save", str(place / to)]
        assert convert(words) == 0
    begun = own.replace(base, "{place}/peft").replace(adapter, "{place}/from_peft")
    with pytest.raises(CheckpointError, match="no optimizer state; add --no-load-optim .*--finetune"):
        go(place, "peft_run", begun)
    further = go(place, "peft_further", f"{begun} --finetune --lora-base {{place}}/hf")
    same = go(place, "native_further", begun.replace("{place}/peft", adapter) + " --finetune --save {place}/again")
    assert losses(further) == losses(same) != losses(first) and iterations(further) == [1, 2, 3, 4]
    for change, said in (("rank 5", "saved 4, asked 5"), ("target-modules linear_qkv", "on other layers")):
        with pytest.raises(CheckpointError, match=said):
            go(place, "peft_other", f"{begun} --finetune --lora-{change}")


def test_some_modules_alone_by_name_and_by_expression(place):
    words = "--load {place}/base --lora-rank 2 --num-layers 2 --train-iters 1 --save {place}/some --lora-target-modules"
    expression = r"decoder\.layers\.1\.mlp\..*"
    go(place, "some_run", f"{words} linear_proj {expression}")
    held = NativeCheckpoint(find_checkpoint(place / "some"))
    adapted = {key.rpartition(".lora_")[0] for key in held.keys()}  # noqa: SIM118
    assert adapted == {f"decoder.layers.{n}.self_attention.linear_proj" for n in (0, 1)} | {
        f"decoder.layers.1.mlp.linear_fc{n}" for n in (1, 2)
    }
    with pytest.raises(ConfigError, match="lora_target_modules .*: no layer of the model is meant"):
        go(place, "none_run", f"{words} linear_query")


def test_some_layers_have_another_rank_and_alpha(place):
    """As MindSpeed-Core-MS's `lora_config` says it, by expressions for the names that layers have there."""
    cells = {"cell": r".*layers\.1\.attention\.qkv_proj", "rank": 2, "alpha": 3}
    expressions = {"target_cells": [r".*attention\..*_proj", r".*\.mapping"]}
    told = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8, "target_cells": [expressions, cells]}
    (place / "lora.yaml").write_text(yaml.safe_dump({"lora_config": told}))
    words = "--load {place}/base --num-layers 2 --save {place}/own --config {place}/lora.yaml --lr 5e-2"
    whole = go(place, "own_run", words)
    held, merged = NativeCheckpoint(find_checkpoint(place / "own")), open_checkpoint(find_checkpoint(place / "own"))
    assert held.info("decoder.layers.1.self_attention.linear_qkv.lora_A.weight").shape[0] == 2
    assert held.info("decoder.layers.0.self_attention.linear_qkv.lora_A.weight").shape[0] == 4
    base = open_checkpoint(find_checkpoint(place / "base"))
    for layer, scale in ((0, 2.0), (1, 1.5)):
        name = f"decoder.layers.{layer}.self_attention.linear_qkv"
        product = read_tensor(held, f"{name}.lora_B.weight") @ read_tensor(held, f"{name}.lora_A.weight")
        want = read_tensor(base, f"{name}.weight") + np.float32(scale) * product
        np.testing.assert_allclose(read_tensor(merged, f"{name}.weight"), want, rtol=0, atol=1e-6)
    go(place, "own_half", words.replace("{place}/own", "{place}/own_half") + " --exit-interval 2")
    rest = go(place, "own_rest", words.replace("{place}/own", "{place}/own_half").replace("/base", "/own_half"))
    assert losses(rest) == losses(whole)[2:]
    with pytest.raises(CheckpointError, match="lora_target_ranks: saved .*qkv_proj=2:3.*, asked .*=5"):
        own = "--lora-target-ranks linear_qkv=5"
        go(place, "own_other", words.replace("/base", "/own_half") + f" --train-iters 6 {own}")
    with pytest.raises(ConfigError, match="lora_target_ranks linear_fc2: no layer with an adapter is meant"):
        go(place, "own_none", f"{words} --lora-target-ranks linear_fc2=5")


def test_adapters_of_experts_are_merged_and_not_written_for_peft(place, capsys, caplog):
    experts = "--num-experts 4 --disable-bias-linear --swiglu --position-embedding-type rope --normalization RMSNorm"
    experts += " --untie-embeddings-and-output-weights --num-layers 2"
    go(place, "moe_run", f"{experts} --save {{place}}/moe")
    words = f"{LORA} {experts} --lora-target-ranks linear_fc2=2 --save {{place}}/moe_ad --eval-iters 2"
    adapted = go(place, "moe_adapted", words.replace("{place}/base", "{place}/moe"))
    held = NativeCheckpoint(find_checkpoint(place / "moe_ad"))
    name = "decoder.layers.1.mlp.experts.experts.linear_fc"
    assert held.info(f"{name}1.lora_A.weight").shape[:2] == (4, 4) and held.info(f"{name}2.lora_B.weight").shape[2] == 2
    assert "exactly zero" not in caplog.text, "A has no gradient where B is zero"
    merged = go(place, "moe_merged", f"{experts} --load {{place}}/moe_ad --skip-train --eval-iters 2")
    assert evaluations(merged)[0][2] == pytest.approx(evaluations(adapted)[0][2], rel=1e-6)
    assert convert(["--to", "peft", "--load", str(place / "moe_ad"), "--save", str(place / "no")]) == 2
    assert "PEFT has no form for" in capsys.readouterr().err


def test_another_base_or_none_or_another_adapter_is_refused(place, adapted, tmp_path):
    words = f"{LORA} --load {{place}}/ad"
    with pytest.raises(CheckpointError, match="holds another adapter: lora_rank: saved 4, asked 5"):
        go(place, "again", words.replace("--lora-rank 4", "--lora-rank 5"))
    go(place, "other_run", "--save {place}/other --num-layers 2 --seed 7")
    with pytest.raises(CheckpointError, match="is not the base model of the adapter"):
        go(place, "again", f"{words} --lora-base {{place}}/other")
    shutil.copytree(place / "base", tmp_path / "moved")
    shutil.copytree(place / "ad", tmp_path / "ad")
    shutil.move(place / "base", place / "hidden")
    try:
        with pytest.raises(CheckpointError, match="is an adapter of .*base.*, which is not there.*--lora-base"):
            open_checkpoint(find_checkpoint(tmp_path / "ad"))
        moved = tmp_path / "moved"
        for to in ("native", "megatron"):
            told = ["--to", to, "--load", str(place / "ad"), "--save", str(tmp_path / to), "--quiet"]
            assert convert(told) == 2 and convert([*told, "--base", str(moved)]) == 0
        words_of = ["--load", str(tmp_path / "ad"), "--prompt", "1 2", "--max-new-tokens", "2"]
        assert generate(words_of) == 1 and generate([*words_of, "--base", str(moved)]) == 0
        assert convert(["--load", str(moved), "--save", str(tmp_path / "no"), "--base", str(moved)]) == 2
        more = "--train-iters 6 --override-opt_param-scheduler"
        seen = go(place, "moved_run", f"{words} --lora-base {moved} {more}")
        assert iterations(seen) == [5, 6]
    finally:
        shutil.move(place / "hidden", place / "base")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lora-rank 4", "adapts a model: give load"),
        ("--lora-rank -1 --load x", "must be above zero"),
        ("--lora-alpha 4", "there are none; give lora_rank"),
        ("--lora-rank 4 --load x --lora-alpha 0", "must be above zero"),
        ("--lora-rank 4 --load x --lora-dropout 1", "must be at least 0 and below 1"),
        ("--lora-rank 4 --load x --lora-target-modules query_key_value", "is called linear_qkv here"),
        ("--lora-rank 4 --load x --lora-target-modules (", "is no regular expression"),
        ("--lora-rank 4 --load x --lora-target-ranks (=2", "is no regular expression"),
        ("--lora-rank 4 --load x --lora-target-ranks linear_qkv", "is no TARGET=RANK"),
        ("--lora-rank 4 --load x --lora-target-ranks linear_qkv=0", "must be above zero"),
        ("--lora-rank 4 --load x --num-experts 4 --lora-dropout 0.1", "where the layout puts them"),
    ],
)
def test_what_adapters_need_is_said_before_anything_starts(words, said):
    base = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 --vocab-size 31"
    with pytest.raises(ConfigError, match=said):
        load_config(f"{base} {words}".split())


def test_the_seeds_words_ask_for_the_same():
    base = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 --vocab-size 31"
    lora = load_config(f"{base} --load x --use-lora".split()).config.training_config.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 32.0, 0.0)
    assert load_config(f"{base} --load x --lora-r 3".split()).config.training_config.lora.rank == 3
    none = load_config(f"{base} --no-use-lora --lora-rank 8 --lora-alpha 4".split())
    assert none.config.training_config.lora.rank == 0
