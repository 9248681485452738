"""MindFormers' interface: the guide's programs on local directories, weights that stay, and what is told."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from mindspore import Tensor

from parallel_core.api import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertForQuestionAnswering,
    BertTokenizer,
    ContextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Processor,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MindFormerModuleType,
    MindFormerRegister,
    PanguAlphaConfig,
    PanguAlphaHeadModel,
    ParallelContextConfig,
    PretrainedConfig,
    PreTrainedModel,
    TextIteratorStreamer,
    TextStreamer,
    init_context,
    pipeline,
)
from parallel_core.api.models import LiveWeights, model_class_of
from parallel_core.config.plan import model_parameters
from parallel_core.errors import CheckpointError, ConfigError
from parallel_core.generate.generator import Generator

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "seq_length": 64, "vocab_size": 600}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A directory `gpt2` as the guide's programs find it: weights, settings and tokenizer of a small one."""
    folder = tmp_path_factory.mktemp("work") / "gpt2"
    GPT2LMHeadModel(GPT2Config(**SMALL)).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "data" / "bpe" / name, folder)
    return folder


@pytest.fixture(autouse=True)
def _here(gpt2, monkeypatch):
    monkeypatch.chdir(gpt2.parent)
    monkeypatch.setenv("DEVICE_TARGET", "CPU")


