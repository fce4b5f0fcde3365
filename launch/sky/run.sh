#!/usr/bin/env bash
# Runs COMMAND on a host of a SkyPilot job, one process per host: `run:` of the yaml files.
#   COMMAND='python -m launch.train …' launch/sky/run.sh tpu|cuda
#
# launch.supervise handles what can be handled on these machines: crashes, and peers that died. The exit code tells
# SkyPilot what else to do: 42 asks for new machines; any other ends the job, and the same command resumes the run.
set -euo pipefail
CDPATH="" cd "$(dirname "$(readlink -f "$0")")/../.."
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source launch/lib.sh

RUNS=${RUNS:-/runs} NFS=${NFS:-}
PORT=${COORDINATOR_PORT:-8476}
HOSTS=${SKYPILOT_NUM_NODES:-1} RANK=${SKYPILOT_NODE_RANK:-0} IPS=${SKYPILOT_NODE_IPS:-localhost}
PATH=$HOME/meshlm-env/bin:$PATH

# Sets WORDS to the words of COMMAND, as a shell reads them, without expanding file patterns. Outside of quotes nothing
# may end the command or begin another.
read_command() {
  local rest=${COMMAND:-} bare="" quoted
  quoted=$'^([^\'"\\\\$]*)(\\\\.|\\$\'([^\'\\\\]|\\\\.)*\'|\\$|\'[^\']*\'|"([^"\\\\]|\\\\.)*")'
  [[ -n $rest ]] || fail 2 "COMMAND is empty; say --env COMMAND='python -m launch.train --config=… --workdir=$RUNS/…'"
  while [[ $rest =~ $quoted ]]; do
    bare+=${BASH_REMATCH[1]}
    rest=${rest:${#BASH_REMATCH[0]}}
  done
  set -f
  if [[ $bare$rest =~ [\;\&\|\<\>\(\)\`\'\"] ]] || ! (eval "WORDS=(${COMMAND:-})") 2>/dev/null; then
    fail 2 "COMMAND must be one command with its arguments, with all variables set and all quotes closed; it is: ${COMMAND:-}"
  fi
  eval "WORDS=(${COMMAND:-})"
}

# Checks that the run directory outlives the machines: it is on the shared folder, or has a mirror.
check_run_directory() {
  local run mirror there
  run=$(workdir_of "${WORDS[@]}")
  mirror=$(flag config.checkpoint.mirror "${WORDS[@]}") there=$(mounted_at "$RUNS")
  is_below "$RUNS" "$run" || fail 2 "--workdir=$run must be below $RUNS, as in --workdir=$RUNS/a, without . and .."
  [[ -z $NFS || $there == "$NFS" ]] || # else the run would start from step 0, on this disk or in another folder
    fail 2 "$RUNS is ${there:-not mounted} here, and NFS=$NFS; was the machine rebooted? Launch the job again"
  [[ -z $there ]] || return 0
  ((HOSTS == 1)) || fail 2 "$HOSTS hosts need one folder for the run; say --env NFS=SERVER:/EXPORT, which becomes $RUNS"
  [[ -n $mirror ]] ||
    fail 2 "$run is on a disk that goes with the machine; add --config.checkpoint.mirror=gs://…, or say --env NFS=SERVER:/EXPORT"
}

supervise() {
  case $ACCELERATOR in
  tpu) # JAX finds the peers by itself; the rank is for the supervisor, which writes its own file on each host
    python -m launch.supervise --process="$RANK" -- "${WORDS[@]}"
    ;;
  cuda)
    launch/gpu/run.sh --nodes="$HOSTS" --node="$RANK" --coordinator="${IPS%%$'\n'*}:$PORT" -- "${WORDS[@]}"
    ;;
  esac
}

ACCELERATOR=${1:-}
[[ $ACCELERATOR =~ ^(tpu|cuda)$ ]] || fail 2 "name the accelerator: launch/sky/run.sh tpu or cuda"
check_nfs
read_command
check_run_directory

# Signals reach every process of the host, and this script has to outlive the save. A signal distinguishes a stop from a
# supervisor that gives up after three restarts without a new checkpoint; then new machines would not help.
signalled="" code=0
trap 'signalled=1' TERM INT USR1
supervise || code=$?
if [[ -n $signalled && ! $code =~ ^(0|2|3|4|130)$ ]]; then
  code=42
elif [[ $code == 42 ]]; then
  code=1
fi
say "ended with $code"
exit "$code"
