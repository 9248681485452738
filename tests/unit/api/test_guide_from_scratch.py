"""The guide to a model from scratch: each block's class registered, found by `type:`, and used as the guide uses it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from mindspore import Tensor
from mindspore.mindrecord import FileReader

from parallel_core.api import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    MindFormerRegister,
    Trainer,
    pipeline,
)
from parallel_core.api.bases import get_input_data_batch_slice_map
from parallel_core.errors import ConfigError
from tests.unit.api.test_trainer import GPT2

BPE = Path(__file__).resolve().parents[2] / "golden" / "data" / "bpe"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE_TARGET", "CPU")
    known = {kind: dict(classes) for kind, classes in MindFormerRegister.registry.items()}
    with mock.patch.dict(MindFormerRegister.registry, known):
        yield


@pytest.fixture
def gpt2(tmp_path):
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(tmp_path / "gpt2")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(BPE / name, tmp_path / "gpt2")
    return tmp_path / "gpt2"


def program(text: str, **names) -> dict:
    names = {"__name__": "guide", **names}
    exec(compile("from parallel_core.api import *\nimport numpy as np\n" + text, "guide", "exec"), names)
    return names


# ---- 1: a model with cells of its own, its configuration, and a YAML with both ---------------------------------------
MODEL = """
import mindspore as ms
from mindspore import Tensor, nn, ops


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class OwnGPT2Config(PretrainedConfig):
    _support_list = MindFormerBook.get_config_support_list()['gpt2']

    def __init__(self, seq_length: int = 1024, vocab_size: int = 50257, hidden_size: int = 768, num_layers: int = 12,
                 hidden_act: str = 'gelu', **kwargs):
        super(OwnGPT2Config, self).__init__(**kwargs)
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.hidden_act = hidden_act


class OwnGPT2Model(nn.Cell):
    def __init__(self, config):
        super(OwnGPT2Model, self).__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.CellList()
        for i in range(config.num_layers):
            self.blocks.append(nn.Dense(config.hidden_size, config.hidden_size, activation='relu'))

    def construct(self, input_ids):
        hidden_states = self.embedding(input_ids)
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return hidden_states


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class OwnGPT2LMHeadModel(PreTrainedModel):
    _support_list = MindFormerBook.get_model_support_list()['gpt2']

    def __init__(self, config: OwnGPT2Config = None):
        config = config if config is not None else OwnGPT2Config()
        super(OwnGPT2LMHeadModel, self).__init__(config, auto_prefix=True)
        self.backbone = OwnGPT2Model(config)
        self.head = nn.Dense(config.hidden_size, config.vocab_size)

    def construct(self, input_ids, attention_mask=None):
        tokens = input_ids[:, :-1]
        logits = self.head(self.backbone(tokens))
        if self.phase != 'train':
            return logits, tokens, ops.ones_like(tokens)
        labels = input_ids[:, 1:].reshape(-1)
        logits = logits.reshape(-1, logits.shape[-1])
        peak = ops.stop_gradient(logits.max(1, keepdims=True))
        picked = ops.gather_elements(logits, 1, labels.astype(ms.int64).reshape(-1, 1))[:, 0]
        return (ops.log(ops.exp(logits - peak).sum(1)) + peak[:, 0] - picked).mean()
"""
DATASET = """
@MindFormerRegister.register(MindFormerModuleType.DATASET)
class OwnDataset(BaseDataset):
    def __new__(cls, dataset_config: dict = None):
        rank_id, device_num = get_real_rank(), get_real_group_size()
        cls.init_dataset_config(dataset_config)
        rank_id, device_num = cls._check_device_rank_for_parallel(rank_id, device_num)
        rows = [np.arange(9, dtype=np.int32) + n % 5 for n in range(dataset_config.rows)]
        return [{"input_ids": np.stack(rows[i:i + dataset_config.batch_size])}
                for i in range(0, len(rows), dataset_config.batch_size)] * dataset_config.repeat
"""
YAML = """
# \u8bad\u7ec3\u914d\u7f6e
output_dir: ./out
runner_config: {epochs: 3, batch_size: 4}
trainer: {type: OwnTrainer, model_name: gpt2}
train_dataset: &rows {rows: 32, batch_size: 8}
train_dataset_task: {type: OwnDataset, dataset_config: *rows}
eval_dataset: {rows: 8, batch_size: 4}
eval_dataset_task: {type: OwnDataset}
model:
  model_config: {type: OwnGPT2Config, seq_length: 8, vocab_size: 16, hidden_size: 12, num_layers: 2}
  arch: {type: OwnGPT2LMHeadModel}
