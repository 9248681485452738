"""Megatron-LM's `parallel_state` from where Megatron-LM has it; it lives in `parallel_core.compat.parallel_state`."""

import sys

from parallel_core.compat import parallel_state

sys.modules[__name__] = parallel_state  # one module under both names, so that both see the same groups
