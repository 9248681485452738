"""`python -m parallel_core.compat.mindformers ...`: `run_mindformer.py` where there is no checkout."""

from __future__ import annotations

import sys

from parallel_core.compat.mindformers.run import main

if __name__ == "__main__":
    sys.exit(main())
