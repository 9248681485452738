"""What went wrong with PanGu-alpha elsewhere, one test for each situation that no other file's test names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from parallel_core.checkpoint.mindspore.files import Layout
from parallel_core.checkpoint.mindspore.slices import shard_ranks
from parallel_core.config import load_config
from parallel_core.config.plan import model_parameters
from parallel_core.data.tokenizer import PanguTokenizer
from parallel_core.generate.text import TextStream
from parallel_core.optimizer.schedules import ScheduleShape
from parallel_core.transformer import ModelStage
from parallel_core.transformer.models import PanguAlphaModel
from tests.helpers.one_process import Samples, run

ROOT = Path(__file__).resolve().parents[3]
PANGU = "--hidden-act fast_gelu --top-query-layer norm_before --num-layers 2"


def trained(folder: Path, words: str) -> list[dict[str, Any]]:
    """Return the metrics of a small run."""

    def provider(pre_process: bool, post_process: bool, stage: ModelStage) -> PanguAlphaModel:
        return PanguAlphaModel(stage)

    return run(folder, words, provider=provider, datasets=(Samples(160), None, None)).rows


def test_the_preset_called_1_3b_has_1_3_billion_parameters_and_not_a_quarter_of_one():
    model = load_config(["--config", str(ROOT / "configs/pangu_alpha_1.3b.yaml")]).config.model_config
    assert 1.3e9 < model_parameters(model) < 1.4e9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_with_a_loss_scale_of_2_to_the_32_skipped_steps_move_neither_rate_nor_weights(tmp_path):
    """The rate counts updates, the data goes on; the first updates are skipped until the scale has come down."""
    words = f"{PANGU} --fp16 --initial-loss-scale 4294967296 --hysteresis 1 --lr-decay-style cosine-from-zero"
    words += " --lr-warmup-iters 3 --train-iters 40 --lr-decay-iters 40 --min-lr 1e-3 --init-method-std 0.5"
    seen = trained(tmp_path, words)
    skipped = [row["skipped"] for row in seen]
    updates = np.cumsum([0, *(not s for s in skipped)])[:-1]
    assert skipped[0] and not all(skipped) and seen[0]["loss_scale"] == 2.0**32
    shape = ScheduleShape(0.0, 1e-2, 1e-3, 3, 40, "cosine-from-zero")
    assert [row["lr"] for row in seen] == pytest.approx([shape.lr(int(done)) for done in updates], rel=1e-9, abs=1e-15)
    first = skipped.index(False)
    assert [row["loss_scale"] for row in seen[: first + 1]] == [2.0 ** (32 - i) for i in range(first + 1)]
    assert [row["consumed_samples"] for row in seen[:3]] == [4, 8, 12]


@pytest.mark.parametrize("micro", [2, 1])
def test_a_batch_in_more_microbatches_has_the_same_loss_in_the_log_and_the_same_gradient(micro, tmp_path):
    """Where copies of a batch were interleaved, losses were added and the log divided in one place of two."""
    rows = []
    for size in (4, micro):
        words = f"{PANGU} --micro-batch-size {size} --global-batch-size 4 --train-iters 2"
        rows.append(trained(tmp_path / str(size), words))
    for one, other in zip(*rows):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_optimizer_shards_lie_in_blocks_of_step_times_size_ranks_and_not_of_a_quotient():
    """512 ranks, model parallel 8, 16 shards: MindSpore up to 1.3 took 512 / 8 / 16 = 4 ranks for a block."""
    layout = Layout((64, 8), (0, -1), shard_step=8, shard_size=16)
    assert shard_ranks(3, layout, 512) == list(range(3, 128, 8))
    assert shard_ranks(131, layout, 512) == list(range(131, 256, 8))
    assert shard_ranks(3, Layout((64, 8), (0, -1), 8, -1), 512) == list(range(3, 512, 8))


def test_decoded_text_and_pieces_of_a_stream_have_no_marks_and_whole_characters(tmp_path):
    (tmp_path / "text").write_text("今天 是 好天气\n你好\n" * 40, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=40, hard_vocab_limit=False,
        minloglevel=2, user_defined_symbols=["\u2583", "\u2582", "<sep>", "<pad>", "<mask>", "<eod>", "<eot>"],
    )  # fmt: skip
    tokenizer = PanguTokenizer(str(tmp_path / "m.model"), list)
    text = "今天 是\n好天气"
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    stream = TextStream(tokenizer.detokenize)
    for token in ids:
        stream.add(token)
        assert text.startswith(stream.text)
    stream.end()
    assert stream.text == text


def test_a_configuration_with_chinese_comments_is_read_as_utf_8_whatever_the_locale(tmp_path):
    text = (ROOT / "configs/pangu_alpha_350m.yaml").read_text(encoding="utf-8")
    (tmp_path / "c.yaml").write_text("# 盘古-α 的配置：三点五亿参数\n" + text, encoding="utf-8")
    command = [sys.executable, "-X", "utf8=0", "-m", "parallel_core.config", "show", str(tmp_path / "c.yaml")]
    done = subprocess.run(command, env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, capture_output=True)
    assert done.returncode == 0 and b"hidden_size" in done.stdout, done.stderr
