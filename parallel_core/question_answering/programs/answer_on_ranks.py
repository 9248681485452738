"""What each rank of `python -m parallel_core.question_answering` runs.

It is alone in its folder, which the launcher imports from.
"""

from __future__ import annotations

from parallel_core.launch.entry import run_as_rank
from parallel_core.question_answering.command import run_on_rank

if __name__ == "__main__":
    run_as_rank(run_on_rank)
