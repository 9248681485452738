from __future__ import annotations

import gzip
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from parallel_core.data import IndexedDataset, build_tokenizer, bundled_tokenizer_model
from parallel_core.data.sentences import split_sentences
from parallel_core.data.tokenizer import NullTokenizer
from parallel_core.errors import ConfigError, DataError
from parallel_core.prepare import merge_datasets, preprocess_data, train_tokenizer
from parallel_core.prepare.preprocess import Encoder, PreprocessOptions, TokenizerSpec, preprocess
from parallel_core.prepare.text_input import InputOptions
from parallel_core.prepare.wikitext import wikitext_clean

ROOT = pathlib.Path(__file__).parents[3]
NULL = TokenizerSpec("NullTokenizer", vocab_size=1000)
SPM = TokenizerSpec("SentencePieceTokenizer", bundled_tokenizer_model())
LEGACY = TokenizerSpec("SentencePieceTokenizer", bundled_tokenizer_model(), legacy_tokenizer=True)


def run(tmp_path, content, tokenizer=NULL, name="input.jsonl", input_options=None, **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return preprocess(
        PreprocessOptions(
            input=(str(path),),
            output_prefix=str(tmp_path / "out"),
            tokenizer=tokenizer,
            input_options=input_options or InputOptions(),
            **options,
        )
    )


def documents(prefix):
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    return [
        [dataset[index].tolist() for index in range(bounds[number], bounds[number + 1])]
        for number in range(dataset.num_documents)
    ]


def lines(*texts, key="text"):
    return "".join(json.dumps({key: text}) + "\n" for text in texts)


def test_jsonl_with_end_of_document(tmp_path):
    report = run(tmp_path, lines("1 2 3", "4", "") + "\n", append_eod=True)
    assert documents(tmp_path / "out_text_document") == [[[1, 2, 3, 1000]], [[4, 1000]], []]
    assert (report.documents, report.empty_documents, report.tokens) == (3, 1, 6)
    assert IndexedDataset(str(tmp_path / "out_text_document")).dtype == np.uint16


def test_several_keys_each_get_a_whole_pair(tmp_path):
    content = '{"a": "1 2", "b": "3"}\n{"b": "4", "a": "5"}\n'
    run(tmp_path, content, input_options=InputOptions(("a", "b")))
    assert documents(tmp_path / "out_a_document") == [[[1, 2]], [[5]]]
    assert documents(tmp_path / "out_b_document") == [[[3]], [[4]]]


def test_gzip_is_read_like_plain_text(tmp_path):
    run(tmp_path, gzip.compress(lines("1 2", "3").encode()), name="input.jsonl.gz")
    assert documents(tmp_path / "out_text_document") == [[[1, 2]], [[3]]]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("input.txt", "auto", [[[1, 2, 3]], [[4]], [[5]]]),
        ("input.txt.gz", "auto", [[[1, 2, 3]], [[4]], [[5]]]),
        ("input.any", "lines", [[[1]], [[2, 3]], [[4]], [[5]]]),
    ],
)
def test_text(tmp_path, name, kind, expected):
    content = b"\n1\r\n2 3\n\n \n4\n\n\n5"
    content = gzip.compress(content) if name.endswith(".gz") else content
    run(tmp_path, content, name=name, input_options=InputOptions(input_format=kind))
    assert documents(tmp_path / "out_text_document") == expected


def test_wikitext_sections_become_clean_documents(tmp_path):
    content = " = Title = \n \n The film 's budget was 1 @.@ 5 million ( US ) , 3 @-@ fold .\n Next line .\n"
    content += " = = Two = = \n Last .\n"
    run(tmp_path, content, tokenizer=SPM, input_options=InputOptions(input_format="wikitext"))
    tokenizer = SPM.build()
    texts = [tokenizer.detokenize(document[0]) for document in documents(tmp_path / "out_text_document")]
    assert texts == ["The film's budget was 1.5 million (US), 3-fold. Next line.", "Last."]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("the dogs ' bone", "the dogs' bone"),
        ('he said " yes " ; then : no', 'he said "yes"; then: no'),
        ("what ? no ! ok", "what? no! ok"),
        ("[ a ] { b } ' c '", "[a] {b} 'c'"),
        ("10 ° C and N items", "10°C and 1 items"),
        ("1 @,@ 000", "1,000"),
    ],
)
def test_wikitext_clean(raw, clean):
    assert wikitext_clean(raw) == clean


