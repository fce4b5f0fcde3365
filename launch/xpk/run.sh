#!/usr/bin/env bash
# Starts a training command on TPU slices of a GKE cluster, as a workload of xpk, which restarts it after a preemption
# or a crash. The same command on the same run directory resumes.
#   launch/xpk/run.sh --name=run [settings] [--dry_run] -- python -m launch.train --config=… --workdir=/runs/…
#
#   settings    those of launch/xpk/example.env, from xpk.env (or --env=FILE) and flags: --cluster=… --type=v6e-16 …
#   --dry_run   print the command for xpk, run nothing
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$(dirname "$(readlink -f "$0")")/../lib.sh"

SETTINGS=(PROJECT ZONE CLUSTER TYPE SLICES IMAGE STORAGE MAX_RESTARTS)
PROJECT="" ZONE="" CLUSTER="" TYPE="" SLICES=1 IMAGE="" STORAGE="" MAX_RESTARTS=50
NAME="" DRY_RUN=""
GRACE_S=120 # from SIGTERM to SIGKILL, for a save. Spot machines may have less

check_settings() {
  local name
  for name in PROJECT ZONE CLUSTER TYPE IMAGE; do
    [[ -n ${!name} ]] || fail 2 "$name is not set; put it into xpk.env (launch/xpk/example.env), or say --${name,,}=…"
  done
  for name in PROJECT ZONE CLUSTER TYPE STORAGE; do
    [[ ${!name} =~ ^([a-z0-9][-a-z0-9.:]*)?$ ]] || fail 2 "$name=${!name} must be small letters, digits and hyphens"
  done
  [[ $IMAGE =~ ^[A-Za-z0-9][-A-Za-z0-9._/:@]*$ ]] || fail 2 "IMAGE=$IMAGE must be the name of an image"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail 2 "--name=$NAME must be small letters, digits and hyphens, begin with a letter, and have 40 of them at most"
  [[ $SLICES =~ ^[1-9][0-9]{0,5}$ ]] || fail 2 "SLICES=$SLICES must be a number, 1 or more"
  [[ $MAX_RESTARTS =~ ^[0-9]{1,6}$ ]] || fail 2 "MAX_RESTARTS=$MAX_RESTARTS must be a number"
  [[ -n $DRY_RUN ]] || command -v xpk >/dev/null || fail 2 "xpk is missing; install it: pip install xpk"
}

check_command() {
  local run
  ((${#COMMAND[@]})) || fail 2 "name the training command after --: -- python -m launch.train --config=… --workdir=/runs/…"
  run=$(workdir_of "${COMMAND[@]}")
  is_below "" "$run" && [[ $run == /*/?* && ! $run =~ ^/(tmp|var|dev|proc|sys|run|root|usr|etc|meshlm)/ ]] ||
    fail 2 "--workdir=$run is in the container, and is lost with it, or has . or .. in it; name a folder on a storage of the cluster: --workdir=/runs/a"
}

# Prints the words for bash on one line, in ASCII, as YAML needs them. Kubernetes expands $$ and $(NAME), so no bare $
# is left: bash puts a \ before it, and within $'…' it is written as \044.
one_line() { # WORD...
  local LC_ALL=C word quoted line=""
  for word in "$@"; do
    printf -v quoted '%q' "$word"
    if [[ $quoted == "\$'"* ]]; then
      quoted=${quoted:1}
      quoted="\$${quoted//\$/\\044}"
    fi
    line+=" $quoted"
  done
  printf '%s' "${line# }"
}

load_env xpk.env launch/xpk/example.env "${SETTINGS[@]}" -- "$@"
parse_flags name env "dry_run?" "${SETTINGS[@],,}" -- "$@"
check_settings
check_command

PLACE=("--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE")
CREATE=(xpk workload create "--workload=$NAME" "${PLACE[@]}")
CREATE+=("--tpu-type=$TYPE" "--num-slices=$SLICES" "--docker-image=$IMAGE" ${STORAGE:+"--storage=$STORAGE"})
# xpk itself restarts on 42 and 127 to 255; 1 is a crash in Python. Configuration (2), data (3) and divergence (4) end
# the workload.
CREATE+=("--max-restarts=$MAX_RESTARTS" --restart-on-exit-codes=1 "--termination-grace-period-seconds=$GRACE_S")
# exec: xpk passes SIGTERM to the process that it started, which would otherwise be a shell.
CREATE+=("--command=exec $(one_line "${COMMAND[@]}")")

act "${CREATE[@]}" || fail 2 "xpk did not start $NAME; see its error above; to see what runs all the same: $(quote xpk workload list "${PLACE[@]}")"
report "started. Its state: $(quote xpk workload list "${PLACE[@]}" "--filter-by-job=$NAME")"
report "its output: kubectl logs -f -l xpk.google.com/workload=$NAME,batch.kubernetes.io/job-completion-index=0"
report "to end it: $(quote xpk workload delete "--workload=$NAME" "${PLACE[@]}")"