lr_schedule: {type: polynomial, learning_rate: 1e-2, lr_end: 0.0, warmup_steps: 2}
optimizer: {type: FusedAdamWeightDecay, beta1: 0.9, beta2: 0.95, weight_decay: 0.1}
"""
TRAINER = """
@MindFormerRegister.register(MindFormerModuleType.TRAINER)
class OwnTrainer(BaseTrainer):
    def __init__(self, model_name: str = None):
        super(OwnTrainer, self).__init__("text_generation", model_name)

    def train(self, config=None, network=None, dataset=None, wrapper=None, optimizer=None, callbacks=None, **kwargs):
        self.training_process(config=config, network=network, callbacks=callbacks, dataset=dataset, wrapper=wrapper,
                              optimizer=optimizer, **kwargs)

    def evaluate(self, config=None, network=None, dataset=None, callbacks=None, compute_metrics=None, **kwargs):
        return self.evaluate_process(config=config, network=network, dataset=dataset, callbacks=callbacks,
                                     compute_metrics=compute_metrics, **kwargs)

    def predict(self, config=None, input_data=None, network=None, tokenizer=None, **kwargs):
        return self.predict_process(config=config, input_data=input_data, task='text_generation', network=network,
                                    tokenizer=tokenizer, **kwargs)
"""


def test_an_own_model_dataset_and_trainer_are_found_by_type_and_trained():
    names = program(MODEL + DATASET + TRAINER)
    Path("run_own.yaml").write_text(YAML, encoding="utf-8")
    trainer = Trainer(args="run_own.yaml")
    model = trainer._model
    assert type(model) is names["OwnGPT2LMHeadModel"]
    assert (trainer.args.adam_beta2, trainer.args.learning_rate) == (0.95, 0.01)
    before = trainer.evaluate()["loss"]
    weights = {p.name: p.asnumpy().copy() for p in model.get_parameters()}
    trainer.train()
    rows = [json.loads(line) for line in Path("out/log/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and rows[0]["loss"] == pytest.approx(before, rel=0.05)  # it keeps the weights it has
    assert trainer.evaluate()["loss"] < 0.9 * before
    assert any(not np.array_equal(weights[p.name], p.asnumpy()) for p in model.get_parameters())
    trainer.set_parallel_config(model_parallel=2)
    with pytest.raises(ConfigError, match="is not the number of ranks"):
        trainer.train()
    with pytest.raises(ConfigError, match="has cells of its own"):
        model.generate([1, 2])


def test_an_own_trainers_methods_train_evaluate_and_predict(gpt2):
    own = program(TRAINER)["OwnTrainer"](model_name="gpt2")
    rows = [np.arange(17) + n % 7 for n in range(8)]
    own.train({"batch_size": 4, "learning_rate": 0.01}, dataset=rows)
    assert own.evaluate(dataset=rows)["loss"] > 0
    (text,) = own.predict(input_data="hello", do_sample=False, max_new_tokens=2)
    assert text["text_generation_text"][0].startswith("hello")
    with pytest.raises(ConfigError, match="optimizer: training is what its arguments say"):
        own.train(dataset=rows, optimizer=object())


def test_the_book_lists_the_names_that_classes_know(gpt2):
    names = program("config_names = MindFormerBook.get_config_support_list()['gpt2']\n")
    assert names["config_names"][0] == "gpt2" and "gpt2_13b" in GPT2Config._support_list
    assert AutoConfig.from_pretrained("gpt2").num_layers == 2
    assert GPT2LMHeadModel.from_pretrained("gpt2").config.num_layers == 2


# ---- 2: processor, tokenizer, data -----------------------------------------------------------------------------------
PROCESSOR = """
@MindFormerRegister.register(MindFormerModuleType.PROCESSOR)
class OwnProcessor(ProcessorMixin):
    def __init__(self, tokenizer=None, max_length=128, padding='max_length', return_tensors='ms'):
        super(OwnProcessor, self).__init__(tokenizer=tokenizer, max_length=max_length, padding=padding,
                                           return_tensors=return_tensors)

    def __call__(self, text_input=None, image_input=None):
        output = {}
        if text_input is not None and self.tokenizer:
            if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
                raise TypeError(f"tokenizer should inherited from the PreTrainedTokenizerBase")
            if isinstance(text_input, str):
                text_input = [text_input]
            output['text'] = self.tokenizer(text_input, return_tensors=self.return_tensors,
                                            max_length=self.max_length, padding=self.padding)["input_ids"]
        return output
"""
TOKENIZER = """
import json
import re


