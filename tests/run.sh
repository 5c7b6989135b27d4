#!/usr/bin/env bash
# All tests: the fast ones (seconds), then the slow ones and those on a real vLLM engine (minutes).
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

# Arguments may choose tests of one part alone; pytest's 5 says that the other has none.
run_part() {
  local rc=0
  .venv/bin/python -m pytest -q "$@" || rc=$?
  if ((rc == 0)); then
    ran=true
  elif ((rc != 5 || chosen == 0)); then
    exit "$rc"
  fi
}

ran=false
chosen=$#
run_part -m "not vllm and not slow" -n auto --maxprocesses 8 --durations=3 "$@"
$fast || run_part -m "vllm or slow" --durations=0 "$@"
$ran || exit 5
