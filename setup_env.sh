#!/usr/bin/env bash
# Make .venv beside this script and install what the scripts need. Done already, it returns at once.
#
#   ./setup_env.sh [--dev]      --dev: the tools of the tests and linters as well
#
# PYTHON=/path/to/python3.12    the Python to make .venv from (3.11 or newer)
# WHEELS=/path/to/wheels        a folder of wheels, for machines without internet
#
# Exit codes: 0 ready; 1 the installation failed; 2 wrong use.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv

say() { printf '%s\n' "$*" >&2; }
die() {
  say "error: $2"
  exit "$1"
}

# pip's own setting NAME (environment, then files), which uv does not read.
pip_setting() {
  local variable=PIP_${1^^}
  variable=${variable//-/_}
  if [[ -n ${!variable:-} ]]; then
    printf '%s\n' "${!variable}"
  else
    "$venv/bin/python" -m pip config get "global.$1" 2>/dev/null || true
  fi
}

# The wheel folders to look in, separated by commas as uv wants them.
wheel_folders() {
  { printf '%s\n' "${WHEELS:-}" "${UV_FIND_LINKS:-}" && pip_setting find-links; } | tr ' \n' ',,' | tr -s ',' | sed 's/^,//; s/,$//'
}

# True where one of the comma-separated folders holds a CPU build of torch.
has_cpu_torch() {
  local folder wheels
  for folder in ${1//,/ }; do
    wheels=("${folder#file://}"/torch-*cpu*.whl)
    [[ -e ${wheels[0]} ]] && return 0
  done
  return 1
}

has_gpu() {
  [[ -e /dev/nvidia0 ]] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }
}

make_venv() {
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die 2 "$python is not Python 3.11 or newer; set PYTHON=/path/to/python3.11"
  "$python" -m venv "$venv" || die 1 "$python -m venv failed; install Python's venv module or set PYTHON"
}

# WHEELS may hold everything: try it alone first, so that a machine without internet waits for nothing.
install_uv() {
  { [[ -n ${WHEELS:-} ]] && "$venv/bin/python" -m pip install --quiet --no-index --find-links "$WHEELS" uv; } ||
    "$venv/bin/python" -m pip install --quiet uv
}

install_requirements() {
  { [[ -n ${WHEELS:-} ]] && "$venv/bin/uv" pip install --no-index "$@"; } || "$venv/bin/uv" pip install "$@"
}

main() {
  local dev=false folders index start=$SECONDS
  case $* in
    '') ;;
    --dev) dev=true ;;
    *) die 2 "$*: only --dev is understood" ;;
  esac

  local requirements="requirements.txt"
  has_gpu || requirements="requirements-cpu.txt"
  local files=("$here/$requirements")
  $dev && files+=("$here/requirements-dev.txt")

  # The stamp is written last: a half-finished installation has none, and is made again. What --dev installs is
  # enough without --dev.
  local stamp=$venv/.installed-$requirements wanted
  wanted=$(cat "${files[@]}" | cksum)
  if [[ -e $stamp ]] && grep -qxF "$wanted" "$stamp"; then
    return 0
  fi

  [[ -x $venv/bin/python ]] || make_venv
  say "installing $requirements into .venv: a few minutes the first time"
  local log=$venv/install.log
  install_uv >"$log" 2>&1 || {
    tail -n 5 "$log" >&2
    die 1 "uv could not be installed; look at $log, check the network or set WHEELS=FOLDER"
  }

  local options=(--python "$venv/bin/python")
  folders=$(wheel_folders)
  index=$(pip_setting index-url)
  [[ -n $folders ]] && export UV_FIND_LINKS=$folders
  [[ -n $index ]] && export UV_DEFAULT_INDEX=$index
  if [[ $requirements == requirements-cpu.txt ]]; then
    options+=(--override "$here/requirements-cpu-overrides.txt")
    has_cpu_torch "$folders" || options+=(--torch-backend cpu)
  fi
  local file
  for file in "${files[@]}"; do options+=(--requirements "$file"); done
  install_requirements "${options[@]}" >"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    die 1 "the installation failed (whole output: $log); without internet, put the wheels into a folder and set WHEELS"
  }
  { printf '%s\n' "$wanted" && cat "$here/$requirements" | cksum; } >"$stamp"
  say "installed in $((SECONDS - start)) s"
}

main "$@"