@pytest.mark.parametrize("options", [{}, {"split_sentences": True}, {"partitions": 3}])
def test_output_does_not_depend_on_the_number_of_workers(tmp_path, options):
    content = lines(*(f"It is number {number}. It {'was ' * (number % 50)}so." for number in range(3000)))
    results = []
    for workers in (1, 2):
        report = run(tmp_path, content, tokenizer=SPM, workers=workers, append_eod=True, **options)
        prefix = report.output_prefixes[0]
        results.append((pathlib.Path(prefix + ".bin").read_bytes(), pathlib.Path(prefix + ".idx").read_bytes()))
    assert results[0] == results[1] and report.documents == 3000


def test_partitions_deal_documents_round_robin_unless_sequential(tmp_path):
    content = lines(*map(str, range(7)))
    run(tmp_path, content, partitions=3)
    assert [document[0][0] for document in documents(tmp_path / "out_text_document")] == [0, 3, 6, 1, 4, 2, 5]
    run(tmp_path, content, partitions=3, keep_sequential_samples=True)
    assert [document[0][0] for document in documents(tmp_path / "out_text_document")] == list(range(7))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "input.jsonl",
        "out_text_document.bin",
        "out_text_document.idx",
    ]


def test_split_sentences_stores_sequences(tmp_path):
    run(tmp_path, lines("It is. So was it! No?"), tokenizer=LEGACY, split_sentences=True, append_eod=True)
    tokenizer = LEGACY.build()
    (document,) = documents(tmp_path / "out_text_sentence")
    assert [tokenizer.detokenize(ids) for ids in document] == ["It is.", "So was it!", "No?<EOD>"]


def test_sentences():
    text = 'Mr. Bennet said "Yes." Then J. K. left, e.g. At noon!\nWas it 3.5? Who knows'
    assert split_sentences(text) == [
        'Mr. Bennet said "Yes."',
        "Then J. K. left, e.g. At noon!",
        "Was it 3.5?",
        "Who knows",
    ]
    assert "".join(split_sentences(text, keep_newlines=True)[1:2]) == "Then J. K. left, e.g. At noon!\n"
    assert split_sentences(" \n ") == []


BAD = {
    "not JSON": (b'{"text": "1"\n', "not JSON"),
    "a list": (b"[1]\n", "a list instead of a JSON object"),
    "no field": (b'{"txt": "1"}\n', "no field 'text'; the line has 'txt'"),
    "not text": (b'{"text": 5}\n', "field 'text' is a int instead of text"),
    "not UTF-8": (b'{"text": "\xff"}\n', "not UTF-8 .byte 0xff at 10"),
    "surrogate": (b'{"text": "\\ud800"}\n', "lone surrogate"),
    "outside": (b'{"text": "1 1001"}\n', "token id 1001 is outside the vocabulary of 1001 ids"),
    "negative": (b'{"text": "-1"}\n', "token id -1 is outside"),
    "words": (b'{"text": "one"}\n', "separated by spaces"),
}


@pytest.mark.parametrize(("case", "workers"), [*((case, 1) for case in BAD), ("not JSON", 2)])
def test_a_bad_document_stops_the_run_and_is_named(tmp_path, case, workers):
    line, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        run(tmp_path, b'{"text": "1"}\n\n' + line, workers=workers)
    assert "input.jsonl:3:" in str(caught.value) and "--skip-bad-documents" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["input.jsonl"]


def test_bad_documents_are_counted_and_named_when_skipped(tmp_path):
    content = b"".join(line for line, _ in BAD.values()) * 2 + lines("7", "8").encode()
    report = run(tmp_path, content, skip_bad_documents=True)
    assert documents(tmp_path / "out_text_document") == [[[7]], [[8]]]
    assert report.bad_documents == 18 and len(report.bad_examples) == 10
    assert "input.jsonl:2: a list" in report.bad_examples[1]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_files_are_an_error(tmp_path, content):
    with pytest.raises(DataError, match="every file is empty"):
        run(tmp_path, content)
    assert [path.name for path in tmp_path.iterdir()] == ["input.jsonl"]


def test_only_bad_documents_are_an_error(tmp_path):
    with pytest.raises(DataError, match="all 1 were malformed"):
        run(tmp_path, b"[\n", skip_bad_documents=True)


