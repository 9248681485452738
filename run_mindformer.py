"""MindFormers' script: train, finetune, evaluate or predict as a YAML file says. `--help` lists the arguments."""

from __future__ import annotations

import sys
from pathlib import Path

from parallel_core.compat.mindformers.run import main

if __name__ == "__main__":
    sys.exit(main(folder=Path(__file__).resolve().parent))
