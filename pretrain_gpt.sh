#!/usr/bin/env bash
# Pretrain a GPT: pretrain_gpt.sh [--config FILE] [--megatron-flag value ...]
#
# Without --config it trains configs/gpt_tiny.yaml. A flag: python -m parallel_core.config explain NAME
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

config=(--config "$here/configs/gpt_tiny.yaml")
for argument in "$@"; do
    case "$argument" in
        --config | --config=* | --yaml-cfg | --yaml-cfg=*) config=() ;;
        -h | --help)
            while IFS= read -r line && [[ "$line" != "set -"* ]]; do
                [[ "$line" == "# "* ]] && printf '%s\n' "${line#\# }"
            done < "${BASH_SOURCE[0]}"
            exit 0
            ;;
    esac
done

export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m parallel_core.launch "$here/pretrain_gpt.py" ${config[@]+"${config[@]}"} "$@"