PROGRAMS = {
    "auto config and model": """
from parallel_core.api import AutoConfig, AutoModel

gpt_config = AutoConfig.from_pretrained("gpt2")
gpt_model = AutoModel.from_pretrained("gpt2")
assert type(gpt_model).__name__ == "GPT2LMHeadModel" and gpt_config.num_layers == 2
""",
    "a configuration and a model by their classes": """
from parallel_core.api import GPT2LMHeadModel, GPT2Config

gpt_13b_config = GPT2Config.from_pretrained("gpt2_13b")
gpt_model = GPT2LMHeadModel.from_pretrained("gpt2")
assert (gpt_13b_config.hidden_size, gpt_13b_config.num_layers, gpt_13b_config.seq_length) == (5120, 40, 2048)
print(GPT2Config._support_list, GPT2LMHeadModel._support_list)
""",
    "a model of one's own sizes": """
from parallel_core.api import GPT2LMHeadModel, GPT2Config

gpt_config = GPT2Config(hidden_size=48, num_layers=3, vocab_size=600, seq_length=32)
gpt_model = GPT2LMHeadModel(gpt_config)
""",
    "auto tokenizer": """
from parallel_core.api import AutoTokenizer

gpt_tokenizer = AutoTokenizer.from_pretrained("gpt2")
found = gpt_tokenizer("hello!")
assert found["token_type_ids"] == [0] * len(found["input_ids"]) and found["attention_mask"] == [1] * len(
    found["input_ids"])
""",
    "tokenizer by its class": """
from parallel_core.api import GPT2Tokenizer

gpt_tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
assert gpt_tokenizer.decode(gpt_tokenizer("hello!")["input_ids"]) == "hello!"
""",
    "auto processor": """
from parallel_core.api import AutoProcessor

gpt_processor = AutoProcessor.from_pretrained("gpt2")
assert gpt_processor("hello!")["text"].shape == (1, 128)
""",
    "processor by its class": """
from parallel_core.api import GPT2Processor

gpt_processor = GPT2Processor.from_pretrained('gpt2')
assert str(gpt_processor("hello!")["text"].dtype) == "Int32"
""",
    "a processor over a tokenizer": """
from parallel_core.api import GPT2Processor, GPT2Tokenizer

tok = GPT2Tokenizer.from_pretrained("gpt2")
gpt_processor = GPT2Processor(tokenizer=tok, max_length=256, return_tensors='ms')
ids = gpt_processor("hello!")["text"].asnumpy()
assert ids.shape == (1, 256) and ids[0, -1] == tok.pad_token_id
""",
    "pipeline by names": """
import mindspore; mindspore.set_context(mode=0, device_id=0)
from parallel_core.api import pipeline

text_generation = pipeline(task='text_generation', model='gpt2', max_length=30)
(found,) = text_generation("I love Beijing, because", do_sample=False)
assert found["text_generation_text"][0].startswith("I love Beijing, because")
""",
    "pipeline of a model and a tokenizer": """
import mindspore; mindspore.set_context(mode=0, device_id=0)
from parallel_core.api import pipeline
from parallel_core.api import GPT2LMHeadModel, GPT2Tokenizer

tok = GPT2Tokenizer.from_pretrained("gpt2")
gpt_model = GPT2LMHeadModel.from_pretrained("gpt2")

text_generation = pipeline(task='text_generation', model=gpt_model, tokenizer=tok, max_length=30)
named = pipeline(task='text_generation', model='gpt2', max_length=30)
text = "I love Beijing, because"
assert text_generation(text, do_sample=False) == named(text, do_sample=False)
""",
    "context of one device": """
from parallel_core.api import init_context, ContextConfig


def context_init():
    context_config = ContextConfig(mode=0, device_target="Ascend", device_id=0)
    rank_id, device_num = init_context(use_parallel=False, context_config=context_config)
    assert (rank_id, device_num) == (0, 1)


context_init()
""",
    "contexts of several": """
from parallel_core.api import init_context, ContextConfig, ParallelContextConfig

for mode, more in (("DATA_PARALLEL", {"gradients_mean": True}), ("SEMI_AUTO_PARALLEL", {"full_batch": True})):
    context_config = ContextConfig(mode=0, device_target="Ascend", device_id=0)
    parallel_config = ParallelContextConfig(parallel_mode=mode, enable_parallel_optimizer=False, **more)
    rank_id, device_num = init_context(use_parallel=True, context_config=context_config,
                                       parallel_config=parallel_config)
""",
}
"""The guide's code blocks: another import, sizes reduced, a directory in place of a download."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_guides_program_runs(name):
    exec(compile(PROGRAMS[name], name, "exec"), {})


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    it = Generator(folder)
    return it.generate([prompt], {"temperature": 0.0, "max_new_tokens": count})[0].tokens


def test_a_given_model_keeps_its_weights_and_is_read_as_it_is_now(gpt2):
    model = AutoModel.from_pretrained(gpt2)
    tokens = AutoTokenizer.from_pretrained(gpt2)("hello")["input_ids"]
    (row,) = model.generate(tokens, do_sample=False, max_new_tokens=5)
    assert row.dtype == np.int32 and row.tolist() == [*tokens, *greedy(gpt2, tokens, 5)]
    before = {name: p.asnumpy().copy() for name, p in model.parameters_and_names()}
    pipeline("text_generation", model, GPT2Tokenizer.from_pretrained(gpt2), max_length=12)("hello", do_sample=False)
    assert all(np.array_equal(before[name], p.asnumpy()) for name, p in model.parameters_and_names())
    table = model.network.embedding.word_embeddings.weight
    table.set_data(Tensor(np.roll(table.asnumpy(), 7, axis=0)))
    (other,) = model.generate(tokens, do_sample=False, max_new_tokens=5)
    assert other.tolist() != row.tolist()


def test_sampling_is_repeatable_and_follows_the_call_then_the_configuration(gpt2):
    model = AutoModel.from_pretrained(gpt2)
    first, again, other = (model.generate([[5, 6]], max_new_tokens=12, seed=seed)[0].tolist() for seed in (None, 0, 1))
    assert first == again != other
    model.config.do_sample = False
    assert model.generate([[5, 6]], max_new_tokens=12)[0].tolist()[2:] == greedy(gpt2, [5, 6], 12)
    rows = model.generate([[5, 6], [7]], max_length=9)
    assert [len(row) for row in rows] == [9, 9]
    with pytest.raises(ConfigError, match="num_beams: no such setting"):
        model.generate([[5]], num_beams=2)
    with pytest.raises(ConfigError, match="leaves max_length=0 no room"):
        model.generate([[5]], max_length=0)
    with pytest.raises(ConfigError, match="do_sample='False': give True or False"):
        model.generate([[5]], do_sample="False")
    with pytest.raises(ConfigError, match="leaves max_length=2 no room"):
        model.generate([[5, 6, 7]], max_length=2)


class Streamer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = False

    def put(self, ids: np.ndarray) -> None:
        self.seen.append(ids.tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_each_token(gpt2):
    model, streamer = AutoModel.from_pretrained(gpt2), Streamer()
    (row,) = model.generate([5, 6], do_sample=False, max_new_tokens=4, streamer=streamer)
    assert streamer.ended and streamer.seen == [[5, 6], *([token] for token in row.tolist()[2:])]


def test_logits_loss_and_padding(gpt2):
    model = AutoModel.from_pretrained(gpt2)
    ids = np.array([[5, 6, 7, 8], [9, 10, 0, 0]], np.int32)
    seen = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32)
    logits = model(Tensor(ids), Tensor(seen)).asnumpy().astype(np.float64)
    assert logits.shape == (2, 4, 600)
    shifted = logits - logits.max(-1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, np.roll(ids, -1, 1)[..., None], -1)[..., 0]
    wanted = (nll[:, :-1] * seen[:, 1:]).sum() / seen[:, 1:].sum()
    loss = model(Tensor(ids), Tensor(seen), Tensor(ids))
    np.testing.assert_allclose(loss.asnumpy(), wanted, rtol=1e-5)
    with pytest.raises(ConfigError, match="padding must be on the right"):
        model(Tensor(ids), Tensor(1 - seen))


def test_missing_weights_are_told_by_folder_and_never_random(gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint_download/gpt2/gpt2_13b is a folder"):
        AutoModel.from_pretrained("gpt2_13b")
    with pytest.raises(CheckpointError, match=r"no weights of 'gpt2'"):
        pipeline("text_generation", "gpt2")
    shutil.copytree(gpt2, tmp_path / "checkpoint_download" / "gpt2" / "gpt2")
    assert AutoModel.from_pretrained("gpt2").config.num_layers == 2
    (tmp_path / "checkpoint_download" / "gpt2" / "gpt2" / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match="files of no tokenizer"):
        AutoTokenizer.from_pretrained("gpt2")
    with pytest.raises(CheckpointError, match=r"has no vocab\.json"):
        GPT2Tokenizer.from_pretrained("gpt2")


def test_presets_have_the_published_sizes():
    sizes = {"gpt2": 124_439_808, "gpt2_xl": 1_557_611_200, "pangualpha_2_6b": 2_625_295_360,
             "pangualpha_13b": 12_800_870_400, "llama_7b": 6_738_415_616, "llama_13b": 13_015_864_320}  # fmt: skip
    for name, count in sizes.items():
        owner = next(kind for kind in (GPT2Config, PanguAlphaConfig, LlamaConfig) if name in kind.presets)
        assert model_parameters(owner(**owner.presets[name]).model_config()) == count, name


def test_settings_that_cannot_be_are_told_by_name(tmp_path):
    for made, told in (
        (lambda: GPT2Config(n_layer=2), "n_layer: no such setting"),
        (lambda: GPT2Config(hidden_size=30, num_heads=4).model_config(), "not a multiple of num_heads=4"),
        (lambda: GPT2Config(hidden_act="mish").model_config(), "hidden_act='mish'"),
        (lambda: GPT2Config(embedding_dropout_prob=0.0).model_config(), "one rate for both"),
        (lambda: AutoConfig.from_pretrained("gpt5"), "no preset"),
        (lambda: LlamaConfig.from_pretrained("gpt2"), "not of LlamaConfig"),
        (lambda: LlamaForCausalLM(GPT2Config()), "takes a LlamaConfig"),
        (lambda: pipeline("translation", "gpt2"), "task='translation'"),
        (lambda: ContextConfig(mode=3), "mode=3"),
        (lambda: ContextConfig(max_device_memory="58"), "max_device_memory='58'"),
        (lambda: ParallelContextConfig(parallel_mode="OTHER"), "OTHER"),
        (lambda: init_context(True, None, ParallelContextConfig(device_num=8)), "device_num=8, and 1 ranks"),
    ):
        with pytest.raises(ConfigError, match=told):
            made()


def test_a_yaml_of_mindformers_has_a_models_settings(tmp_path):
    text = "model:\n  model_config: {type: LlamaConfig, hidden_size: 32, num_layers: 1, num_heads: 4, seq_length: 16," \
           " vocab_size: 64, n_kv_heads: 2, batch_size: 1}\n"  # fmt: skip
    (tmp_path / "run.yaml").write_text(text)
    model = AutoModel.from_config(tmp_path / "run.yaml")
    assert isinstance(model, LlamaForCausalLM) and model.network.config.num_query_groups == 2
    assert model.network.config.ffn_hidden_size == 256
    (tmp_path / "bad.yaml").write_text("model: {}\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: has no model\.model_config"):
        AutoConfig.from_pretrained(tmp_path / "bad.yaml")


@pytest.mark.parametrize("kind", [LlamaForCausalLM, PanguAlphaHeadModel])
def test_other_models_are_made_saved_and_found_again(tmp_path, kind):
    config = kind.config_class(**{**SMALL, "vocab_size": 64})
    model = kind(config)
    ids = Tensor(np.arange(8, dtype=np.int32).reshape(1, 8))
    model.save_pretrained(tmp_path / "m")
    again = AutoModel.from_pretrained(tmp_path / "m")
    assert type(again) is kind is model_class_of(config)
    np.testing.assert_allclose(again(ids).asnumpy(), model(ids).asnumpy(), atol=1e-6)
    with pytest.raises(CheckpointError, match="is not empty"):
        model.save_pretrained(tmp_path / "m")


def test_answers_from_a_directory_and_from_a_model(tmp_path):
    folder = tmp_path / "qa"
    shutil.copytree(GOLDEN / "hf" / "bert", folder)
    words = (GOLDEN / "squad" / "vocab.txt").read_text().split("\n")[:320]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    context = "The harbour was built in 1712 by Ida Thorne, who had learned her trade - in Orrin."
    for qa in (
        pipeline("question_answering", folder, seq_length=48),
        pipeline("question_answering", BertForQuestionAnswering.from_pretrained(folder),
                 BertTokenizer.from_pretrained(folder), seq_length=48),
    ):  # fmt: skip
        (answer,) = qa(f"{context} - Who built it?")
        assert set(answer) == {"text", "score", "start", "end"}
        assert answer["text"] == context[answer["start"] : answer["end"]]
        both = qa([f"{context} - Who built it?", {"context": context, "question": "When?"}], top_k=3)
        assert both[0][0] == answer and [len(one) for one in both] == [3, 3]
    with pytest.raises(ConfigError, match="no head for answers"):
        pipeline("question_answering", AutoModel.from_pretrained("gpt2"), BertTokenizer.from_pretrained(folder))
    with pytest.raises(ConfigError, match="give tokenizer"):
        pipeline("question_answering", BertForQuestionAnswering.from_pretrained(folder))


def test_two_segments_padding_and_arrays(tmp_path):
    shutil.copy(GOLDEN / "squad" / "vocab.txt", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, BertTokenizer)
    found = tokenizer("the harbour", "who ?", padding="max_length", max_length=12, return_tensors="np")
    first, second = (len(tokenizer.encode(text, add_special_tokens=False)) for text in ("the harbour", "who ?"))
    assert found["token_type_ids"][0].tolist() == [0] * (first + 2) + [1] * (second + 1) + [0] * (9 - first - second)
    assert found["attention_mask"].sum() == first + second + 3
    assert tokenizer.decode(found["input_ids"]) == ["the harbour who ?"]
    with pytest.raises(ConfigError, match="give padding=True"):
        tokenizer(["the", "the harbour of"], return_tensors="ms")
    with pytest.raises(ConfigError, match="give truncation=True"):
        tokenizer("the harbour of", padding="max_length", max_length=3)


def test_weights_in_memory_are_read_as_a_checkpoint_is(gpt2):
    model = AutoModel.from_pretrained(gpt2)
    source = LiveWeights(model)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    out = np.empty((3, 5), np.float32)
    assert source.read_into(name, [(2, 5), (1, 6)], out) == 1
    np.testing.assert_array_equal(out, model.network.decoder.layers[0].mlp.linear_fc1.weight.asnumpy()[2:5, 1:6])
    assert source.info(name).dtype == "float32" and json.dumps(source.common)
    assert isinstance(AutoProcessor.from_pretrained(gpt2), GPT2Processor)


# ---- streamers -------------------------------------------------------------------------------------------------------
def put_one_by_one(streamer, text: str) -> None:
    streamer.put(np.array(streamer.tokenizer.encode("a prompt ")))
    for token in streamer.tokenizer.encode(text):
        streamer.put(np.array([token]))


def test_words_are_printed_when_they_are_finished_and_cjk_at_once(gpt2, capsys):
    streamer = TextStreamer(GPT2Tokenizer.from_pretrained(gpt2), skip_prompt=True)
    put_one_by_one(streamer, "hello over ther")
    assert capsys.readouterr().out == "hello over "
    streamer.end()
    assert capsys.readouterr().out == "ther\n"
    put_one_by_one(streamer, "\u4f60\u597d")  # of several tokens each: never cut
    assert capsys.readouterr().out == "\u4f60\u597d"
    streamer.end()
    TextStreamer(GPT2Tokenizer.from_pretrained(gpt2)).put(np.array(streamer.tokenizer.encode("a prompt ")))
    assert capsys.readouterr().out == "\na prompt "


@pytest.mark.parametrize("counts", [True, False])
def test_both_dialects_of_penalties_are_what_whole_passes_with_them_choose(gpt2, counts):
    model = AutoModel.from_pretrained(gpt2)
    prompts = [[5, 7, 9, 7], [11, 3]]
    rows = model.generate(prompts, do_sample=False, max_length=14, repetition_penalty=1.6, counts=counts)
    for prompt, row in zip(prompts, rows):
        ids = list(prompt)
        while len(ids) < 14:
            z = model(Tensor(np.array([ids], np.int32))).asnumpy()[0, -1].astype(np.float64)
            times = np.bincount(ids[len(prompt) :], minlength=len(z)) if counts else None
            if counts:  # before 0.8: of generated tokens, for each time and once more
                z = z - np.log(np.exp(z - z.max()).sum()) - z.max() - times * 1.6 - (times > 0) * 1.6
            else:  # transformers': of prompt and continuation, once
                seen = sorted(set(ids))
                z[seen] = np.where(z[seen] < 0, z[seen] * 1.6, z[seen] / 1.6)
            ids.append(int(z.argmax()))
        assert row.tolist() == ids


def test_an_iterator_gives_what_is_generated_and_ends_on_errors(gpt2):
    tokenizer, model = GPT2Tokenizer.from_pretrained(gpt2), AutoModel.from_pretrained(gpt2)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60.0, skip_special_tokens=False)
    prompt, rows = tokenizer.encode("hello"), []
    thread = threading.Thread(target=lambda: rows.append(
        model.generate(prompt, do_sample=False, max_new_tokens=8, streamer=streamer)[0]))  # fmt: skip
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(rows[0][len(prompt) :], skip_special_tokens=False)
    streamer.timeout = 0.01
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        next(streamer)
    streamer.timeout = 60.0
    fails = mock.patch("parallel_core.generate.generator.Generator.generate", side_effect=ConfigError("no"))
    with fails, pytest.raises(ConfigError):
        model.generate(prompt, streamer=streamer, do_sample=False)
    assert list(streamer) == []


# ---- classes of one's own, as the guide registers them ---------------------------------------------------------------
OWN = """
__all__ = ['MyGPT2Config', 'MyGPT2LMHeadModel']


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class MyGPT2Config(PretrainedConfig):
    family = GPT2Config.family
    presets = {'gpt2_mine': {'num_layers': 3}}


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class MyGPT2LMHeadModel(PreTrainedModel):
    config_class = MyGPT2Config

    def construct(self, input_ids, attention_mask=None):
        logits = super().construct(input_ids, attention_mask)
        return logits, input_ids
