#!/usr/bin/env bash
# Run the settings of a preset, one process each; see --help.
#
# This file is the table of presets; the code that runs them is in batch_inference/launch.
set -euo pipefail
shopt -s inherit_errexit

# --- Presets ----------------------------------------------------------------------------------------------------------
# A preset is a function preset_NAME; the comment above it is its line in --help. It may call, in any order:
#
#   setting TP=2 PP=2       a setting; a missing size is 1. A size may be N, the number of devices (of all nodes), or a
#                           part of it like N/2: if that is not a whole number, the setting is left out
#   setting TP=4 torchrun   the same under torchrun
#   setting TP=4 experts    tp_4_ep: whole experts on each device, not a slice of every one (--enable-expert-parallel)
#   setting TP=4 suffix=x --enforce-eager   named tp_4_x; flags of the experiment script come last
#   flags --max-tokens 32   flags for all its settings
#   demo                    one node; replaces what is in its own folder, and ends with the analysis
#   made_by NAME            settings made by Python: MADE_BY in batch_inference/launch/presets.py
#   search                  searches settings and batch sizes: batch_inference/launch/best.py
#
# $prefix comes before names of our own files; it is empty if the user is in the checkout.

# TP=1, 2, 4, 8
preset_tensor-parallel() { for n in 1 2 4 8; do setting "TP=$n"; done; }

# PP=1, 2, 4
preset_pipeline-parallel() { for n in 1 2 4; do setting "PP=$n"; done; }

# TP2_PP2, TP4_PP2, TP2_PP4, TP4_PP4
preset_mixed-parallel() { for pp in 2 4; do for tp in 2 4; do setting "TP=$tp" "PP=$pp"; done; done; }

# DP=1, 2, 4
preset_data-parallel() { for n in 1 2 4; do setting "DP=$n"; done; }

# all of the above, plus TP2_DP2, TP4_DP2, TP2_DP4
preset_scaling-study() {
  preset_tensor-parallel
  preset_pipeline-parallel
  preset_mixed-parallel
  preset_data-parallel
  setting TP=2 DP=2
  setting TP=4 DP=2
  setting TP=2 DP=4
}

# TP=2, 4, 8 under torchrun
preset_torchrun-tensor-parallel() { for n in 2 4 8; do setting "TP=$n" torchrun; done; }

# TP2_PP2, TP4_PP2, TP2_PP4, TP4_PP4 under torchrun
preset_torchrun-mixed-parallel() {
  for pp in 2 4; do for tp in 2 4; do setting "TP=$tp" "PP=$pp" torchrun; done; done
}

# TP=N; with whole experts TP=N, DP=N, TP=2 DP=N/2
preset_expert-parallel() {
  setting TP=N
  setting TP=N experts
  setting DP=N experts
  setting TP=2 DP=N/2 experts
}

# one setting: any of TP=x PP=y DP=z, and experts
preset_custom() { made_by custom; }

# searches for the best setting on all devices
preset_best() { search; }

# a first try: a tiny model at TP=1, 2, with analysis
preset_quickstart() {
  demo
  flags --model "${prefix}models/tiny-llama" --load-format dummy --kv-cache-memory-bytes 268435456
  flags --batch-sizes 1,2,4 --seq-lens 64,128 --max-tokens 32 --target-ci 0.05
  setting TP=1
  setting TP=2
}

# --- Machinery --------------------------------------------------------------------------------------------------------

setting() { line setting "$@"; }
flags() { line flags "$@"; }
demo() { line demo; }
made_by() { line made_by "$1"; }
search() { line search; }

# A line of the table: its words, each followed by a unit separator, and a record separator at the end.
line() {
  printf '%s\x1f' "$@"
  printf '\x1e'
}

# What every preset says, in the order of this file.
table() {
  local text comment='' name='' known=' '
  set -E
  trap 'die "preset $name: this command fails: $BASH_COMMAND"' ERR
  while IFS= read -r text; do
    if [[ $text =~ ^preset_([A-Za-z0-9_-]+)\ *\(\) ]]; then
      name=${BASH_REMATCH[1]}
      known+="preset_$name "
      line preset "$name" "$comment"
      "preset_$name"
    fi
    comment=''
    [[ $text != '# '* ]] || comment=${text#\# }
  done <"${BASH_SOURCE[0]}"
  for name in $(compgen -A function preset_); do
    [[ $known == *" $name "* ]] || die "$name: write it as $name() at the beginning of a line"
  done
}

die() {
  trap '' PIPE # the exit code stays the same if nobody reads
  printf 'error: %s\n' "$1" >&2 2>/dev/null || true
  exit 2
}

# Slurm runs a copy of this file from its own folder; the checkout is then where sbatch was called.
find_checkout() {
  local folder own
  own=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
  for folder in "$own" "${SLURM_SUBMIT_DIR:-$PWD}" "$PWD"; do
    [[ -d $folder/batch_inference/launch ]] || continue
    checkout=$(CDPATH='' cd -P -- "$folder" && pwd)
    return
  done
  die "$own: batch_inference is neither there nor in $PWD; start the script (or sbatch) in the folder of the checkout"
}

# The user's choice, .venv's, or the current one: if that has no vLLM, it calls setup_env.sh before it measures.
find_python() {
  python=${prefix}.venv/bin/python
  if [[ -n ${PYTHON:-} ]]; then
    command -v "$PYTHON" >/dev/null || die "PYTHON: ${PYTHON@Q} cannot be run; give the path of a Python that has vLLM"
    python=$PYTHON
  elif [[ -z $(find -H "$checkout/.venv" -maxdepth 1 -name '.installed-*' 2>/dev/null) ]]; then
    if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=python3
    else
      "$checkout/setup_env.sh"
    fi
  fi
}

find_checkout
prefix=$checkout/
[[ ! . -ef $checkout ]] || prefix=''
find_python
presets=$(table)
export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -P -m batch_inference.launch "$presets" "$python" "$prefix" "$@"
