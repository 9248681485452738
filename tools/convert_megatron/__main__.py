"""`python -m tools.convert_megatron`."""

from tools.convert_megatron.cli import main

raise SystemExit(main())
