# shellcheck shell=bash
# Runs things on all workers of NAME at once, for the scripts of launch/tpu/. Scripts source it; it runs nothing.

AT_ONCE=32                    # concurrent connections
ANSWERS="" FAILED=0 UNKNOWN=0 # results of the last call
BUSY=75                       # exit code of a worker on which another call is active
# shellcheck disable=SC2034 # read by the scripts
STATUS='^((running|none|other) |exited ([0-9]{1,3}) )(0|[1-9][0-9]{0,15})$' # what worker.sh says of a run

nodes() { # as many as were created, even if the settings have changed
  local i slices=${COUNT:-$SLICES}
  if ((slices == 1)); then
    printf '%s\n' "$NAME"
  else
    for ((i = 0; i < slices; i++)); do printf '%s\n' "$NAME-$i"; done
  fi
}

# Prints a line "NODE WORKER" for each worker. The number never shrinks: a shorter answer is incomplete.
workers() {
  local list known now before=0
  all_workers >"$ANSWERS/all" || return # not $(…), which would delay signals
  list=$(<"$ANSWERS/all")
  if [[ -n ${MADE:-} ]]; then
    known=$(recall "$STATE/workers" "")
    now=$(wc -l <<<"$list")
    [[ $known != "$MADE"$'\n'* ]] || before=$(($(wc -l <<<"$known") - 1))
    ((before <= now)) || fail 42 "the cloud names $now workers of $NAME, and there were $before; try again"
    [[ $known == "$MADE"$'\n'"$list" ]] || remember "$STATE/workers" "$MADE"$'\n'"$list"
  fi
  printf '%s\n' "$list"
}

all_workers() {
  local node i
  for node in $(nodes); do
    cloud tpu-vm describe "$node" --format='value(networkEndpoints.len())' || {
      ! is_absent "nodes/$node" || : >"$ANSWERS/absent" # for the babysitter
      explain "cannot ask for the workers of $node"
    }
    [[ -z $DRY_RUN ]] || OUTPUT=1
    [[ $OUTPUT =~ ^[1-9][0-9]*$ ]] || fail 42 "the cloud does not say which workers $node has; try again"
    for ((i = 0; i < OUTPUT; i++)); do printf '%s %s\n' "$node" "$i"; done
  done
}

# Prints words for gcloud, NUL-terminated. MESHLM_CALL identifies this call: gcloud may run the words twice if the
# connection breaks.
ssh_words() { # NODE WORKER NUMBER WORD...
  printf '%s\0' gcloud compute tpus tpu-vm ssh "$1" --worker="$2" --project="$PROJECT" --zone="$ZONE" --quiet
  printf '%s\0' --ssh-flag=-oBatchMode=yes # no user can answer a prompt
  [[ -z $INTERNAL_IPS ]] || printf '%s\0' --internal-ip
  printf '%s\0' --command="$(quote env MESHLM_PROCESS="$3" MESHLM_CALL="$CALL" "${@:4}")"
}

# Prints words for a copy to one worker: for a copy to several, gcloud refuses an ssh-agent that has another key.
scp_words() { # NODE WORKER NUMBER FILE
  printf '%s\0' gcloud compute tpus tpu-vm scp "$4" "$1:meshlm.tgz" --worker="$2" --project="$PROJECT" --zone="$ZONE" --quiet
  printf '%s\0' --scp-flag=-oBatchMode=yes
  [[ -z $INTERNAL_IPS ]] || printf '%s\0' --internal-ip
}

# Runs the words on one worker for LIMIT_S at most; retries if there was no connection (255).
on_worker() { # LIMIT_S WORD...
  local code=0
  if [[ -n $DRY_RUN ]]; then
    act "${@:2}"
    return
  fi
  for _ in 1 2 3; do
    code=0
    timeout --kill-after=5 "$@" </dev/null &
    wait "$!" || code=$?
    if [[ $code != 255 ]] || is_orphan; then break; fi
    nap "$RETRY_S"
  done
  return "$code"
}

