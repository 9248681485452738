#!/usr/bin/env bash
# Pretrain BERT: pretrain_bert.sh [--config FILE] [--megatron-flag value ...]
#
# Without any argument of the model, the layout or the data it trains configs/bert_tiny.yaml.
# Arguments and environment are those of pretrain_gpt.sh, which this is: bash pretrain_gpt.sh --help
set -euo pipefail

directory="${BASH_SOURCE[0]%/*}"
[[ "$directory" == "${BASH_SOURCE[0]}" ]] && directory=.
PARALLEL_CORE_MODEL=bert exec bash "$directory/pretrain_gpt.sh" "$@"
