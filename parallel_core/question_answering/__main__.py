"""`python -m parallel_core.question_answering`; see `command`."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # `-m` puts the current folder first, where a file called yaml.py would be taken for the library.
    if sys.path[0] == os.getcwd():
        del sys.path[0]
    from parallel_core.question_answering.command import main

    sys.exit(main())
