"""`parallel-core train [SCRIPT] [--config FILE] [--megatron-flag value ...]`: train, by default a GPT.

Without any argument of the model, the layout or the data it trains configs/gpt_tiny.yaml, or with pretrain_pangu.py
configs/pangu_tiny.yaml, with pretrain_bert.py configs/bert_tiny.yaml. SCRIPT is one of these, or a training program of
your own (pretrain_gpt.py of the repository is one to copy).
A flag: python -m parallel_core.config explain NAME

Environment, all optional:
  NPROC          ranks (default: what the layout needs)
  MASTER_PORT    port of MindSpore's scheduler (default: a free one)
  LOG_DIR        where worker_R.log and metrics.jsonl go (default: msrun_log)
  DEVICE_TARGET  Ascend or CPU (default: Ascend when present)
  PYTHON         the Python that pretrain_gpt.sh uses (default: that of the active environment)
  STOP_GRACE_S   seconds the ranks have after Ctrl-C or SIGTERM (default: what ending the iteration and saving takes)
  AUTO_RESTART   how often a failed job starts again from its newest checkpoint without a new one in between
                 (default: 0; --save and --load name one directory)
  Ascend:        HCCL_BUFFSIZE (200 MB), HCCL_EXEC_TIMEOUT (s; default: --distributed-timeout-minutes),
                 ASCEND_RT_VISIBLE_DEVICES (the first NPROC)
  BIND_CORE      True or JSON: what msrun's --bind_core binds ranks to cores by (default: nothing)
  Several nodes: NNODES, NODE_RANK, and on all of them the same NPROC, AUTO_RESTART, MASTER_ADDR (of node 0) and
                 MASTER_PORT (it and the port after it are used); `srun --ntasks-per-node=1` sets them,
                 `parallel-core launch hostfile FILE` prints them
  CLUSTER_TIME_OUT  seconds that nodes and ranks wait for each other at a start (default: 300)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from parallel_core.bundled import PROGRAMS, bundled_program, shared_folder
from parallel_core.launch.__main__ import lacks_packages
from parallel_core.launch.__main__ import main as launch


def main(argv: Sequence[str] | None = None) -> int:
    """Start the job that `argv` describes and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__.strip())
        return 0
    if lacks_packages():
        return 2
    from parallel_core.config.bundled import describes_a_run

    if not words or words[0].startswith("-"):
        words.insert(0, str(bundled_program()))
    elif not Path(words[0]).exists() and Path(words[0]).name == words[0] and bundled_program(words[0]).is_file():
        words[0] = str(bundled_program(words[0]))
    small = PROGRAMS.get(Path(words[0]).name, PROGRAMS["pretrain_gpt.py"])
    if Path(words[0]).name == "pretrain_bert.py" and describes_a_run(words[1:]) and not _names_a_head(words[1:]):
        words[1:1] = ["--bert-head", "pretraining"]
    return launch(["--bundled", str(shared_folder() / small), *words])


def _names_a_head(words: Sequence[str]) -> bool:
    """Whether a head is named, or what names one: a file, or a checkpoint."""
    naming = ("--bert-head", "--config", "--yaml-cfg", "--use-checkpoint-args")
    return any(word.split("=")[0] in naming for word in words)


if __name__ == "__main__":
    sys.exit(main())
