#!/usr/bin/env bash
# Trains on the GPUs of this machine, or of several, under a supervisor that restarts after a crash.
#
#   launch/gpu/run.sh -- python -m launch.train --config=configs/llama.py --workdir=runs/llama
#
#   --per_gpu         one process for each GPU; default: one process with all GPUs
#   --nodes=N --node=I --coordinator=HOST:PORT
#                     N machines, each started with this command; this is number I, from 0, and HOST is number 0 (its
#                     port open to the others; the run directory on a file system that all share)
#   --deterministic   the same bits after a restart, too; slower
#   --skip_check      do not check driver, wheels, memory and links first (launch/gpu_check.py)
#   --dry_run         print the settings and commands, run nothing
#
# Settings of XLA and NCCL are in launch/gpu/env.sh. launch/local/run.sh does the rest: with several processes, lines
# are prefixed with [process]; Ctrl-C, SIGTERM and SIGUSR1 save and exit with 42, and the same command resumes.
set -euo pipefail
HERE=$(dirname "$(readlink -f "$0")")
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$HERE/../lib.sh"
# shellcheck source-path=SCRIPTDIR source=../local/command.sh
source "$HERE/../local/command.sh"

NODES=1 NODE="" COORDINATOR="" PER_GPU="" DETERMINISTIC="" SKIP_CHECK="" DRY_RUN=""
SETTINGS=(XLA_FLAGS JAX_OPTIMIZATION_LEVEL JAX_PLATFORMS NCCL_DEBUG NCCL_ALGO)

# Sets GPUS. CUDA reads CUDA_VISIBLE_DEVICES up to the first name that is not a GPU, such as -1.
count_gpus() {
  local name names
  GPUS=0
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra names <<<"$CUDA_VISIBLE_DEVICES"
    for name in "${names[@]}"; do
      [[ $name =~ ^\ *(GPU-|MIG-|[0-9]) ]] || break
      GPUS=$((GPUS + 1))
    done
    ((GPUS)) || fail 2 "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names no GPU; unset it, or say CUDA_VISIBLE_DEVICES=0,1"
  else
    GPUS=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ') ||
      fail 2 "nvidia-smi lists no GPU; python -m launch.gpu_check says why; CUDA_VISIBLE_DEVICES=0,1 works without it"
  fi
}

parse_flags nodes node coordinator "per_gpu?" "deterministic?" "skip_check?" "dry_run?" -- "$@"
find_python
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$HERE/env.sh"
if [[ -n $DRY_RUN ]]; then
  for name in "${SETTINGS[@]}"; do [[ -z ${!name:-} ]] || printf 'export %s\n' "$(quote "$name=${!name}")"; done
fi
[[ -n $SKIP_CHECK ]] || act "$PYTHON" -m launch.gpu_check

PROCESS_FLAGS=(--processes=1)
if [[ -n $PER_GPU ]]; then
  count_gpus
  PROCESS_FLAGS=("--processes=$GPUS" --per_gpu)
fi
PROCESS_FLAGS+=("--nodes=$NODES" "--node=${NODE:-}" "--coordinator=$COORDINATOR")
exec "$HERE/../local/run.sh" "${PROCESS_FLAGS[@]}" ${DRY_RUN:+--dry_run} -- "${COMMAND[@]}"
