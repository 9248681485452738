"""Conversations: which tokens are learned, how samples are packed, and that packed ones do not see each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor

from parallel_core.config import load_config
from parallel_core.data import parse_blend
from parallel_core.data.chat import FORMATS, ChatTemplate, chat_template
from parallel_core.data.data_order import data_order_fingerprint, describe_data_order
from parallel_core.data.sft_dataset import pack
from parallel_core.errors import ConfigError, DataError
from parallel_core.training.datasets import gpt_dataset_config
from parallel_core.transformer import GPTModel, ModelStage
from tests.helpers.one_process import evaluations, run
from tests.helpers.talks import TALKS, Letters, datasets, talk, write

pytest.importorskip("jinja2", reason="pip install 'parallel_core[chat]'")
BPE = Path(__file__).parents[2] / "golden/data/bpe"
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
MARKED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)


def learned(template: str, messages) -> str:
    """Return the text of a conversation with what is learned in brackets."""
    text, spans = ChatTemplate(template, {}, Letters()).answers(messages)
    for begin, end in reversed(spans):
        text = f"{text[:begin]}[{text[begin:end]}]{text[end:]}"
    return text


def test_answers_are_what_the_assistant_has_written():
    messages = talk("hi", "yo", "so", "no")["messages"]
    assert learned(FORMATS["plain"], messages) == "User: hi\nAssistant:[ yo\n]User: so\nAssistant:[ no\n]"
    assert learned(MARKED, messages) == "user:hi\nassistant:[yo]\nuser:so\nassistant:[no]\n"
    assert learned(FORMATS["identity"], messages) == "hi[yo]so[no]"
    told = [{"role": "system", "content": " s "}, *messages]
    assert learned(FORMATS["nemotron-h-aligned"], told) == (
        "<SPECIAL_10>System\ns\n<SPECIAL_11>User\nhi\n<SPECIAL_11>Assistant\n[yo\n]"
        "<SPECIAL_11>User\nso\n<SPECIAL_11>Assistant\n[no\n]"
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert learned(FORMATS["identity"], parts) == "ab"
    forgetful = "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"messages\[1\]: .*in another way.*generation"):
        learned(forgetful, messages)


def test_a_sample_equals_the_one_made_by_hand(tmp_path):
    path = write(tmp_path / "two.jsonl", [talk("hi", "yo"), talk("a", "b", "c", "d", weight=0)])
    dataset, *_ = datasets(path, 72)
    assert len(dataset) == 1
    sample, read = dataset[0], Letters()
    one, two = "User: hi\nAssistant: yo\n\0", "User: a\nAssistant: b\nUser: c\nAssistant: d\n\0"
    first, second = (one, two) if read.detokenize(sample["tokens"][:7]) == "User: h" else (two, one)
    tokens = first[:-1] + second[:-1]
    labels = first[1:] + second[1:]
    # under each label whether it is learned: the answers, their line's end and the end of text, but not weight 0
    marks = {one: "." * 18 + "xxxxx", two: "." * 17 + "xxx" + "." * 22}
    mask = marks[first] + marks[second]
    rest = 72 - len(tokens)
    assert read.detokenize(sample["tokens"]) == tokens + "\0" * rest
    assert read.detokenize(sample["labels"]) == labels + "\0" * rest
    assert "".join("x" if m else "." for m in sample["loss_mask"]) == mask + "." * rest
    begins = [0] * (len(first) - 1) + [len(first) - 1] * (len(second) - 1) + [len(tokens)] * rest
    np.testing.assert_array_equal(sample["document_start"], begins)
    np.testing.assert_array_equal(sample["position_ids"], np.arange(72) - begins)
    assert {sample[name].dtype.name for name in sample} == {"int32", "float32"}


def test_lines_of_several_conversations_are_split_at_system_messages(tmp_path):
    system = {"role": "system", "content": "be"}
    line = {"messages": [system, *talk("a", "b")["messages"], system, *talk("c", "d")["messages"]]}
    (train, *_), (split, *_) = (
        datasets(write(tmp_path / f"{n}.jsonl", lines), 99)
        for n, lines in enumerate(([line], [{"messages": line["messages"][:3]}, {"messages": line["messages"][3:]}]))
    )
    assert len(train.indices) == 2
    for name, values in train[0].items():
        np.testing.assert_array_equal(values, split[0][name])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=200), st.integers(20, 64), st.integers(0, 9))
def test_packing_puts_each_conversation_in_one_sample(sizes, room, seed):
    order = np.random.default_rng(seed).permutation(len(sizes))
    packed = pack(order, np.array(sizes), room)
    assert sorted(number for one in packed for number in one) == list(range(len(sizes)))
    filled = [sum(sizes[number] for number in one) for one in packed]
    assert max(filled) <= room
    assert len(packed) == 1 or sum(filled[i] + filled[i + 1] <= room for i in range(len(filled) - 1)) == 0


def test_samples_do_not_depend_on_how_many_are_asked_for_and_the_order_has_a_name(tmp_path):
    path = write(tmp_path / "t.jsonl", TALKS)
    few, many, other = (
        datasets(path, 48, (number, 0, 0), random_seed=seed)[0] for number, seed in ((3, 5), (40, 5), (3, 6))
    )
    assert len(many) >= 40 and few.samples_per_epoch == many.samples_per_epoch
    for i in range(len(few)):
        np.testing.assert_array_equal(few[i]["tokens"], many[i]["tokens"])
    names = [data_order_fingerprint(describe_data_order(dataset)) for dataset in (few, many, other)]
    assert names[0] == names[1] != names[2]
    write(path, [*TALKS[1:], TALKS[0]])
    assert data_order_fingerprint(describe_data_order(datasets(path, 48, (3, 0, 0))[0])) != names[0]


def test_files_of_conversations_are_blended_and_split_as_others(tmp_path):
    one, other = (str(write(tmp_path / f"{n}.jsonl", lines)) for n, lines in enumerate((TALKS, TALKS[:3])))
    blend = {"blend": parse_blend(["0.75", one, "0.25", other]), "path_to_cache": str(tmp_path / "c")}
    blended, *_ = datasets(Path(one), 48, (20, 0, 0), **blend)
    assert np.bincount([int(blended[i]["dataset_id"]) for i in range(20)]).tolist() == [15, 5]
    own = {"blend": None, "split": None, "blend_per_split": (parse_blend([one]), parse_blend([other]), None)}
    train, valid, test = datasets(Path(one), 48, (20, 4, 0), **own)
    assert (train.dataset_path, valid.dataset_path, test) == (one, other, None) and len(valid) >= 4


def test_the_loss_of_a_packed_sample_is_that_of_each_conversation_alone(tmp_path):
    path, length = write(tmp_path / "t.jsonl", TALKS), 96
    for words in ("--position-embedding-type rope", "--max-position-embeddings 96"):
        config = load_config(
            f"--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length {length} --micro-batch-size 1 "
            f"--padded-vocab-size 64 --init-method-std 0.3 --train-iters 1 --lr 0.1 {NO_DROPOUT} {words}".split()
        ).config
        model = GPTModel(ModelStage(config.model_config)).set_train(False)
        dataset, *_ = datasets(path, length)

        def losses(sample, model=model):
            row = {name: Tensor(values[None]) for name, values in sample.items()}
            found = model(row["tokens"], row["position_ids"], row["document_start"], row["labels"])
            return found.asnumpy()[0]

        packed = [(losses(sample), sample["loss_mask"]) for sample in (dataset[i] for i in range(len(dataset)))]
        total = sum(float((found * mask).sum()) for found, mask in packed)
        count = sum(int(mask.sum()) for _, mask in packed)
        alone = 0.0
        for i, line in enumerate(TALKS):
            (single,) = datasets(write(tmp_path / f"{i}.jsonl", [line]), length)[:1]
            sample = {name: values[: single._sizes[0]] for name, values in single[0].items()}
            alone += float((losses(sample) * sample["loss_mask"]).sum())
        assert max(len(sample) for sample in dataset._samples) > 2
        assert total / count == pytest.approx(alone / count, rel=1e-6)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"t.jsonl:2: "),
        ('{"messages": []}', r"t.jsonl:2: write"),
        ('{"text": "a"}', r"t.jsonl:2: write"),
        ('{"messages": ["a"]}', r"t.jsonl:2: messages\[0\]: write"),
        ('{"messages": [{"role": "assistant", "content": 5}]}', r"t.jsonl:2: messages\[0\]: send"),
        (json.dumps(talk("a")), r"t.jsonl:2: there is no message of the assistant"),
        (json.dumps(talk("a", "b", weight=2)), r"t.jsonl:2: weight 2"),
        (json.dumps(talk("a", "b\ufdd0")), "no characters"),
        ("[" * 100_000, r"t.jsonl:2: nested too deep"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path, line, said):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(TALKS[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=said):
        datasets(path, 48)


def test_special_tokens_that_a_tokenizer_would_spell_are_refused(tmp_path):
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", {"eos_token": "ab"},
                            Letters())  # fmt: skip
    with pytest.raises(DataError, match="'ab', which this tokenizer reads as 2 tokens"):
        datasets(write(tmp_path / "t.jsonl", TALKS), 48, chat=template)
    with pytest.raises(DataError, match="no answer of its 1 conversations begins within 8 tokens"):
        datasets(write(tmp_path / "u.jsonl", [talk("hello there", "b")]), 8)
    with pytest.raises(ConfigError, match="cannot be read"):
        ChatTemplate("{% for %}", {}, Letters())
    assert chat_template(Letters(), [tmp_path]) is None


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> str:
    lines = [talk(f"Tell me about number {n}.", f"It is {n % 7}, and after it comes {n % 7 + 1}.") for n in range(40)]
    return str(write(tmp_path_factory.mktemp("talks") / "chat.jsonl", lines))


def words(talks: str) -> str:
    return (
        f"--sft --data-path {talks} --no-mock-data --split 80,20,0 --tokenizer-type GPT2BPETokenizer --vocab-file "
        f"{BPE}/vocab.json --merge-file {BPE}/merges.txt --sft-tokenizer-prompt-format plain --seq-length 96 "
        "--max-position-embeddings 96 --vocab-size null --position-embedding-type rope --micro-batch-size 1 "
        "--global-batch-size 2"
    )


def test_a_resumed_run_goes_on_with_the_next_sample(tmp_path, talks):
    given_words = words(talks)
    whole = run(tmp_path / "whole", f"{given_words} --save {tmp_path}/base --eval-iters 1 --eval-interval 2")
    losses = [row["loss"] for row in whole.rows if "split" not in row]
    assert losses[-1] < losses[0] and [split for _, split, _ in evaluations(whole)] == ["validation", "validation"]
    half = f"{given_words} --eval-iters 1 --eval-interval 2 --save {tmp_path}/half"
    run(tmp_path / "first", f"{half} --exit-interval 2")
    rest = run(tmp_path / "second", f"{half} --load {tmp_path}/half")
    assert [row["loss"] for row in rest.rows if "split" not in row] == losses[2:]
    tuned = run(tmp_path / "tuned", f"{given_words} --load {tmp_path}/base --finetune --lora-rank 2 --train-iters 1")
    (row,) = (row for row in tuned.rows if "split" not in row)
    assert row["iteration"] == 1 and row["loss"] < losses[0]


def test_a_file_of_a_template_stands_over_the_tokenizers(tmp_path, talks):
    base = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --micro-batch-size 1 --train-iters 1 --lr 0.1"
    own = words(talks).replace("--sft-tokenizer-prompt-format plain", "").replace("--vocab-size null", "")
    own = own.replace("--no-mock-data", "").replace("--micro-batch-size 1", "")
    with pytest.raises(ConfigError, match=r"no chat template in .*bpe; .*--sft-tokenizer-prompt-format plain"):
        load_config(f"{base} {own}".split())
    file = tmp_path / "own.jinja"
    file.write_text(MARKED)
    (tmp_path / "chat_template.jinja").write_text(FORMATS["identity"])
    config = load_config(f"{base} {own} --chat-template {file}".split()).config
    assert gpt_dataset_config(config).chat.source == MARKED
    assert chat_template(Letters(), [tmp_path]).source == FORMATS["identity"]
    with pytest.raises(ConfigError, match="name two templates"):
        load_config(f"{base} {own} --chat-template {file} --sft-tokenizer-prompt-format plain".split())