# Runs what WORDS prints for each worker, on all workers at once. Puts each one's output in $ANSWERS/NODE.WORKER.txt, in
# a new folder for each call, and its exit code in CODES, and names workers that failed. Returns 1 if some failed: FAILED
# counts those that said so, UNKNOWN those whose state is not known. Another code means that the workers cannot be
# listed, which has been reported.
each_worker() { # LIMIT_S WORDS ARGUMENT...
  local limit_s=$1 words=$2 node worker i code list command names=() pids=()
  declare -gA CODES=()
  shift 2
  rm -rf "$ANSWERS"
  ANSWERS=$(mktemp -d "$STATE/answers.XXXXXXXX" 2>/dev/null) || fail 42 "no file can be made in $STATE; free disk space, and try again"
  CALL=${ANSWERS##*.} FAILED=0 UNKNOWN=0
  as_job workers >"$ANSWERS/list" &
  wait "$!" || return
  list=$(<"$ANSWERS/list")
  while read -r node worker; do
    mapfile -d '' -t command < <("$words" "$node" "$worker" "${#pids[@]}" "$@")
    as_job on_worker "$limit_s" "${command[@]}" >"$ANSWERS/$node.$worker.txt" 2>&1 &
    pids+=($!) names+=("$node.$worker")
    # If gcloud has no ssh key yet, the first connection makes one, so the others wait for it.
    [[ ${#pids[@]} != 1 || -e ${HOME:-}/.ssh/google_compute_engine ]] && ((${#pids[@]} % AT_ONCE)) || wait "${pids[-1]}" || true
  done <<<"$list"
  for i in "${!pids[@]}"; do
    code=0
    wait "${pids[i]}" || code=$?
    # shellcheck disable=SC2034 # the babysitter reads it
    CODES[${names[i]}]=$code
    if [[ -n $DRY_RUN ]]; then
      cat "$ANSWERS/${names[i]}.txt"
    elif ((code)); then
      if is_unknown "$code" "$ANSWERS/${names[i]}.txt"; then UNKNOWN=$((UNKNOWN + 1)); else FAILED=$((FAILED + 1)); fi
      say "worker ${names[i]}: $(worker_problem "$code" "$limit_s" "$ANSWERS/${names[i]}.txt")"
    fi
  done
  ((FAILED + UNKNOWN == 0)) || return 1
}

# Prints the last line that matches FORM in a worker's output; gcloud prints lines of its own around it.
said() { # FORM FILE
  grep -E "$1" "$2" | tail -n 1
}

# Whether each worker has printed a line that matches FORM: an empty or truncated answer does not count, whatever its
# code.
heard() { # FORM
  local file
  [[ -z $DRY_RUN ]] || return 0
  for file in "$ANSWERS"/*.txt; do
    [[ -z $(said "$1" "$file") ]] || continue
    UNKNOWN=$((UNKNOWN + 1))
    say "worker $(basename "$file" .txt): no answer but '$(last_line "$file")'"
  done
  ((UNKNOWN == 0))
}

on_workers() { # LIMIT_S WORD...
  each_worker "$1" ssh_words "${@:2}"
}

copy_to_workers() { # LIMIT_S FILE
  each_worker "$1" scp_words "$2"
}

# A worker does one thing at a time: this waits until an earlier call that was given up has finished there.
on_free_workers() { # LIMIT_S WORD...
  on_workers "$1" flock --close --wait=$(($1 / 2)) --conflict-exit-code=$BUSY meshlm-busy "${@:2}"
}

# Runs worker.sh on all workers; one that is not set up answers "none 0".
ask_workers() { # LIMIT_S VERB ARGUMENT...
  # shellcheck disable=SC2016 # for the worker's shell
  on_free_workers "$1" bash -c \
    'if [ -e meshlm/launch/tpu/worker.sh ]; then exec bash meshlm/launch/tpu/worker.sh "$@"; else echo none 0; fi' worker "${@:2}"
}

# Whether the result is not known: no connection (255), time ran out (124, 137), gcloud failed, or the worker was busy.
is_unknown() { # CODE FILE
  [[ $1 =~ ^(255|124|137|$BUSY)$ ]] || grep -qE '^ERROR: (\(gcloud|gcloud crashed)' "$2"
}

# Whether the worker itself is silent or gone. Other errors of ssh are faults of this machine, its keys, or the network.
is_silent() { # CODE FILE
  case $1 in
  124 | 137) return 0 ;;
  255) grep -qE 'Connection (timed out|refused|reset|closed)|No route to host|Operation timed out|closed by remote host|failed to connect to backend' "$2" ;;
  *) [[ $1 != 0 ]] && grep -qE "NOT_FOUND: .*/nodes/[^/]*'" "$2" ;;
  esac
}

worker_problem() { # CODE LIMIT_S FILE
  case $1 in
  124 | 137) printf 'no answer within %s s' "$2" ;;
  255) printf 'no connection: %s' "$(grep -v '^ERROR: (gcloud' "$3" | grep . | tail -n 1)" ;;
  "$BUSY") printf 'busy with another call' ;;
  *) printf 'exit code %s: %s (full output: %s)' "$1" "$(last_line "$3")" "$3" ;;
  esac
}

last_line() { # FILE
  grep -v '^[[:space:]]*$' "$1" | tail -n 1 || true
}

# Ends the script after each_worker has failed; with 42 if no worker itself has reported a failure.
give_up() { # CODE WHAT
  (($1 == 1)) || exit "$1"
  ((FAILED == 0)) || fail 2 "$FAILED workers of $NAME $2"
  fail 42 "$UNKNOWN workers of $NAME have not answered, and perhaps $2"
}

# Removes the answers at the end of the script, unless a worker failed: then the user may need them.
tidy() {
  [[ -z $ANSWERS ]] || ((FAILED + UNKNOWN)) || rm -rf "$ANSWERS"
  [[ -z $DRY_RUN ]] || rm -rf "$STATE" # the temporary one of find_state
}
