"""How fast the data pipeline is: tokenising, building indices, blending, and feeding a training loop.

python benchmarks/data.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_core.data import (
    Blend,
    GPTDatasetConfig,
    IndexedDatasetBuilder,
    build_blending_indices,
    build_pretraining_data_loader,
    build_tokenizer,
    build_train_valid_test_datasets,
    bundled_tokenizer_model,
)
from parallel_core.data.bundled import bundled_data_folder
from parallel_core.data.indices import build_document_index, build_sample_index, build_shuffle_index, plan_epochs
from parallel_core.data.samplers import torch_randperm
from parallel_core.data.tokenizer import NullTokenizer
from parallel_core.prepare.preprocess import PreprocessOptions, TokenizerSpec, preprocess

Row = dict[str, Any]
# the best of several, because other programs share the machine
_REPEATS = 3


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def benchmark_preprocessing(folder: str, copies: int) -> list[Row]:
    """SentencePiece alone on the text, then the whole tool, from one to two workers."""
    corpus = (bundled_data_folder() / "corpus.jsonl").read_text(encoding="utf-8")
    source = os.path.join(folder, "corpus.jsonl")
    Path(source).write_text(corpus * copies, encoding="utf-8")
    texts = [json.loads(line)["text"] for line in corpus.splitlines()]
    model = sentencepiece.SentencePieceProcessor(model_file=bundled_tokenizer_model())
    alone = 0.0
    for _ in range(_REPEATS):
        started = time.perf_counter()
        tokens = sum(len(model.encode_as_ids(text)) for _ in range(copies) for text in texts)
        alone = max(alone, tokens / (time.perf_counter() - started))
    rows: list[Row] = [{"what": "SentencePiece alone", "tokens_per_s_per_worker": alone, "share_of_alone": 1.0}]
    for workers in sorted({1, min(2, os.cpu_count() or 1)}):
        options = PreprocessOptions(
            input=(source,),
            output_prefix=os.path.join(folder, f"out{workers}"),
            tokenizer=TokenizerSpec("SentencePieceTokenizer", bundled_tokenizer_model()),
            append_eod=True,
            workers=workers,
        )
        report = min((preprocess(options) for _ in range(_REPEATS)), key=lambda report: report.seconds)
        rate = report.tokens / report.seconds / workers
        rows.append(
            {
                "what": f"preprocess, {workers} workers",
                "tokens_per_s_per_worker": rate,
                "share_of_alone": rate / alone,
                "MB_per_s": report.bytes_read / 1e6 / report.seconds,
            }
        )
    return rows


def benchmark_indices(sizes: list[int]) -> list[Row]:
    """Document, sample and shuffle index of simulated corpora: documents of 100 to 1100 tokens, samples of 2048."""
    rows: list[Row] = []
    for tokens in sizes:
        count = max(1, tokens // 600)
        lengths = np.random.default_rng(0).integers(100, 1101, count).astype(np.int32)
        total, before = int(lengths.sum()), peak_megabytes()
        started = time.perf_counter()
        plan = plan_epochs(total, None, 2048)
        state = np.random.RandomState(1234)
        documents = build_document_index(np.arange(count, dtype=np.int32), 1, state, False)
        samples = build_sample_index(lengths, documents, 2048, plan)
        build_shuffle_index(len(samples) - 1, len(samples) - 1, state)
        rows.append(
            {
                "tokens": tokens,
                "documents": count,
                "samples": len(samples) - 1,
                "seconds": time.perf_counter() - started,
                "peak_MB_more": peak_megabytes() - before,
            }
        )
    return rows


def benchmark_orders(size: int) -> list[Row]:
    """Blending indices for weights with and without a common denominator, and the cyclic sampler's permutation."""
    rows: list[Row] = []
    for count in (2, 5, 20):
        plain = np.arange(1, count + 1) / (count * (count + 1) / 2)
        rough = np.sqrt(np.arange(2, count + 2))
        for name, weights in (("decimal", plain), ("irrational", rough / rough.sum())):
            started = time.perf_counter()
            build_blending_indices(weights.tolist(), size)
            seconds = time.perf_counter() - started
            rows.append({"what": f"blend of {count}, {name} weights", "samples": size, "seconds": seconds})
    started = time.perf_counter()
    torch_randperm(size, 0)
    rows.append({"what": "cyclic permutation", "samples": size, "seconds": time.perf_counter() - started})
    return rows


