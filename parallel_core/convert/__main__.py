"""`python -m parallel_core.convert`."""

from parallel_core.convert.cli import main

raise SystemExit(main())
