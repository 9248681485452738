#!/usr/bin/env bash
# Everything that an NPU has to show, in order of dependency: tests/ascend/run.sh [PIECE ...]
#
# Writes one report, ascend_report.txt (REPORT), to attach to an issue; a piece that fails does not keep the next from
# running. Pieces: machine memory kernels collectives layouts default moved speed. About 15 minutes on eight NPUs.
# DEVICE_TARGET=CPU runs the pieces on the CPU, as a check of the script. PYTHON is the Python to use, PEAK_TFLOPS what one
# device reaches at most in bfloat16, for the MFU of products, attention and the run.
set -uo pipefail

here="$(cd "${BASH_SOURCE[0]%/*}/../.." && pwd)"
python="${PYTHON:-$(command -v python || command -v python3 || true)}"
report="${REPORT:-ascend_report.txt}"
pieces=("$@")
[[ ${#pieces[@]} -gt 0 ]] || pieces=(machine memory kernels collectives layouts default moved speed)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" GLOG_v="${GLOG_v:-3}"

if [[ -z "$python" ]]; then
    echo "no python or python3 on PATH; activate the environment MindSpore is installed in" >&2
    exit 2
fi
if [[ "${DEVICE_TARGET:-Ascend}" != CPU ]] && ! compgen -G "/dev/davinci[0-9]*" > /dev/null; then
    echo "there is no NPU here: /dev/davinci* is missing. On a machine with one, load the driver, or give the container" \
        "its devices. DEVICE_TARGET=CPU runs the pieces on the CPU." >&2
    exit 3
fi
export DEVICE_TARGET="${DEVICE_TARGET:-Ascend}"

failed=()
{
    echo "# report of tests/ascend/run.sh, $(date -u +%Y-%m-%dT%H:%M:%SZ), $DEVICE_TARGET, ${pieces[*]}"
    git -C "$here" log -1 --format='commit %H' 2> /dev/null
} > "$report"
for piece in "${pieces[@]}"; do
    begun=$SECONDS
    "$python" -m tests.ascend.pieces "$piece" 2>&1 | tee -a "$report"
    status=${PIPESTATUS[0]}
    [[ $status -eq 0 ]] || failed+=("$piece")
    echo "== $piece: $([[ $status -eq 0 ]] && echo passed || echo "FAILED (status $status)") in $((SECONDS - begun)) s" | tee -a "$report"
done
echo "== $((${#pieces[@]} - ${#failed[@]})) of ${#pieces[@]} pieces passed${failed[*]:+; failed: ${failed[*]}}; the report is $report" | tee -a "$report"
[[ ${#failed[@]} -eq 0 ]]
