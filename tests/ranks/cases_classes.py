"""Classes of texts in every layout: transformers' loss and gradient norm, and batches that reach every stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from parallel_core.checkpoint import open_checkpoint
from parallel_core.config.model_keys import model_of_settings
from parallel_core.data.classified import ClassifiedDataset
from parallel_core.training.batches import make_batch_source
from parallel_core.training.classification import classification_forward_step
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_layouts import settings
from tests.ranks.support import SampleSource, TinyRun, context_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "hf" / "classes"


class Texts(SampleSource):
    """The goldens' four texts, two in a microbatch."""

    forward_step = staticmethod(classification_forward_step)

    def __init__(self, *_: Any) -> None:
        values = np.load(GOLDEN / "computed.npz")
        names = {"tokens": "ids", "lengths": "lengths", "label": "labels"}
        self._batches = [
            {name: Tensor(np.ascontiguousarray(values[theirs][i : i + 2])) for name, theirs in names.items()}
            for i in (0, 2)
        ]

    def iterator(self, chunk: int) -> Iterator[dict[str, Tensor | None]]:
        """Return the batches."""
        return iter(self._batches)


@case(world_size=2, variants=[{"layout": name} for name in ("tp2 sp", "pp2")])
def test_transformers_classes_in_every_layout(ctx: CaseContext, layout: str) -> None:
    source, values = open_checkpoint(GOLDEN), np.load(GOLDEN / "computed.npz")
    stored = model_of_settings(source.common["model_config"])
    model = {field.name: getattr(stored, field.name) for field in dataclasses.fields(stored)}
    still = {"seq_length": 12, "attention_dropout_rate": 0.0, "hidden_dropout_rate": 0.0}
    tiny = settings(layout).with_(model={**model, **still}, data={"global_batch_size": 4, "num_workers": 0})
    context = context_of(ctx, tiny)
    run = TinyRun(tiny, context, source=Texts)
    run.take_weights(source)
    np.testing.assert_allclose(run.evaluate()["class loss"], values["loss"], rtol=1e-5)
    (report,) = run.train(1)
    np.testing.assert_allclose(report.losses["class loss"], values["loss"], rtol=1e-5)
    np.testing.assert_allclose(report.grad_norm, values["grad_norm"], rtol=1e-5)
    rows = ClassifiedDataset([([n, n + 1], n) for n in range(4)], 8, 12, 59, 0)
    batch = next(make_batch_source(rows, 0, tiny.config(), context, 1).iterator(0))
    assert batch["tokens"].shape == (2, 12) and batch["lengths"].asnumpy().tolist() == [2, 2]
    assert batch["label"].asnumpy().tolist() == batch["tokens"].asnumpy()[:, 0].tolist()
