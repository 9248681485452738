"""`python tools/train_tokenizer.py` in a checkout: see `parallel_core.prepare.train_tokenizer`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_core.prepare.train_tokenizer import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