def test_a_damaged_gzip_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"x\.jsonl\.gz cannot be read"):
        run(tmp_path, gzip.compress(lines("1").encode() * 100)[:-10], name="x.jsonl.gz")
    with pytest.raises(DataError, match=r"x\.jsonl\.gz cannot be read"):
        run(tmp_path, b"plain", name="x.jsonl.gz")


def test_missing_input_and_wrong_options(tmp_path):
    options = {"output_prefix": str(tmp_path / "o"), "tokenizer": NULL}
    with pytest.raises(DataError, match="no such file"):
        preprocess(PreprocessOptions(input=(str(tmp_path / "*.none"),), **options))
    with pytest.raises(ConfigError, match="workers=0"):
        PreprocessOptions(input=("x",), workers=0, **options)
    with pytest.raises(ConfigError, match="keep_newlines needs split_sentences"):
        PreprocessOptions(input=("x",), keep_newlines=True, **options)
    with pytest.raises(ConfigError, match="input_format='csv'"):
        InputOptions(input_format="csv")
    with pytest.raises(ConfigError, match="json_keys"):
        InputOptions(("a", "a"))


def test_an_old_output_stays_until_the_new_one_is_complete(tmp_path):
    run(tmp_path, lines("1 2"))
    with pytest.raises(DataError):
        run(tmp_path, lines("3") + "[")
    assert documents(tmp_path / "out_text_document") == [[[1, 2]]]


def test_encoder_refuses_ids_a_tokenizer_should_not_give(monkeypatch):
    encoder = Encoder(PreprocessOptions(input=("x",), output_prefix="o", tokenizer=NULL))
    monkeypatch.setattr(NullTokenizer, "tokenize", lambda self, text: [5000])
    with pytest.raises(DataError, match="token id 5000"):
        encoder.encode("any")


# --- command lines -------------------------------------------------------------------------------------------------


def arguments(tmp_path, *more):
    return [
        "--input",
        str(tmp_path / "*.jsonl"),
        "--output-prefix",
        str(tmp_path / "out"),
        "--tokenizer-type",
        "NullTokenizer",
        "--vocab-size",
        "1000",
        *more,
    ]


def test_command_line(tmp_path, capsys):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(lines(f"{number} 7", "3") + ("[\n" if number else ""))
    assert preprocess_data.main(arguments(tmp_path, "--append-eod", "--skip-bad-documents", "--log-interval", "1")) == 0
    assert documents(tmp_path / "out_text_document") == [[[0, 7, 1000]], [[3, 1000]], [[1, 7, 1000]], [[3, 1000]]]
    captured = capsys.readouterr()
    assert "4 documents (0 empty)" in captured.out and "MB/s" in captured.out
    assert "1.jsonl:3: not JSON" in captured.err and "4 documents" in captured.err
    assert preprocess_data.main(arguments(tmp_path)) == 1
    assert "preprocess_data: DataError" in capsys.readouterr().err
    assert preprocess_data.main(arguments(tmp_path, "--mindrecord-length", "1")) == 1


def test_command_line_runs_as_a_script(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines("1 2"))
    script = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *arguments(tmp_path, "--workers", "2")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert documents(tmp_path / "out_text_document") == [[[1, 2]]]


def test_merge_command(tmp_path, capsys):
    (tmp_path / "parts").mkdir()
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(lines(str(number)))
        preprocess(PreprocessOptions((str(tmp_path / f"{number}.jsonl"),), str(tmp_path / "parts" / f"{number}"), NULL))
    assert merge_datasets.main(["--input", str(tmp_path / "parts"), "--output-prefix", str(tmp_path / "all")]) == 0
    assert documents(tmp_path / "all") == [[[0]], [[1]]]
    assert "2 documents, 2 tokens of 2 pairs" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    assert merge_datasets.main(["--input", str(tmp_path / "none"), "--output-prefix", str(tmp_path / "all")]) == 1


def test_train_tokenizer_makes_a_lossless_model(tmp_path):
    text = tmp_path / "input.txt"
    text.write_text("\n\n".join(f"Line {number} of  some text,\nand  another." for number in range(200)))
    model = str(tmp_path / "t.model")
    assert train_tokenizer.main(["--input", str(text), "--vocab-size", "300", "--output", model]) == 0
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model=model)
    assert tokenizer.vocab_size == 300
    sample = "  Line 3,\n\nÜ \U0001f600 end "
    assert tokenizer.detokenize(tokenizer.tokenize(sample)) == sample
    assert train_tokenizer.main(["--input", str(tmp_path / "none"), "--output", model]) == 1
