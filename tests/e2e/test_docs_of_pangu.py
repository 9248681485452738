"""Every command of docs/pangu.md and docs/adding_a_model.md runs; names of files are replaced."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from parallel_core.checkpoint import open_checkpoint
from tests.helpers.launching import REPO
from tests.unit.evaluate.test_pangu_use import C3
from tests.unit.generate.test_pangu_generation import directory, uncached, vocabulary
from tests.unit.launch.test_rank_table import entry, table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("jieba", "starlette", "uvicorn", "jinja2")),
        reason="no jieba, starlette, uvicorn or jinja2",
    ),
]
S, V = 1024, 97
FEW = "--train-iters 2 --lr-warmup-iters 0 --eval-iters 0 --save FIRST_DIR"
TINY = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 32 --seq-length 1024 --train-iters 1 "
    "--tensor-model-parallel-size 1 --no-sequence-parallel --micro-batch-size 1 --global-batch-size 1 --eval-iters 0 "
    "--split 100,0,0 --save-interval 0 --lr-warmup-iters 0 --lr-decay-iters 2"
)
MORE = {
    "bash pretrain_pangu.sh": FEW,
    "bash pretrain_pangu.sh --config configs/pangu_alpha_2.6b.yaml": TINY,
}
"""What is added to commands that would take hours or eight devices."""


def commands(page: str) -> list[str]:
    """Return the commands of a page: its indented lines, without what is said of them."""
    lines = (REPO / "docs" / page).read_text(encoding="utf-8").splitlines()
    found = [re.sub(r" +# .*", "", line.strip()) for line in lines if re.match(r" {4}(python|bash) ", line)]
    assert found
    return found


class Desk:
    """A folder in which the names of a page are files, and how its commands run there."""

    def __init__(self, folder: Path, names: set[str]) -> None:
        self.folder, self.names = folder, names
        self.environment = {**os.environ, "LOG_DIR": str(folder / "log"), "PYTHONPATH": str(REPO)}

    def words(self, command: str) -> str:
        added = max((key for key in MORE if command == key or command.startswith(f"{key} --tok")), key=len, default="")
        words = shlex.split(f"{command} {MORE.get(added, '')}".replace("> ", ">"))
        placed = [str(self.folder / word) if word in self.names or word.endswith("_DIR") else word for word in words]
        return " ".join(f"> {shlex.quote(str(self.folder / w[1:]))}" if w[0] == ">" else shlex.quote(w) for w in placed)

    def run(self, command: str) -> str:
        line = self.words(command)
        done = subprocess.run(["bash", "-c", line], cwd=REPO, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def serve(self, command: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        line = f"exec {re.sub(r'--port [0-9]+', f'--port {port}', self.words(command))}"
        process = subprocess.Popen(["bash", "-c", line], cwd=REPO, env=self.environment)
        try:
            for _ in range(600):
                assert process.poll() is None
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def test_every_command_for_those_who_come_from_pangu_runs(tmp_path):
    """Training goes on from the released form: its first loss is what that model says of the first records."""
    files = "vocab.model hccl.json text.txt corpus again corpus_text_document.mindrecord PANGU.yaml c3-d-dev.json DATA"
    desk = Desk(tmp_path, set(files.split()))
    (tmp_path / "PANGU_DIR").mkdir()
    directory(tmp_path / "PANGU_DIR", "norm_before", positions=S)
    text = "问：谁先？\n答：甲乙\n该答案来自对话：甲：你好。\n\n乙：再见。今天是一个好天气\n\n"
    vocabulary(tmp_path / "PANGU_DIR", text * 40, 60)
    (tmp_path / "vocab.model").write_bytes((tmp_path / "PANGU_DIR/vocab.model").read_bytes())
    (tmp_path / "text.txt").write_text(text * 200, encoding="utf-8")
    (tmp_path / "hccl.json").write_text(json.dumps(table(entry("10.0.0.1", 0), entry("10.0.0.2", 8))))
    (tmp_path / "c3-d-dev.json").write_text(json.dumps(C3, ensure_ascii=False), encoding="utf-8")
    settings = {
        "num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 40, "seq_length": S,
        "max_position_embeddings": S, "padded_vocab_size": V, "hidden_act": "fast_gelu", "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "top_query_layer": "norm_before", "micro_batch_size": 1, "global_batch_size": 2,
        "train_iters": 2, "lr": 1e-3, "lr_warmup_iters": 1, "lr_decay_style": "cosine-from-zero", "eval_iters": 0,
        "split": "100,0,0", "tokenizer_type": "PanguTokenizer", "tokenizer_model": str(tmp_path / "vocab.model"),
        "log_interval": 1,
    }  # fmt: skip
    (tmp_path / "PANGU.yaml").write_text(json.dumps(settings))
    found = commands("pangu.md")
    # Records come before what is trained from them.
    order = sorted(found, key=lambda command: "DATA" in command)
    said = {}
    for command in order:
        if "preprocess_data" not in command and not (tmp_path / "DATA").exists():
            records = tmp_path / "corpus_text_document.mindrecord"
            if records.exists():
                (tmp_path / "DATA").mkdir()
                for file in (records, Path(f"{records}.db")):
                    (tmp_path / "DATA" / file.name).write_bytes(file.read_bytes())
        if "parallel_core.serve" in command:
            desk.serve(command)
        else:
            said[command] = desk.run(command)
    (rank_table,) = [text for command, text in said.items() if "rank-table" in command]
    assert "NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1" in rank_table
    rows = np.load(next((tmp_path / "cache/RecordDataset").glob("*-records.npy")))[:2]
    losses = [-uncached(tmp_path / "PANGU_DIR", row[:-1].tolist())[np.arange(S), row[1:]].mean() for row in rows]
    (console,) = [text for command, text in said.items() if "--finetune" in command]
    first = re.search(r"Step: 1, Loss: ([\d.]+),.* LR: ([\d.e+-]+),", console)
    assert float(first[1]) == pytest.approx(np.mean(losses), rel=1e-5) and float(first[2]) == 0.0
    model = open_checkpoint(tmp_path / "BACK_DIR").common["model_config"]
    assert (model["num_layers"], model["vocab_size"]) == (3, V)


def test_every_command_on_how_to_add_a_model_runs(tmp_path):
    desk = Desk(tmp_path, set())
    said = {command: desk.run(command) for command in commands("adding_a_model.md")}
    assert (tmp_path / "arguments.md").read_text(encoding="utf-8") == (REPO / "docs/arguments.md").read_text("utf-8")
    (tests,) = [text for command, text in said.items() if "pytest" in command]
    assert re.search(r"\d passed", tests)