"""


def test_a_registered_model_is_made_from_yaml_with_chinese_comments(tmp_path):
    """Its own configuration and class, by the names that `type` gives; the file is read as UTF-8."""
    classes = (MindFormerRegister, MindFormerModuleType, PretrainedConfig, PreTrainedModel, GPT2Config)
    names = {one.__name__: one for one in classes}
    exec(compile(OWN, "own", "exec"), names)
    text = "model:\n  arch: {type: MyGPT2LMHeadModel}  # \u6a21\u578b\n  model_config:\n    type: MyGPT2Config\n"
    text += "".join(f"    {name}: {value}\n" for name, value in SMALL.items())
    (tmp_path / "run_own.yaml").write_text(text, encoding="utf-8")
    model = AutoModel.from_config(tmp_path / "run_own.yaml")
    assert type(model) is names["MyGPT2LMHeadModel"] and model.config.num_layers == 2
    logits, ids = model(Tensor(np.arange(6, dtype=np.int32)[None]))
    assert logits.shape == (1, 6, 600) and ids.shape == (1, 6)
    assert AutoConfig.from_pretrained("gpt2_mine").num_layers == 3
    assert MindFormerRegister.get_cls("models", "MyGPT2LMHeadModel") is type(model)


def test_the_register_tells_what_it_lacks():
    @MindFormerRegister.register("dataset", alias="rows")
    class Rows:
        def __init__(self, count: int, width: int = 2) -> None:
            self.shape = count, width

    made = MindFormerRegister.get_instance_from_cfg({"type": "rows", "count": 3}, "dataset", {"width": 5, "count": 1})
    assert made.shape == (3, 5) and MindFormerRegister.is_exist("dataset", "rows")
    for call, told in (
        (lambda: MindFormerRegister.get_cls("dataset", "columns"), "'columns' is not registered as dataset; there are"),
        (lambda: MindFormerRegister.get_instance_from_cfg({"count": 3}, "dataset"), "has no type"),
        (lambda: MindFormerRegister.register("datasets"), "module_type='datasets'"),
        (lambda: MindFormerRegister.register("dataset", alias="rows")(dict), "registered as dataset already"),
    ):
        with pytest.raises(ConfigError, match=told):
            call()
