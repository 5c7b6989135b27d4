#!/usr/bin/env bash
# All tests: the fast ones (half a minute) with their coverage, then the slow ones and those on a real vLLM engine.
#
#   ./tests/run.sh [--fast] [pytest arguments]      --fast: only the first part, without coverage
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=false
if [[ ${1:-} == --fast ]]; then
  fast=true
  shift
fi

./setup_env.sh --dev

# Arguments may select tests of only one part; pytest's exit code 5 says that the other has none.
run_part() {
  local rc=0
  .venv/bin/python -m "$@" || rc=$?
  if ((rc == 0)); then
    ran=true
  elif ((rc != 5 || chosen == 0)); then
    exit "$rc"
  fi
}

# One line with the coverage of each room and of all, for which pyproject.toml sets a minimum.
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
# Some tests wait for a process or a clock, so one more worker than cores, but at most eight: each imports everything.
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
if ! $fast; then
  run_part pytest -q -m "slow and not vllm" -n 2 --dist worksteal --durations=10 "$@"
  # A real engine takes all cores.
  run_part pytest -q -m vllm --durations=0 "$@"
fi
$ran || exit 5
