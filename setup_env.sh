#!/usr/bin/env bash
# Make .venv beside this script and install what the scripts need. If that is done already, it returns at once.
#
#   ./setup_env.sh [--dev]      --dev: also the tools for tests and linters
#
# PYTHON=/path/to/python3.12    the Python to make .venv from (3.11 or newer)
# WHEELS=/path/to/wheels        a folder of wheels, for machines without internet
#
# Exit codes: 0 ready; 1 the installation failed; 2 wrong use.
set -euo pipefail

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv

# The installation goes on even if nobody reads its output any more.
trap '' PIPE
say() { printf '%s\n' "$*" >&2 2>/dev/null || true; }
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

# Fills `folders` with the places of wheels. pip only warns about a missing folder; uv fails.
find_folders() {
  local found place
  IFS=, read -ra folders <<<"${UV_FIND_LINKS:-}"
  [[ -z ${WHEELS:-} ]] || folders=("$WHEELS" "${folders[@]}")
  read -rd '' -a found < <(pip_setting find-links) || true # read returns 1 at the end of its input
  for place in "${found[@]}"; do
    [[ $place == http*://* || -e ${place#file://} ]] && folders+=("$place")
  done
  return 0
}

# True if one of the folders holds a CPU build of torch; the + in its name may be percent-encoded.
has_cpu_torch() {
  local folder wheels
  for folder in "${folders[@]}"; do
    wheels=("${folder#file://}"/torch-*cpu*.whl)
    [[ -e ${wheels[0]} ]] && return 0
  done
  return 1
}

# The ones of pip's extra indexes that uv can use. An unreachable one makes uv fail; a file:// one hides newer
# versions elsewhere, because uv takes a package only from the first index that has it.
usable_indexes() {
  local urls=() url
  read -rd '' -a urls < <(pip_setting extra-index-url) || true
  for url in "${urls[@]}"; do
    if [[ $url == http*://* ]] && reachable "$url"; then printf '%s ' "$url"; fi
  done
}

# Behind a proxy, only the proxy can tell.
reachable() {
  "$venv/bin/python" -c '
import socket, sys, urllib.parse, urllib.request
url = urllib.parse.urlsplit(sys.argv[1])
if url.scheme not in urllib.request.getproxies():
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    socket.create_connection((url.hostname, port), timeout=5).close()
' "$1" 2>/dev/null
}

# What the user tells uv directly is left unchanged.
export_uv_settings() {
  local index indexes name
  index=$(pip_setting index-url)
  indexes=$(usable_indexes)
  ((${#folders[@]} == 0)) || UV_FIND_LINKS=$(IFS=, && printf '%s' "${folders[*]}")
  [[ -z $index ]] || UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
  [[ -z $indexes ]] || UV_INDEX=${UV_INDEX:-$indexes}
  for name in UV_FIND_LINKS UV_DEFAULT_INDEX UV_INDEX; do
    [[ -z ${!name:-} ]] || export "${name?}"
  done
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

# WHEELS may hold everything: try it alone first, so that a machine without internet does not wait for a time-out.
install_uv() {
  { [[ -n ${WHEELS:-} ]] && "$venv/bin/python" -m pip install --quiet --no-index --find-links "$WHEELS" uv; } ||
    "$venv/bin/python" -m pip install --quiet uv
}

install_requirements() {
  { [[ -n ${WHEELS:-} ]] && "$venv/bin/uv" pip install --no-index "$@"; } || "$venv/bin/uv" pip install "$@"
}

main() {
  local dev=false folders=() start=$SECONDS
  case $* in
    '') ;;
    --dev) dev=true ;;
    *) die 2 "$*: only --dev is understood" ;;
  esac
  [[ -z ${WHEELS:-} || -d $WHEELS ]] || die 2 "WHEELS: '$WHEELS' is not a folder; name the one that holds the wheels"

  local requirements="requirements.txt"
  has_gpu || requirements="requirements-cpu.txt"
  local files=("$here/$requirements") overrides=()
  [[ $requirements == requirements.txt ]] || overrides=("$here/requirements-cpu-overrides.txt")
  $dev && files+=("$here/requirements-dev.txt")

  # The stamp is written last: a half-finished installation has none and is made again. What --dev installs is also
  # enough without --dev.
  local stamp=$venv/.installed-$requirements wanted without_dev
  wanted=$(cat "${files[@]}" "${overrides[@]}" | cksum)
  if [[ -e $stamp ]] && grep -qxF "$wanted" "$stamp"; then
    return 0
  fi

  # If adding the tools fails, a good installation stays good; any other change invalidates the stamp.
  without_dev=$(cat "$here/$requirements" "${overrides[@]}" | cksum)
  [[ ! -e $stamp ]] || grep -qxF "$without_dev" "$stamp" || rm "$stamp"
  # pip is the last thing in a new environment: without it, making the environment was interrupted.
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
  say "installing $requirements into .venv: a few minutes the first time"
  local log=$venv/install.log
  install_uv >"$log" 2>&1 || {
    tail -n 5 "$log" >&2
    die 1 "uv could not be installed; see $log, check the network or set WHEELS=FOLDER"
  }

  # Each process of an engine imports thousands of modules: 9 s from bytecode, 18 s without (docs/performance.md).
  # If PYTHONDONTWRITEBYTECODE is set, as in many containers, no import would ever write bytecode.
  local options=(--python "$venv/bin/python" --compile-bytecode)
  find_folders
  export_uv_settings
  if ((${#overrides[@]})); then
    options+=(--override "${overrides[@]}")
    has_cpu_torch || options+=(--torch-backend cpu)
  fi
  local file
  for file in "${files[@]}"; do options+=(--requirements "$file"); done
  install_requirements "${options[@]}" >"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    die 1 "the installation failed (full output: $log); without internet, put the wheels into a folder and set WHEELS"
  }
  printf '%s\n' "$wanted" "$without_dev" >"$stamp"
  say "installed in $((SECONDS - start)) s"
}

main "$@"
