"""Two tensors of one name would share one place in a checkpoint: refused before anything is trained."""

from __future__ import annotations

import random

import pytest
from mindspore import mint, nn

from parallel_core.comm.interface import SoloGroup
from parallel_core.errors import ConfigError
from parallel_core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding, init_method_normal
from parallel_core.training.names import name_problems
from tests.helpers.one_process import run


class TwoLinears(nn.Cell):
    """A model whose two linear layers have the same name, unless they are given others."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        common = {"tp_group": SoloGroup(), "init_method": init_method_normal(0.2)}
        self.embedding = VocabParallelEmbedding(32, 8, **common)
        self.one = ColumnParallelLinear(8, 8, **common, **({"name": names[0]} if names else {}))
        self.two = ColumnParallelLinear(8, 32, **common, **({"name": names[1]} if names else {}))

    def construct(self, tokens, position_ids, document_start, labels):
        logits, _ = self.two(mint.tanh(self.one(self.embedding(tokens))[0]))
        return nn.CrossEntropyLoss(reduction="none")(logits.reshape(-1, 32), labels.reshape(-1)).reshape(labels.shape)


def test_two_layers_of_one_name_are_refused_at_start(tmp_path):
    with pytest.raises(ConfigError) as error:
        run(tmp_path / "same", "--save ck", provider=lambda pre_process, post_process: TwoLinears())
    assert "weight: 2 parameters on pipeline rank 0" in str(error.value)
    assert "Give each layer a name of its own (name=...," in str(error.value)
    assert len(run(tmp_path / "other", provider=lambda pre_process, post_process: TwoLinears("a", "b")).rows) == 4


def test_one_parameter_used_twice_is_one_tensor(tmp_path):
    class Tied(TwoLinears):
        def __init__(self) -> None:
            super().__init__("a", "b")
            self.again = self.one

    assert len(run(tmp_path, provider=lambda pre_process, post_process: Tied()).rows) == 4


def test_names_are_compared_over_stages_and_within_them():
    assert name_problems([(0, ["a", "b"]), (0, ["b", "a"]), (1, ["c"]), (1, ["c"])]) == []
    assert name_problems([(0, ["a", "x"]), (1, ["x"])]) == ["x: on pipeline ranks 0 and 1"]
    assert name_problems([(0, ["a", "a"]), (0, ["a", "a"])]) == ["a: 2 parameters on pipeline rank 0"]
    assert name_problems([(0, ["a"]), (0, ["a", "b"])]) == ["b: rank 0 lacks it, unlike rank 1 of the same stage"]
    assert name_problems([(0, ["a", "b"]), (0, ["a"])]) == ["b: rank 1 lacks it, unlike rank 0 of the same stage"]


def test_any_repeated_name_is_found():
    """Random models: there is a problem exactly if a name stands twice, whatever the order of the ranks."""
    rng = random.Random(1)
    for _ in range(300):
        stages = [[rng.choice("abcdefghijklmnop") for _ in range(rng.randint(0, 3))] for _ in range(rng.randint(1, 3))]
        ranks = [(stage, names) for stage, names in enumerate(stages) for _ in range(2)]
        rng.shuffle(ranks)
        every = [name for names in stages for name in names]
        assert bool(name_problems(ranks)) == (len(set(every)) < len(every))
