#!/usr/bin/env bash
# Run the settings of a preset, one process each: see --help.
#
# This script knows which settings a preset has, and where their files go. Values, defaults, results and devices are
# the business of the Python scripts.
set -euo pipefail

here=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)
# What stands before the names of our own files: nothing where the user is in this folder.
prefix=$here/
[[ $PWD != "$here" ]] || prefix=''

# --- Presets ----------------------------------------------------------------------------------------------------------
# preset_NAME calls `setting TP PP DP [torchrun]` for each of its settings; the comment above it is its line in --help.

# TP=1, 2, 4, 8
preset_tensor-parallel() {
  local n
  for n in 1 2 4 8; do setting "$n" 1 1; done
}

# PP=1, 2, 4
preset_pipeline-parallel() {
  local n
  for n in 1 2 4; do setting 1 "$n" 1; done
}

# TP2_PP2, TP4_PP2, TP2_PP4
preset_mixed-parallel() {
  setting 2 2 1
  setting 4 2 1
  setting 2 4 1
}

# DP=1, 2, 4
preset_data-parallel() {
  local n
  for n in 1 2 4; do setting 1 1 "$n"; done
}

# all of the above, without repeats
preset_scaling-study() {
  preset_tensor-parallel
  preset_pipeline-parallel
  preset_mixed-parallel
  preset_data-parallel
}

# TP=2, 4, 8 under torchrun
preset_torchrun-tensor-parallel() {
  local n
  for n in 2 4 8; do setting "$n" 1 1 torchrun; done
}

# TP2_PP2, TP4_PP2, TP2_PP4 under torchrun
preset_torchrun-mixed-parallel() {
  setting 2 2 1 torchrun
  setting 4 2 1 torchrun
  setting 2 4 1 torchrun
}

# one setting: TP=x PP=y DP=z, any of them
preset_custom() {
  setting "${custom[TP]:-1}" "${custom[PP]:-1}" "${custom[DP]:-1}"
}

# a first try: a tiny model at TP=1, 2, analysed
preset_quickstart() {
  preset_flags=(
    --model "${prefix}models/tiny-llama" --load-format dummy --kv-cache-memory-bytes 268435456
    --batch-sizes "1,2,4" --seq-lens "64,128" --max-tokens 32
  )
  # In a folder of the user's own may lie results that took hours.
  $resume || [[ -n $own_dir ]] || preset_flags+=(--overwrite)
  setting 1 1 1
  setting 2 1 1
}

# --- Machinery --------------------------------------------------------------------------------------------------------

preset=''
output_dir=''
own_dir='' # output_dir, where the user gave one
nnodes=''
node_rank=''
master_addr=''
master_port=''
dry_run=false
pack=false
resume=false
experiment_flags=() # from our own options
user_flags=()       # after --
preset_flags=()
declare -A custom=()
child='' # the process of the setting that is being measured
names=() # of the settings, in order
declare -A sizes=()

say() { printf '%s\n' "$*" >&2; }
die() {
  say "error: $1"
  exit "${2:-2}"
}

