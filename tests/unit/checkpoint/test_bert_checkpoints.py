"""BERT of Hugging Face, with every head: `transformers`' numbers, and files that come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from hf_models import loaded, parameters
from mindspore import Tensor, nn
from safetensors.numpy import load_file, save_file

from parallel_core import ops
from parallel_core.checkpoint import open_checkpoint
from parallel_core.checkpoint.huggingface.bert import BERT_CLASSES
from parallel_core.convert.cli import main
from parallel_core.errors import CheckpointError, ConfigError
from parallel_core.generate.loading import describe
from parallel_core.training.encoder_steps import masked_words_loss, span_loss
from parallel_core.transformer.models import BertModel

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "hf" / "bert"
VALUES, HEADS = np.load(GOLDEN / "question_answering.npz"), np.load(GOLDEN / "heads.npz")
HEAD_OF = {head: name for name, head in BERT_CLASSES.items()}
V, H = 320, 64


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    ops.use_kernels("auto")


def det(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that a name decides, as the goldens were made with."""
    values = 0.2 * np.sin(1.0 + 0.37 * np.arange(np.prod(shape)) + sum(map(ord, name)) % 97).reshape(shape)
    return (values + name.endswith("LayerNorm.weight")).astype(np.float32)


def tensors_of(head: str) -> dict[str, np.ndarray]:
    tensors = load_file(GOLDEN / "model.safetensors")
    if head == "question_answering":
        return tensors
    shapes: dict[str, tuple[int, ...]] = {}
    if head in ("masked_lm", "pretraining"):
        words = "cls.predictions.transform"
        shapes |= {"cls.predictions.bias": (V,), f"{words}.dense.weight": (H, H), f"{words}.dense.bias": (H,)}
        shapes |= {f"{words}.LayerNorm.{kind}": (H,) for kind in ("weight", "bias")}
    if head in ("pretraining", "encoder"):
        shapes |= {"bert.pooler.dense.weight": (H, H), "bert.pooler.dense.bias": (H,)}
    if head == "pretraining":
        shapes |= {"cls.seq_relationship.weight": (2, H), "cls.seq_relationship.bias": (2,)}
    encoder = {name: value for name, value in tensors.items() if name.startswith("bert.")}
    return {**encoder, **{name: det(name, shape) for name, shape in shapes.items()}}


