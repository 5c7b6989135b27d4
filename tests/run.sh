#!/usr/bin/env bash
# All tests: the fast ones (under a minute), with their coverage, then the slow ones and those on a real vLLM engine.
#
#   ./tests/run.sh [--fast] [pytest arguments]      --fast: the first part alone, without its coverage
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
  .venv/bin/python -m "$@" || rc=$?
  if ((rc == 0)); then
    ran=true
  elif ((rc != 5 || chosen == 0)); then
    exit "$rc"
  fi
}

# One line: each room's, and the whole, which pyproject.toml has a floor for.
say_coverage() {
  local room
  .venv/bin/python -m coverage combine -q
  printf 'coverage of the fast tests in %%:'
  for room in core plan measure launch analyze; do
    printf ' %s %s,' "$room" "$(coverage_of --include "*/batch_inference/$room/*" --fail-under 0)"
  done
  printf ' all '
  coverage_of
}

coverage_of() {
  .venv/bin/python -m coverage report --format total "$@"
}

ran=false
chosen=$#
# Some wait for a process or a clock: a worker more than there are cores, eight at most. Each more imports all again.
workers=$(($(nproc) + 1))
((workers <= 8)) || workers=8
fast_part=(pytest -q -m "not vllm and not slow" -n "$workers" --dist worksteal --durations=3 "$@")
if $fast || ((chosen)); then
  run_part "${fast_part[@]}"
else
  .venv/bin/python -m coverage erase
  run_part coverage run -m "${fast_part[@]}"
  say_coverage
fi
$fast || run_part pytest -q -m "vllm or slow" --durations=0 "$@"
$ran || exit 5