def write_corpus(prefix: str, tokens: int) -> None:
    generator = np.random.default_rng(1)
    with IndexedDatasetBuilder(prefix + ".bin", np.uint16) as builder:
        written = 0
        while written < tokens:
            document = generator.integers(0, 30_000, generator.integers(100, 1101))
            builder.add_document(document, [len(document)])
            written += len(document)
        builder.finalize(prefix + ".idx")


def benchmark_loading(folder: str, tokens: int, steps: int) -> list[Row]:
    """Samples of 2048 tokens read as fast as possible, then by a loop whose step takes 20 ms."""
    prefix = os.path.join(folder, "numbers")
    write_corpus(prefix, tokens)
    rows: list[Row] = []
    for workers, step_s in ((0, 0.0), (2, 0.0), (0, 0.02), (2, 0.02)):
        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=2048,
            tokenizer=NullTokenizer(30_000),
            blend=Blend((prefix,)),
            split="1,0,0",
            reset_position_ids=True,
            reset_attention_mask=True,
            eod_mask_loss=True,
            path_to_cache=os.path.join(folder, f"cache-{workers}-{step_s}"),
        )
        started = time.perf_counter()
        dataset = build_train_valid_test_datasets(config, (None, 0, 0))[0]
        loader = build_pretraining_data_loader(dataset, 0, micro_batch_size=4, num_workers=workers)
        next(loader)
        first = time.perf_counter() - started
        started = time.perf_counter()
        before = loader.statistics.wait_s
        for _ in range(steps):
            next(loader)
            time.sleep(step_s)  # stands for the kernels of a step, which leave this thread idle as well
        seconds = time.perf_counter() - started
        rows.append(
            {
                "workers": workers,
                "step_ms": step_s * 1e3,
                "time_to_first_batch_s": first,
                "samples_per_s": 4 * steps / seconds,
                "waited_ms_per_step": (loader.statistics.wait_s - before) / steps * 1e3,
                "ready": f"{loader.statistics.batches_ready}/{loader.statistics.batches}",
            }
        )
        loader.close()
    return rows


def benchmark_tokenizers() -> list[Row]:
    """The bundled model through this package's tokenizer class: what the wrapping costs."""
    lines = (bundled_data_folder() / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    rows: list[Row] = []
    for legacy in (False, True):  # the legacy class looks for special tokens in the text as well
        kind = "SentencePieceTokenizer" + ", legacy" * legacy
        tokenizer = build_tokenizer(
            "SentencePieceTokenizer", tokenizer_model=bundled_tokenizer_model(), legacy_tokenizer=legacy
        )
        best = 0.0
        for _ in range(_REPEATS):
            started = time.perf_counter()
            tokens = sum(len(tokenizer.tokenize(text)) for text in texts)
            best = max(best, tokens / (time.perf_counter() - started))
        rows.append({"what": kind, "tokens_per_s": best})
    return rows


def show(title: str, rows: list[Row]) -> None:
    print(f"\n{title}")
    for row in rows:
        cells = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in row.items()}
        print("  " + "  ".join(f"{name}={cell}" for name, cell in cells.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--json", help="write the numbers to this file as well")
    args = parser.parse_args()
    results: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        results["preprocessing"] = benchmark_preprocessing(folder, 4 if args.quick else 20)
        results["tokenizers"] = benchmark_tokenizers()
        results["indices"] = benchmark_indices([10**6, 10**7, 10**8] if args.quick else [10**6, 10**7, 10**8, 10**9])
        results["orders"] = benchmark_orders(100_000 if args.quick else 1_000_000)
        results["loading"] = benchmark_loading(folder, 3_000_000 if args.quick else 20_000_000, 100)
    for title, rows in results.items():
        show(title, rows)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