def make(folder: Path, head: str, tensors: dict[str, np.ndarray] | None = None, **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {**json.loads((GOLDEN / "config.json").read_text()), "architectures": [HEAD_OF[head]], **settings}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(head) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(Tensor(VALUES[name].astype(np.int32)) for name in ("tokens", "attention_mask", "token_type_ids"))


class Loss(nn.Cell):
    """The mean loss of a head's task."""

    def __init__(self, model: BertModel, labels: np.ndarray, mask: np.ndarray) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.labels, self.mask = model, Tensor(labels), Tensor(mask)
        self.is_random = Tensor(np.array([0, 1], np.int32))
        self.places = [Tensor(VALUES[name].astype(np.int32)) for name in ("start", "end")]

    def construct(self, tokens: Tensor, seen: Tensor, types: Tensor) -> Tensor:
        if self.model.lm_head is None:
            return span_loss(*self.places, self.model(tokens, seen, types))[0]
        return masked_words_loss(self.mask, self.is_random, self.model(tokens, seen, types, self.labels))[0]


@pytest.mark.parametrize("head", ["question_answering", "masked_lm", "pretraining"])
def test_logits_loss_and_gradient(tmp_path, head):
    model = loaded(open_checkpoint(make(tmp_path, head)))
    mask = np.zeros(VALUES["tokens"].shape, np.float32)
    mask[:, 1:30:4] = 1
    labels = (VALUES["tokens"] * 7 + 3) % V * (mask > 0)
    loss, gradients = ms.value_and_grad(Loss(model, labels.astype(np.int32), mask), None, parameters(model))(*inputs())
    norm = sum(float((g.asnumpy().astype(np.float64) ** 2).sum()) for g in gradients) ** 0.5
    answers = head == "question_answering"
    np.testing.assert_allclose(loss.asnumpy(), VALUES["loss"] if answers else HEADS[f"{head}_loss"], rtol=1e-6)
    np.testing.assert_allclose(norm, VALUES["grad_norm"] if answers else HEADS[f"{head}_norm"], rtol=2e-6)
    if answers:
        both = np.stack([VALUES["start_logits"], VALUES["end_logits"]], -1)
        np.testing.assert_allclose(model(*inputs()).asnumpy(), both, atol=2e-6)
        return
    logits, follows = model(*inputs())
    np.testing.assert_allclose(logits.asnumpy()[0, ::16, :8], HEADS[f"{head}_logits"], atol=4e-6)
    if head == "pretraining":
        np.testing.assert_allclose(follows.asnumpy(), HEADS["binary_logits"], atol=2e-6)


def test_an_encoder_gives_hidden_states_and_the_pooled_first_one(tmp_path):
    hidden, pooled = loaded(open_checkpoint(make(tmp_path, "encoder")))(*inputs())
    assert hidden.shape == (2, 48, H)
    np.testing.assert_allclose(pooled.asnumpy()[:, :8], HEADS["pooled"], atol=2e-6)


def test_padding_is_seen_by_nobody_and_every_word_by_all(tmp_path):
    model = loaded(open_checkpoint(make(tmp_path, "question_answering")))
    tokens, seen, types = inputs()
    before = model(tokens, seen, types).asnumpy()
    changed = tokens.asnumpy().copy()
    changed[1, 30:] = 5
    np.testing.assert_array_equal(model(Tensor(changed), seen, types).asnumpy()[1, :30], before[1, :30])
    changed[1, 29] = 5
    assert np.abs(model(Tensor(changed), seen, types).asnumpy()[1, 0] - before[1, 0]).max() > 1e-4


@pytest.mark.parametrize("head", ["question_answering", "masked_lm", "pretraining", "encoder"])
def test_round_trip_is_bitwise(tmp_path, head):
    tensors = tensors_of(head)
    there = make(tmp_path / "there", head, tensors)
    (there / "vocab.txt").write_text("[PAD]\n")
    assert main(["--load", str(there), "--save", str(tmp_path / "native"), "--quiet"]) == 0
    assert main(["--to", "hf", "--load", str(tmp_path / "native"), "--save", str(tmp_path / "back"), "--quiet"]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: value.tobytes() for name, value in back.items()} == {n: v.tobytes() for n, v in tensors.items()}
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (there, tmp_path / "back"))
    resolved = {"add_cross_attention", "is_decoder", "transformers_version"}
    assert {key for key in first if first[key] != second.get(key)} <= resolved
    assert main(["--to", "hf", "--load", str(there), "--save", str(tmp_path / "again"), "--quiet"]) == 0
    assert (tmp_path / "again" / "vocab.txt").read_text() == "[PAD]\n"


def test_older_names_and_what_the_class_has_no_use_for(tmp_path):
    """Files of TensorFlow's time: gamma and beta, the tied decoder stored again, heads that the class leaves out."""
    tensors = tensors_of("pretraining")
    older = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
             for name, value in tensors.items()}  # fmt: skip
    older["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    older["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    older["bert.embeddings.position_ids"] = np.arange(64)[None]
    model = loaded(open_checkpoint(make(tmp_path / "older", "masked_lm", older)))
    logits = model(*inputs())[0].asnumpy()
    np.testing.assert_allclose(logits[0, ::16, :8], HEADS["masked_lm_logits"], atol=4e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
     ({"architectures": None}, "names the model's head"), ({"is_decoder": True}, "is_decoder=True"),
     ({"position_embedding_type": "relative_key"}, "relative_key")],
)  # fmt: skip
def test_other_encoders_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(make(tmp_path, "encoder", **settings))


def test_a_missing_head_is_named_and_an_encoder_continues_no_text(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing qa_outputs\.weight"):
        open_checkpoint(make(tmp_path / "a", "question_answering", tensors_of("masked_lm")))
    with pytest.raises(ConfigError, match="an encoder continues no text"):
        describe(make(tmp_path / "b", "masked_lm"))


def test_megatron_has_no_such_encoder(tmp_path, capsys):
    there = make(tmp_path / "there", "masked_lm")
    assert main(["--to", "megatron", "--load", str(there), "--save", str(tmp_path / "m"), "--quiet"]) != 0
    assert "tensors Megatron does not" in capsys.readouterr().err