# The words as one line that can be pasted, and that Python's shlex reads: it does not know the $'..' of printf %q.
quoted() {
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# "name<tab>comment" of every preset, in the order of this file.
list_presets() {
  local line comment=''
  while IFS= read -r line; do
    if [[ $line =~ ^preset_([a-z-]+)\(\) ]]; then
      printf '%s\t%s\n' "${BASH_REMATCH[1]}" "$comment"
    fi
    comment=${line#\# }
  done <"$here/run_batch_experiments.sh"
}

usage() {
  cat <<'EOF'
usage: ./run_batch_experiments.sh [options] PRESET [options] [-- flags]

Run the settings of a preset, one process and one result file each.

presets:
EOF
  local name comment
  while IFS=$'\t' read -r name comment; do printf '  %-25s %s\n' "$name" "$comment"; done < <(list_presets)
  cat <<'EOF'

options, before or after the preset:
  --model MODEL         model folder or hub name
  --batch-sizes N,N,..  requests handed to each replica at once
  --seq-lens N,N,..     prompt lengths in tokens
  --output-dir DIR      folder of the result files (default: results/PRESET)
  --resume              keep the good points of existing files, measure the rest
  --overwrite           replace existing files
  --pack                run settings side by side where devices are free; their
                        points are marked
  --dry-run             print the plan and the commands, and stop
  --nnodes N            nodes that each setting is spread over (default: 1);
                        give the same command on each
  --node-rank N         number of this node, from 0 (default: SLURM_NODEID or 0)
  --master-addr HOST    address of node 0
  --master-port PORT    two ports for each setting, from this one on, must be
                        free there (default: 29500)
  -h, --help            this text
  -- flags              everything after -- goes to the experiment script

examples:
  ./run_batch_experiments.sh quickstart
  ./run_batch_experiments.sh tensor-parallel --model meta-llama/Llama-3.1-8B
  ./run_batch_experiments.sh custom TP=2 PP=2 --batch-sizes 1,16 -- --num-runs 5

exit codes: 0 every setting ok; 1 some failed, or none could run; 2 wrong use;
130, 143 interrupted. A setting that cannot run here (devices, heads, layers) is
skipped. PYTHON=/path/to/python chooses the Python that has vLLM.
EOF
}

# Sizes come from `custom` or a preset: a name that says the sizes above 1, as in the file names.
setting() {
  local name=''
  # vLLM's own executor spreads one replica over nodes; offline it knows no replicas, but under torchrun it does.
  ((nnodes == 1 || $3 == 1)) || set -- "$1" "$2" "$3" torchrun
  (($1 > 1)) && name+=_tp_$1
  (($2 > 1)) && name+=_pp_$2
  (($3 > 1)) && name+=_dp_$3
  name=${4:+${4}_}${name#_}
  [[ -n ${name#torchrun_} ]] || name+=tp_1
  [[ -z ${sizes[$name]:-} ]] || return 0
  names+=("$name")
  sizes[$name]="$1 $2 $3 ${4:-}"
}

parse() {
  local word value
  while (($#)); do
    word=$1 && shift
    case $word in
      -h | --help) usage && exit 0 ;;
      --) user_flags=("$@") && return 0 ;;
      --dry-run) dry_run=true && continue ;;
      --pack) pack=true && experiment_flags+=(--packed) && continue ;;
      --resume) resume=true && experiment_flags+=(--resume) && continue ;;
      --overwrite) experiment_flags+=(--overwrite) && continue ;;
      --*=*) value=${word#*=} && word=${word%%=*} ;;
      --*)
        (($#)) && [[ $1 != -* ]] || die_unless_known "$word"
        value=$1 && shift
        ;;
      -*) die_unless_known "$word" ;;
      # No `&&`: it would switch `set -e` off inside the function.
      *)
        take_word "$word"
        continue
        ;;
    esac
    take_option "$word" "$value"
  done
}

die_unless_known() {
  case $1 in
    --model | --batch-sizes | --seq-lens | --output-dir | --nnodes | --node-rank | --master-addr | --master-port)
      die "$1: a value is needed"
      ;;
    *) die "$1: unknown option; see --help, flags for the experiment script go after --" ;;
  esac
}

take_option() {
  [[ -n $2 ]] || die_unless_known "$1"
  case $1 in
    --model | --batch-sizes | --seq-lens) experiment_flags+=("$1" "$2") ;;
    --output-dir) output_dir=$2 ;;
    --nnodes) nnodes=$(whole_number "$1" "$2" 1) ;;
    --node-rank) node_rank=$(whole_number "$1" "$2" 0) ;;
    --master-addr) master_addr=$2 ;;
    --master-port) master_port=$(whole_number "$1" "$2" 1) ;;
    *) die_unless_known "$1" ;;
  esac
}

whole_number() {
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then
    die "$1: '$2' was given, a whole number of at least $3 is needed"
  fi
  printf '%s\n' "$((10#$2))"
}

take_word() {
  if [[ -z $preset ]]; then
    declare -F "preset_$1" >/dev/null || die "'$1' is no preset; choose one of: $(list_presets | cut -f1 | paste -sd' ')"
    preset=$1
  elif [[ $preset != custom ]]; then
    die "'$1' is one word too many after the preset $preset"
  else
    [[ $1 =~ ^(TP|PP|DP)=(.*)$ ]] || die "custom: '$1' was given, TP=N, PP=N or DP=N is needed"
    local key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    [[ -z ${custom[$key]:-} ]] || die "custom: $key is given twice"
    custom[$key]=$(whole_number "custom $key" "$value" 1)
  fi
}

