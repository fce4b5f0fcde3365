#!/usr/bin/env bash
# Runs several processes of one run on this machine, each under its own supervisor, as a pod does, to try that out.
#
#   launch/local/run.sh --processes=4 -- python -m launch.train --config=configs/tiny.py --workdir=runs/tiny
#
#   --processes=N            processes on this machine (2)
#   --devices_per_process=N  CPU devices of each process, with JAX_PLATFORMS=cpu; default: the devices JAX finds
#   --nodes=N --node=I --coordinator=HOST:PORT
#                            N machines, each started with this command; this is number I, from 0, and HOST is number 0
#   --per_gpu                process I uses only GPU I of the machine
#   --dry_run                print the commands, run nothing
#
# Lines are prefixed with [process]. Ctrl-C, SIGTERM and SIGUSR1 go to all processes: all save the same step, and
# the script exits with 42. The same command resumes. Exit codes are those of docs/reliability.md: 0 if all exited with
# 0, otherwise the most informative one.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$(dirname "$(readlink -f "$0")")/../lib.sh"
# shellcheck source-path=SCRIPTDIR source=command.sh
source "$(dirname "$(readlink -f "$0")")/command.sh"

PROCESSES=2 DEVICES_PER_PROCESS="" NODES=1 NODE="" COORDINATOR="" PER_GPU="" DRY_RUN=""

check_flags() {
  local word
  at_least 1 --processes "$PROCESSES"
  at_least 1 --devices_per_process "${DEVICES_PER_PROCESS:-1}"
  at_least 1 --nodes "$NODES"
  if ((NODES > 1)); then
    [[ -n $NODE && -n $COORDINATOR ]] || fail 2 "--nodes=$NODES needs --node=I, from 0, and --coordinator=HOST:PORT"
  fi
  at_least 0 --node "${NODE:=0}"
  ((NODE < NODES)) || fail 2 "--node=$NODE must be below --nodes=$NODES; the first is 0"
  [[ -z $COORDINATOR ]] || is_place "$COORDINATOR" || fail 2 "--coordinator=$COORDINATOR must be HOST:PORT"
  for word in "${COMMAND[@]}"; do
    [[ ! $word =~ ^--?(coordinator_address|num_processes|process_id)(=|$) ]] ||
      fail 2 "$word is set for each process; leave it out"
  done
}

is_place() { # HOST:PORT
  [[ $1 =~ ^[^[:space:]]+:([1-9][0-9]{0,4})$ ]] && ((BASH_REMATCH[1] < 65536))
}

# Prints a port that no process listens on, below the range of outgoing connections: in the seconds between two
# attempts, when the port is free, no connection takes it by chance. So all attempts can use the same port.
free_port() {
  local port
  while port=$((20000 + RANDOM % 10000)) && (: <"/dev/tcp/localhost/$port") 2>/dev/null; do :; done
  printf '%s' "$port"
}

# Sets WORDS to the command of process I on this machine.
words_of() { # I
  WORDS=()
  [[ -z $PER_GPU ]] || WORDS+=("JAX_LOCAL_DEVICE_IDS=$1")
  [[ -z $DEVICES_PER_PROCESS ]] ||
    WORDS+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES_PER_PROCESS")
  ((${#WORDS[@]} == 0)) || WORDS=(env "${WORDS[@]}")
  WORDS+=("$PYTHON" -m launch.supervise -- "${COMMAND[@]}")
  if ((NODES * PROCESSES > 1)); then
    WORDS+=("--coordinator_address=$COORDINATOR" "--num_processes=$((NODES * PROCESSES))")
    WORDS+=("--process_id=$((NODE * PROCESSES + $1))")
  fi
}

parse_flags processes devices_per_process nodes node coordinator "per_gpu?" "dry_run?" -- "$@"
find_python
check_flags
COORDINATOR=${COORDINATOR:-localhost:$(free_port)}

LINES=()
for ((i = 0; i < PROCESSES; i++)); do
  words_of "$i"
  LINES+=("$(quote "${WORDS[@]}")")
done
if [[ -n $DRY_RUN ]]; then
  printf '%s\n' "${LINES[@]}"
elif ((PROCESSES == 1)); then
  exec "${WORDS[@]}"
else
  exec "$PYTHON" -m launch.local_launcher "${LINES[@]}"
fi