@MindFormerRegister.register(MindFormerModuleType.TOKENIZER)
class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]

    def __init__(self, vocab_file, merges_file, errors="replace", unk_token="<|endoftext|>",
                 eos_token="<|endoftext|>", pad_token="<|endoftext|>", **kwargs):
        eos_token = AddedToken(eos_token, lstrip=False, rstrip=False) if isinstance(eos_token, str) else eos_token
        super().__init__(errors=errors, unk_token=unk_token, eos_token=eos_token, pad_token=pad_token, **kwargs)
        with open(vocab_file, encoding="utf-8") as vocab_handle:
            self.encoder = json.load(vocab_handle)
        self.decoder = {v: k for k, v in self.encoder.items()}
        with open(merges_file, encoding="utf-8") as merges_handle:
            bpe_merges = merges_handle.read().split("\\n")[1:-1]
        self.bpe_ranks = dict(zip([tuple(merge.split()) for merge in bpe_merges], range(len(bpe_merges))))

    @property
    def vocab_size(self):
        return len(self.encoder)

    def _tokenize(self, text):
        words = []
        for token in re.findall(r" ?[a-z]+| ?[^ a-z]+| +", text):
            word = list(token.replace(" ", "\\u0120"))
            while len(word) > 1:
                pairs = list(zip(word, word[1:]))
                best = min(pairs, key=lambda pair: self.bpe_ranks.get(pair, float("inf")))
                if best not in self.bpe_ranks:
                    break
                at = pairs.index(best)
                word[at:at + 2] = ["".join(best)]
            words += word
        return words

    def _convert_token_to_id(self, token):
        return self.encoder[token]

    def _convert_id_to_token(self, index):
        return self.decoder[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("\\u0120", " ")
"""


def test_own_processor_and_tokenizer_are_used_as_this_interfaces_own(gpt2):
    names = program(PROCESSOR + TOKENIZER)
    own = names["OwnTokenizer"].from_pretrained("gpt2")
    known = GPT2Tokenizer.from_pretrained("gpt2")
    for text in ("hello there", "the harbour of a town"):
        assert own.encode(text) == known.encode(text) and own.decode(own(text)["input_ids"]) == text
    assert (own.eos_token_id, own.pad_token_id) == (known.eos_token_id,) * 2
    made = MindFormerRegister.get_instance("processor", "OwnProcessor", tokenizer=own, max_length=12)
    ids = made("hello there")["text"].asnumpy()
    assert ids.shape == (1, 12) and ids[0, -1] == own.pad_token_id
    model = AutoModel.from_pretrained("gpt2")
    (found,) = pipeline("text_generation", model, own)("hello", do_sample=False, max_length=9)
    assert found["text_generation_text"][0].startswith("hello")
    with pytest.raises(ConfigError, match="2 words cannot be added"):
        own.add_tokens(["one", "two"])


def test_ids_are_cut_on_either_side_and_filled(gpt2):
    tokenizer = AutoTokenizer.from_pretrained("gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    found = tokenizer.prepare_for_model([1, 2, 3], max_length=5, padding="max_length")
    assert found["input_ids"] == [1, 2, 3] + [tokenizer.eos_token_id] * 2 and found["attention_mask"] == [1, 1, 1, 0, 0]
    left = tokenizer.prepare_for_model([1, 2, 3], [4], max_length=2, truncate_direction="LEFT",
                                       return_overflowing_tokens=True)  # fmt: skip
    assert (left["input_ids"], left["token_type_ids"], left["overflowing_tokens"]) == ([3, 4], [0, 1], [1, 2])


WIKITEXT = '''
import argparse
import collections
import logging
import re
import numpy as np

from mindspore.mindrecord import FileWriter
from parallel_core.api import AutoTokenizer


def preprocess_data(input_file):
    dataset_valid = []
    passage = []
    count = 0
    with open(input_file, 'r', encoding='utf-8') as f:
        for line in f:
            line = line.strip()
            if line:
                if line.startswith('=') and line.endswith('=') and passage:
                    dataset_valid.append(passage)
                    count += 1
                    passage = []
                elif line.startswith('=') and line.endswith('='):
                    continue
                else:
                    passage.append(line)
    res = []
    for line in dataset_valid:
        text = ""
        for sentence in line:
            text = text + " " + sentence
        res.append(text.strip())
    return res


def create_instance(tokenizer, sentence, ids, max_length=None):
    pair_ids = None
    if len(sentence) == 2:
        pair_ids = tokenizer.encode(sentence[1])
    return tokenizer.prepare_for_model(ids=ids, pair_ids=pair_ids, add_special_tokens=False, max_length=max_length,
                                       padding='max_length', truncate_direction="LEFT",
                                       return_overflowing_tokens=False, return_attention_mask=True)


def write_instance_to_file(writer, instance):
    features = collections.OrderedDict()
    features["input_ids"] = np.asarray(instance["input_ids"]).astype(np.int32)
    features["attention_mask"] = np.asarray(instance["attention_mask"]).astype(np.int32)
    features["labels"] = np.asarray(instance["input_ids"]).astype(np.int32)
    writer.write_raw_data([features])
    return features


def main(input_file, output_file, max_length):
    tokenizer = AutoTokenizer.from_pretrained("gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens([])
    writer = FileWriter(output_file, 1)
    data_schema = {"input_ids": {"type": "int32", "shape": [-1]},
                   "attention_mask": {"type": "int32", "shape": [-1]},
                   "labels": {"type": "int32", "shape": [-1]}}
    writer.add_schema(data_schema, "lm-schema")
    text_total = "\\n".join(preprocess_data(input_file))
    sentence = text_total.strip().split("\\t")
    total_ids = tokenizer.encode(sentence[0])
    total_length = (len(total_ids) // max_length) * max_length
    for i in range(total_length // max_length):
        ids = total_ids[max_length * i:max_length * (i + 1)]
        write_instance_to_file(writer, instance=create_instance(tokenizer, sentence, ids, max_length))
    writer.commit()
'''
ARTICLES = """ = One =

the first of the words
 = = Part = =
and the second

 = Two =
the third one
 = Three =
last
"""


@pytest.mark.parametrize("length", [5, 4])
def test_the_guides_wikitext_program_writes_blocks_of_both_lengths(gpt2, length):
    """For training S + 1 ids, to evaluate S; its loss of the last article is its own (the tool here keeps it)."""
    Path("wiki.train.tokens").write_text(ARTICLES)
    names = program(WIKITEXT)
    names["main"]("wiki.train.tokens", "rows.mindrecord", length)
    reader = FileReader("rows.mindrecord")
    rows = [record["input_ids"] for record in reader.get_next()]
    reader.close()
    ids = AutoTokenizer.from_pretrained("gpt2").encode("the first of the words\nand the second\nthe third one")
    count = len(ids) // length
    assert len(rows) == count > 0
    np.testing.assert_array_equal(np.stack(rows), np.array(ids[: count * length]).reshape(count, length))


def test_documents_are_reset_as_the_guides_function_resets_them():
    ids = np.array([[1, 4, 6, 9, 2, 10, 3], [7, 6, 6, 5, 8, 0, 6]])
    rows, positions, seen = get_input_data_batch_slice_map(ids, eos_token_id=6, dis=2)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 2]] and rows.shape == (2, 7)
    assert seen[0, 3].tolist() == [0, 0, 0, 1, 0, 0] and seen[0, 2].tolist() == [1, 1, 1, 0, 0, 0]


# ---- 3: a task ---------------------------------------------------------------------------------------------------
TASK = """
@MindFormerRegister.register(MindFormerModuleType.PIPELINE, alias="own_generation")
class OwnPipeline(BasePipeline):
    return_name = 'text_generation'

    def _sanitize_parameters(self, **pipeline_parameters):
        preprocess_params = {k: v for k, v in pipeline_parameters.items() if k in ('keys', 'add_special_tokens')}
        names = ['top_k', 'top_p', 'do_sample', 'eos_token_id', 'repetition_penalty', 'max_length', 'seed']
        return preprocess_params, {k: v for k, v in pipeline_parameters.items() if k in names}, {}

    def preprocess(self, inputs, **preprocess_params):
        add_special_tokens = preprocess_params.get('add_special_tokens', True)
        if isinstance(inputs, dict):
            inputs = inputs['text']
        input_ids = self.tokenizer(inputs, return_tensors=None, add_special_tokens=add_special_tokens)["input_ids"]
        return {"input_ids": input_ids}

    def forward(self, model_inputs, **forward_params):
        return {"output_ids": self.network.generate(model_inputs["input_ids"], **forward_params)}

    def postprocess(self, model_outputs, **postprocess_params):
        return [{self.return_name + '_text': self.tokenizer.decode(model_outputs["output_ids"],
                                                                   skip_special_tokens=True)}]
"""


def test_an_own_task_is_a_pipeline_by_its_name(gpt2):
    program(TASK)
    settings = {"do_sample": False, "max_length": 10}
    own, known = (pipeline(task, "gpt2", **settings) for task in ("own_generation", "text_generation"))
    assert own("hello") == own({"text": "hello"}) == known("hello") == known({"text": "hello"})
    assert own(["hello", "there"]) == known(["hello", "there"])
    with pytest.raises(ConfigError, match="or register it"):
        pipeline("another", "gpt2")


def test_a_pipeline_of_ones_own_class_takes_tensors_and_keeps_the_models_weights(gpt2):
    model = AutoModel.from_pretrained("gpt2")
    before = [p.asnumpy().copy() for p in model.get_parameters()]
    model(Tensor(np.arange(4, dtype=np.int32)[None]))
    assert all(np.array_equal(a, p.asnumpy()) for a, p in zip(before, model.get_parameters()))
    assert "mindformers" not in sys.modules