check_together() {
  [[ -n $preset ]] || { usage >&2 && exit 2; }
  [[ $preset != custom ]] || ((${#custom[@]})) || die "custom: at least one of TP=N, PP=N, DP=N is needed"
  local word=''
  # Without --nnodes each node would run the whole preset by itself.
  [[ -z $node_rank ]] || word="--node-rank: '$node_rank'"
  [[ -z $master_addr ]] || word="--master-addr: '$master_addr'"
  [[ -z $master_port ]] || word="--master-port: '$master_port'"
  [[ -n $nnodes || -z $word ]] || die "$word was given without --nnodes; add --nnodes N"
  nnodes=${nnodes:-1} master_port=${master_port:-29500}
  # Under Slurm each node can be given the same command.
  ((nnodes == 1)) || node_rank=${node_rank:-${SLURM_NODEID:-}}
  node_rank=${node_rank:-0}
  ((node_rank < nnodes)) || die "--node-rank: '$node_rank' was given, --nnodes $nnodes goes up to $((nnodes - 1))"
  ((nnodes == 1)) || ! $pack || die "--pack: it shares out the devices of one node, --nnodes '$nnodes' was given"
  ((nnodes == 1)) || [[ $preset != quickstart ]] || die "--nnodes: '$nnodes' was given, quickstart is for one node"
  ((nnodes == 1)) || [[ -n $master_addr ]] || die "--nnodes: '$nnodes' was given, --master-addr HOST is needed too"
}

# The Python that has vLLM: the user's word, ours, the one at hand, or the one that setup_env.sh makes.
find_python() {
  if [[ -n ${PYTHON:-} ]]; then
    command -v "$PYTHON" >/dev/null || die "PYTHON: '$PYTHON' cannot be run; give the path of a Python that has vLLM"
    python=$PYTHON
  elif compgen -G "$here/.venv/.installed-*" >/dev/null; then
    python=${prefix}.venv/bin/python
  elif $dry_run; then
    python=python3
  elif python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)' 2>/dev/null; then
    python=python3
  else
    "$here/setup_env.sh"
    python=${prefix}.venv/bin/python
  fi
}

# Fills `command` with the words that measure one setting, `experiment` with those for the experiment script, and
# `meeting` with what the nodes need to meet before, where torchrun starts them.
build_command() {
  local name=$1 port=$2 tp pp dp torchrun
  read -r tp pp dp torchrun <<<"${sizes[$name]}"
  command=("$python")
  meeting=()
  local flags=() processes=$((tp * pp * dp / nnodes))
  if [[ -n $torchrun ]]; then
    # torchrun would set the same, with a banner.
    [[ -n ${OMP_NUM_THREADS:-} ]] || command=(env OMP_NUM_THREADS=1 "$python")
    command+=(-m torch.distributed.run --nproc-per-node "$processes")
    if ((nnodes > 1)); then
      meeting=("$nnodes" "$node_rank" "$master_addr" "$port" "$processes")
      command+=(--nnodes "$nnodes" --node-rank "$node_rank" --master-addr "$master_addr" --master-port $((port + 1)))
    else
      command+=(--standalone)
    fi
    flags=(--distributed-executor-backend external_launcher)
  elif ((tp * pp > 1)); then
    flags=(--distributed-executor-backend mp)
    if ((nnodes > 1)); then
      flags+=(--nnodes "$nnodes" --node-rank "$node_rank" --master-addr "$master_addr" --master-port "$port")
    fi
  fi
  experiment=(
    --name "$name" --output-file "$output_dir/${name}_results.json"
    --tensor-parallel-size "$tp" --pipeline-parallel-size "$pp" --data-parallel-size "$dp"
    "${flags[@]}" "${preset_flags[@]}" "${experiment_flags[@]}" "${user_flags[@]}"
  )
  command+=("${prefix}batch_inference_experiment.py" "${experiment[@]}")
}

# Why each setting cannot run here, a line each, empty where it can; with --plan, the plan to read.
overview() {
  local number=0 name
  for name in "${names[@]}"; do
    build_command "$name" "$(port_of "$number")"
    quoted "${command[@]}"
    number=$((number + 1))
  done | PYTHONPATH=$here "$python" -P -m batch_inference.launch.overview "$nnodes" "$node_rank" "$@"
}

# Each setting has two ports of its own: none meets what the one before may still be closing on node 0.
port_of() { echo $((master_port + 2 * $1)); }

# The nodes meet before torchrun starts, because torchrun would wait for ten minutes, and then say it in forty lines.
# They learn which network joins them; without torchrun the experiment script does the same itself.
meet_nodes() {
  ((${#meeting[@]})) || return 0
  local found line
  found=$(PYTHONPATH=$here "$python" -P -m batch_inference.measure.nodes "${meeting[@]}" -- "${experiment[@]}") || return
  while IFS= read -r line; do
    [[ $line != *=* ]] || export "${line?}"
  done <<<"$found"
}

# bash runs a trap only when a foreground command has ended, so the setting runs in the background: with `set -m` in a
# process group of its own, and able to hear Ctrl-C, which goes to it by `stop`.
run_command() {
  local rc=0
  set -m
  "${command[@]}" &
  child=$!
  set +m
  wait "$child" || rc=$?
  child=''
  return "$rc"
}

# Pass the signal on, wait for the setting to end, and start no other. A second signal ends the setting at once.
stop() {
  trap 'kill -KILL -- "-$child" 2>/dev/null; exit "$code"' INT TERM HUP
  local signal=$1 code=$2
  if [[ -n $child ]]; then
    kill "-$signal" -- "-$child" 2>/dev/null || true
    wait "$child" || true
  fi
  exit "$code"
}

run_settings() {
  local name number=0 total=${#names[@]} answer
  local reasons=() skipped=() failed=() done_names=() commands=() packed=()
  ((nnodes == 1 || $(port_of "$total") <= 65536)) ||
    die "--master-port: '$master_port' was given, $preset takes two ports for each setting: at most $((65536 - 2 * total))"
  if $dry_run; then
    overview --plan
    return
  fi
  answer=$(overview && echo .) || exit # the dot keeps empty lines at the end
  mapfile -t reasons <<<"$answer"
  for name in "${names[@]}"; do
    number=$((number + 1))
    if [[ -n ${reasons[number - 1]} ]]; then
      say "[$number/$total] $name skipped: ${reasons[number - 1]}"
      skipped+=("$name")
      continue
    fi
    build_command "$name" "$(port_of "$((number - 1))")"
    if $pack; then
      commands+=("$(quoted "${command[@]}")") packed+=("$name")
    else
      say "[$number/$total] $name -> $output_dir/${name}_results.json"
      run_alone "$name"
    fi
  done
  ((${#commands[@]} == 0)) || run_side_by_side "${commands[@]}"
  report
}

# These fill run_settings' lists of names.
run_alone() {
  local rc=0
  { meet_nodes && run_command; } || rc=$?
  # A flag or a model that is wrong for the first setting is wrong for all.
  if ((rc == 2 && ${#done_names[@]} + ${#failed[@]} == 0)); then exit 2; fi
  keep_outcome "$1" "$rc"
}

run_side_by_side() {
  local rc=0 file ended number wrong_use=true
  command=(env "PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}" "$python" -P -m batch_inference.launch.packing "$@")
  # A file without a name: nothing is left of it, however this ends.
  file=$(mktemp) && exec {ended}<>"$file" && rm -f "$file"
  run_command >&"$ended" || rc=$?
  ((rc == 0)) || exit "$rc"
  while read -r rc number; do
    keep_outcome "${packed[number]}" "$rc"
    ((rc == 2)) || wrong_use=false
  done <"/dev/fd/$ended"
  ! $wrong_use || exit 2
}

keep_outcome() {
  case $2 in
    0) done_names+=("$1") ;;
    130 | 143) exit "$2" ;;
    *) failed+=("$1") ;;
  esac
}

report() {
  say ""
  say "done: ${done_names[*]:-none}   skipped: ${skipped[*]:-none}   failed: ${failed[*]:-none}"
  local name
  for name in "${failed[@]}"; do
    [[ ! -e $output_dir/${name}_results.log ]] || say "  $name: see $output_dir/${name}_results.log"
  done
  ((${#done_names[@]} + ${#failed[@]})) || die "no setting of $preset can run on this machine" 1
  if ((node_rank > 0)); then
    say "the results are on node 0"
  elif [[ $preset != quickstart ]]; then
    say "analyse with: $(quoted "$python" "${prefix}analyze_results.py" --input "$output_dir")"
  elif ((${#done_names[@]})); then
    say ""
    # Its exit code 2 would say that the preset was used wrongly.
    "$python" "${prefix}analyze_results.py" --input "$output_dir" || exit 1
  fi
  ((${#failed[@]} == 0)) || exit 1
}

main() {
  trap 'stop INT 130' INT
  trap 'stop TERM 143' TERM
  trap 'stop HUP 129' HUP
  parse "$@"
  check_together
  own_dir=$output_dir
  output_dir=${output_dir:-results/$preset}
  find_python
  "preset_$preset"
  run_settings
}

main "$@"
