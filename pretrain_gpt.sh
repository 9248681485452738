#!/usr/bin/env bash
# Pretrain a GPT: pretrain_gpt.sh [--config FILE] [--megatron-flag value ...]
#
# Without any argument of the model, the layout or the data it trains configs/gpt_tiny.yaml.
# `--help` lists the environment variables. PYTHON is the Python to use (default: `python`, else `python3`, of the active
# environment).
set -euo pipefail

directory="${BASH_SOURCE[0]%/*}"
[[ "$directory" == "${BASH_SOURCE[0]}" ]] && directory=.
here="$(cd "$directory" && pwd)"
python="${PYTHON:-$(command -v python || command -v python3 || true)}"
if [[ -z "$python" ]]; then
    echo "no python or python3 on PATH; activate the environment parallel_core is installed in" >&2
    exit 2
fi

# No module is imported from the current folder, which may be anybody's: `-m` would look there first, and so does an
# empty entry of PYTHONPATH.
paths="$here:${PYTHONPATH:-}"
while [[ "$paths" == *::* ]]; do paths="${paths//::/:}"; done
export PYTHONPATH="${paths%:}"
model="${PARALLEL_CORE_MODEL:-gpt}" # pretrain_pangu.sh sets it
unset PARALLEL_CORE_MODEL
start='import sys; sys.path[:] = [p for p in sys.path if p]; from parallel_core.launch.train import main; sys.exit(main())'
exec "$python" -c "$start" "$here/pretrain_$model.py" "$@"
