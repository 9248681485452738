"""BERT trains the same in every layout, and computes there what `transformers` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from parallel_core.checkpoint import open_checkpoint
from parallel_core.config.bert import BertConfig
from parallel_core.config.model_keys import model_of_settings
from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.data.parallel_batch import ENCODER_FIELDS, SPAN_FIELDS
from parallel_core.training.batches import make_batch_source
from parallel_core.training.encoder_steps import bert_forward_step, question_answering_forward_step
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_layouts import check, settings
from tests.ranks.support import SampleSource, Tiny, TinyRun, context_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "hf" / "bert"
BERT = {"bert": BertConfig(bert_head="pretraining", num_tokentypes=3)}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS_OF_2 = ["tp2", "tp2 sp", "pp2", "pp2 vpp2", "dp2 distopt overlap"]
LAYOUTS_OF_4 = ["tp2 sp pp2 vpp2", "pp2 distopt overlap"]


class MaskedWords(SampleSource):
    """Random pairs of segments of several lengths, some words of which are asked for."""

    forward_step = staticmethod(bert_forward_step)

    def __init__(self, config: AllConfig, context: ParallelContext, num_microbatches: int, iteration: int) -> None:
        super().__init__(config, context, num_microbatches, iteration)
        for microbatch, batch in enumerate(self._batches):
            rng = np.random.default_rng([iteration, microbatch * context.dp.size + context.dp.rank, 1])
            (B, S), place = batch["tokens"].shape, np.arange(config.model_config.seq_length)
            seen = place < rng.integers(S // 2, S + 1, (B, 1))
            batch["attention_mask"] = Tensor(seen.astype(np.int32))
            batch["tokentype_ids"] = Tensor((place >= rng.integers(1, S, (B, 1))).astype(np.int32) * seen)
            batch["loss_mask"] = batch["loss_mask"] * Tensor((seen | (place == 0)).astype(np.float32))
            batch["is_random"] = Tensor(rng.integers(0, 2, B).astype(np.int32))


@case(world_size=2, variants=[{"layout": name} for name in LAYOUTS_OF_2])
def test_two_ranks_train_an_encoder_like_one(ctx: CaseContext, layout: str) -> None:
    """The padding mask reaches every stage; words and the order of segments are learned on the last."""
    check(ctx, Tiny(model=BERT), settings(layout).with_(model=BERT), rtol=4e-6, source=MaskedWords)


@case(world_size=4, variants=[{"layout": name} for name in LAYOUTS_OF_4], slow=True)
def test_four_ranks_train_an_encoder_like_one(ctx: CaseContext, layout: str) -> None:
    """All layers recomputed, words alone, and dropout that the layout does not change."""
    rates = {} if "tp" in layout else {"hidden_dropout_rate": 0.2, "attention_dropout_rate": 0.2}
    model = {"bert": BertConfig(bert_head="masked_lm"), **rates}
    run = settings(layout).with_(model={**model, **RECOMPUTED})
    check(ctx, Tiny(model=model), run, rtol=4e-6, source=MaskedWords)


class Golden(SampleSource):
    """The goldens' one batch."""

    forward_step = staticmethod(question_answering_forward_step)

    def __init__(self, *_: Any) -> None:
        values = np.load(GOLDEN / "question_answering.npz")
        names = {"tokens": "tokens", "attention_mask": "attention_mask", "tokentype_ids": "token_type_ids",
                 "start_positions": "start", "end_positions": "end"}  # fmt: skip
        self._batches = [{name: Tensor(values[theirs].astype(np.int32)) for name, theirs in names.items()}]

    def iterator(self, chunk: int) -> Iterator[dict[str, Tensor | None]]:
        """Return the batch."""
        return iter(self._batches)


@case(world_size=2, variants=[{"layout": name} for name in ("tp2", "tp2 sp", "pp2")])
def test_transformers_answers_in_every_layout(ctx: CaseContext, layout: str) -> None:
    source, values = open_checkpoint(GOLDEN), np.load(GOLDEN / "question_answering.npz")
    stored = model_of_settings(source.common["model_config"])
    model = {field.name: getattr(stored, field.name) for field in dataclasses.fields(stored)}
    still = {"seq_length": 48, "attention_dropout_rate": 0.0, "hidden_dropout_rate": 0.0}
    uneven = {"num_layer_list": ((1,), (2,))} if layout == "pp2" else {}
    tiny = settings(layout).with_(parallel=uneven, model={**model, **still}, data={"global_batch_size": 2})
    run = TinyRun(tiny, context_of(ctx, tiny), source=Golden)
    run.take_weights(source)
    np.testing.assert_allclose(run.evaluate()["qa loss"], values["loss"], rtol=1e-6)
    (report,) = run.train(1)
    np.testing.assert_allclose(report.losses["qa loss"], values["loss"], rtol=1e-6)
    np.testing.assert_allclose(report.grad_norm, values["grad_norm"], rtol=2e-6)


@case(world_size=2, variants=[{"layout": name} for name in ("tp2", "pp2", "dp2")])
def test_batches_reach_every_stage_whole(ctx: CaseContext, layout: str) -> None:
    """One rank of a tensor parallel group reads, and every stage has the mask of padding."""
    for head, fields in (("pretraining", ENCODER_FIELDS), ("question_answering", SPAN_FIELDS)):
        tiny = settings(layout).with_(model={"bert": BertConfig(bert_head=head)}, data={"num_workers": 0})
        config, context = tiny.config(), context_of(ctx, tiny)
        rng, S = np.random.default_rng(0), config.model_config.seq_length
        samples = [
            {name: rng.random(S, np.float32) if name == "loss_mask" else rng.integers(0, 9, () if name in
             ("is_random", "start_positions", "end_positions") else S, np.int32) for name in fields}
            for _ in range(8)
        ]  # fmt: skip
        batches = make_batch_source(samples, 0, config, context, 1).iterator(0)
        for number in range(4 // context.dp.size):
            batch, first = next(batches), 2 * (number * context.dp.size + context.dp.rank)
            assert list(batch) == list(fields)
            for name, value in batch.items():
                wanted = np.stack([sample[name] for sample in samples[first : first + 2]])
                np.testing.assert_array_equal(value.asnumpy(), wanted)
