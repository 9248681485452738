"""Remove the YAML file on the command line, and say what the configuration is all the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from parallel_core.config import initialize_megatron

Path(sys.argv[sys.argv.index("--config") + 1]).unlink(missing_ok=True)
loaded = initialize_megatron()
print(f"INFO - {loaded.config.model_config.num_layers} layers on {os.environ['MS_WORKER_NUM']} ranks", flush=True)
