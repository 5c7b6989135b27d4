#!/usr/bin/env bash
# All tests: the fast ones (seconds), then those on a real vLLM engine (minutes).
#
#   ./tests/run.sh [--fast] [pytest arguments]      --fast: the first part alone
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=false
if [[ ${1:-} == --fast ]]; then
  fast=true
  shift
fi

./setup_env.sh --dev
.venv/bin/python -m pytest -q -m "not vllm" --durations=3 "$@"
$fast || .venv/bin/python -m pytest -q -m vllm --durations=0 "$@"
