#!/usr/bin/env bash
# Pretrain a GPT: pretrain_gpt.sh [--config FILE] [--megatron-flag value ...]
#
# Without any argument of the model, the layout or the data it trains configs/gpt_tiny.yaml.
# A flag: python -m parallel_core.config explain NAME
# Environment, all optional:
#   NPROC          ranks (default: what the layout needs)
#   MASTER_PORT    port of msrun's scheduler (default: a free one)
#   LOG_DIR        where worker_R.log and metrics.jsonl go (default: msrun_log)
#   DEVICE_TARGET  Ascend or CPU (default: Ascend when present)
#   STOP_GRACE_S   seconds the ranks have after Ctrl-C or SIGTERM (default: what ending the iteration and saving takes)
#   PYTHON         the Python to use (default: `python`, else `python3`, of the active environment)
#   Ascend:        HCCL_BUFFSIZE (200 MB), HCCL_EXEC_TIMEOUT (600 s), ASCEND_RT_VISIBLE_DEVICES (the first NPROC)
#   Several nodes (unverified): NNODES, NODE_RANK, and on all of them the same MASTER_ADDR and MASTER_PORT
set -euo pipefail

directory="${BASH_SOURCE[0]%/*}"
[[ "$directory" == "${BASH_SOURCE[0]}" ]] && directory=.
here="$(cd "$directory" && pwd)"
python="${PYTHON:-$(command -v python || command -v python3 || true)}"
if [[ -z "$python" ]]; then
    echo "no python or python3 on PATH; activate the environment parallel_core is installed in" >&2
    exit 2
fi

for argument in "$@"; do
    case "$argument" in
        -h | --help)
            while IFS= read -r line && [[ "$line" != "set -"* ]]; do
                [[ "$line" == "# "* ]] && printf '%s\n' "${line#\# }"
            done < "${BASH_SOURCE[0]}"
            exit 0
            ;;
    esac
done

# No module is imported from the current folder, which may be anybody's: `-m` would look there first, and so does an
# empty entry of PYTHONPATH.
paths="$here:${PYTHONPATH:-}"
while [[ "$paths" == *::* ]]; do paths="${paths//::/:}"; done
export PYTHONPATH="${paths%:}"
start='import sys; sys.path[:] = [p for p in sys.path if p]; from parallel_core.launch.__main__ import main; sys.exit(main())'
exec "$python" -c "$start" --bundled "$here/configs/gpt_tiny.yaml" "$here/pretrain_gpt.py" "$@"
