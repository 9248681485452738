"""Speed of generation at GPT-2's size (124M, random weights) beside `transformers` on torch's CPU.

    python benchmarks/generate.py [--peer PYTHON] [--threads 2] [--new-tokens 64] [--rounds 5]

Prints tokens a second of one sequence and of eight together, of reading prompts, the time to a first token, how near
one token comes to reading the weights once, and memory. `--peer` (or PARALLEL_CORE_PEER_PYTHON) is a Python that has
torch and transformers; without it only this package is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIG = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.0, "bos_token_id": 50256,
    "embd_pdrop": 0.0, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_inner": None, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.0, "tie_word_embeddings": True, "vocab_size": 50257,
}  # fmt: skip
PROMPT, LONG, BATCH = 64, 768, 8

PEER = """
import sys, time
import numpy as np, torch
from transformers import GPT2LMHeadModel
folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
rng = np.random.default_rng(0)
ids = lambda b, n: torch.tensor(rng.integers(0, 50000, (b, n)))
def run(b, n, new):
    x = ids(b, n)
    with torch.inference_mode():
        begun = time.perf_counter()
        model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                       pad_token_id=0)
        return time.perf_counter() - begun
run(1, 64, 4)
print("ready", flush=True)
for line in sys.stdin:
    print(run(*map(int, line.split())), flush=True)
"""


def make_model(folder: Path) -> None:
    from safetensors.numpy import save_file

    rng, H, V = np.random.default_rng(0), CONFIG["n_embd"], CONFIG["vocab_size"]
    normal = lambda *shape: rng.standard_normal(shape, np.float32) * np.float32(0.02)  # noqa: E731
    tensors = {"transformer.wte.weight": normal(V, H), "transformer.wpe.weight": normal(CONFIG["n_positions"], H)}
    for i in range(CONFIG["n_layer"]):
        at = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            tensors |= {f"{at}{norm}.weight": np.ones(H, np.float32), f"{at}{norm}.bias": np.zeros(H, np.float32)}
        for name, ins, outs in (("attn.c_attn", H, 3 * H), ("attn.c_proj", H, H), ("mlp.c_fc", H, 4 * H),
                                ("mlp.c_proj", 4 * H, H)):  # fmt: skip
            tensors |= {f"{at}{name}.weight": normal(ins, outs), f"{at}{name}.bias": np.zeros(outs, np.float32)}
    tensors |= {"transformer.ln_f.weight": np.ones(H, np.float32), "transformer.ln_f.bias": np.zeros(H, np.float32)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


class Peer:
    """A process of the other Python, which runs what it is told and says how long it took."""

    def __init__(self, python: str, folder: Path, threads: int) -> None:
        command = [python, "-c", PEER, str(folder), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[0]} ended; see above")
        return line

    def run(self, count: int, length: int, tokens: int) -> float:
        """Return the seconds for `count` prompts of `length` tokens, each with `tokens` more."""
        self.process.stdin.write(f"{count} {length} {tokens}\n")
        self.process.stdin.flush()
        return float(self._line())


def measured(folder: Path, new: int, rounds: int, peer: Peer | None) -> tuple[dict[str, float], dict[str, float]]:
    """Return what is found of this package and of the peer, which take turns: the best of `rounds` of each."""
    import mindspore  # noqa: F401 - what it takes by itself is not the model's

    from parallel_core.generate.generator import Generator
    from parallel_core.generate.requests import SamplingParams

    before = resident_mb()
    it = Generator(folder, max_batch_size=BATCH)
    rng = np.random.default_rng(0)

    def run(count: int, length: int, tokens: int) -> float:
        prompts = [[int(t) for t in rng.integers(0, 50000, length)] for _ in range(count)]
        begun = time.perf_counter()
        it.generate(prompts, SamplingParams(max_new_tokens=tokens, temperature=0, ignore_eos=True))
        return time.perf_counter() - begun

    run(1, PROMPT, 4)
    cases = [(b, PROMPT, tokens) for b in (1, BATCH) for tokens in (new, 1)] + [(1, LONG, 1)]
    best: tuple[dict[tuple[int, int, int], float], ...] = ({}, {})
    reading = np.inf
    for _ in range(rounds):
        reading = min(reading, weights_read_s(it))
        for case in cases:
            for times, runs in zip(best, (run, peer.run if peer else None)):
                if runs is not None:
                    times[case] = min(times.get(case, np.inf), runs(*case))
    found = []
    for times in best:
        speeds = {f"decode_{b}": b * (new - 1) / (times[b, PROMPT, new] - times[b, PROMPT, 1])
                  for b in (1, BATCH) if times}  # fmt: skip
        found.append(speeds | ({"prefill": LONG / times[1, LONG, 1]} if times else {}))
    mine = found[0] | {"first_token_ms": 1e3 * best[0][1, PROMPT, 1], "weights_read_per_s": 1 / reading}
    weights = sum(p.size * 4 for p in it.engine._runner._model.get_parameters()) / 1e6
    cache = 2 * CONFIG["n_layer"] * CONFIG["n_embd"] * 4 * (LONG + BATCH * (PROMPT + new)) / 1e6
    return mine | {"weights_mb": weights, "cache_mb": cache, "memory_mb": resident_mb() - before}, found[1]


def weights_read_s(it: Any) -> float:
    """Return how long it takes to read every matrix that a token needs once, by a product with one row."""
    from mindspore import Tensor

    from parallel_core import ops

    model = it.engine._runner._model
    matrices = [p for p in model.get_parameters() if p.ndim == 2 and p.shape[0] != CONFIG["n_positions"]]
    rows = [Tensor(np.ones((1, p.shape[1]), np.float32)) for p in matrices]
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        for row, matrix in zip(rows, matrices):
            ops.linear(row, matrix, None)
        times.append(time.perf_counter() - begun)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=os.environ.get("PARALLEL_CORE_PEER_PYTHON"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="both take turns so often; the best time counts")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        peer = Peer(args.peer, folder, args.threads) if args.peer else None
        mine, theirs = measured(folder, args.new_tokens, args.rounds, peer)
        if peer:
            peer.process.stdin.close()
            peer.process.wait()
    for key, words in (("decode_1", "one sequence, tokens/s"), (f"decode_{BATCH}", f"{BATCH} together, tokens/s"),
                       ("prefill", f"prompt of {LONG}, tokens/s")):  # fmt: skip
        peer = f"   transformers {theirs[key]:8.1f}   ratio {mine[key] / theirs[key]:5.2f}" if theirs else ""
        print(f"{words:24} {mine[key]:8.1f}{peer}")
    print(f"first token of {PROMPT}, ms     {mine['first_token_ms']:8.1f}")
    print(f"weights read once, /s    {mine['weights_read_per_s']:8.1f}   "
          f"a token takes {mine['weights_read_per_s'] / mine['decode_1']:.2f} of that time")  # fmt: skip
    needed = mine["weights_mb"] + mine["cache_mb"]
    print(f"memory, MB               {mine['memory_mb']:8.1f}   {mine['memory_mb'] / needed:.2f} of weights and cache")


if __name__ == "__main__":
    sys.exit(main())
