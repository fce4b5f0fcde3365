# shellcheck shell=bash
# What the scripts of launch/tpu/ share: settings, gcloud with retries and errors in one line, every worker at once.
# Sourced; runs nothing. A queued resource NAME has the nodes NAME, or NAME-0, NAME-1, … with several slices.
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

SETTINGS=(PROJECT ZONE NAME TYPE SLICES RUNTIME TIER VALID_FOR BUCKET NFS SERVICE_ACCOUNT INTERNAL_IPS)
: "${PROJECT:=}" "${ZONE:=}" "${NAME:=}" "${TYPE:=}" "${SLICES:=1}" "${RUNTIME:=}" "${TIER:=on-demand}"
: "${VALID_FOR:=}" "${BUCKET:=}" "${NFS:=}" "${SERVICE_ACCOUNT:=}" "${INTERNAL_IPS:=}" "${DRY_RUN:=}"
ATTEMPTS=5
RETRY_S=${MESHLM_RETRY_S:-5} # doubled each time
AT_ONCE=32                   # connections

# Settings from tpu.env (or --env=FILE), then from flags; everything is checked before anything is asked of the cloud.
begin() { # FLAG... -- ARGUMENT...
  local own=()
  while [[ $1 != -- ]]; do
    own+=("$1")
    shift
  done
  shift
  load_env tpu.env launch/tpu/example.env "${SETTINGS[@]}" -- "$@"
  parse_flags "${own[@]}" env "dry_run?" "${SETTINGS[@],,}" -- "$@"
  check_numbers
  check_settings
  STATE=${XDG_STATE_HOME:-$HOME/.local/state}/meshlm/tpu/$PROJECT.$ZONE.$NAME
  mkdir -p "$STATE/logs"
}

check_numbers() {
  local name
  for name in LIMIT_S LINES; do at_least 0 "--${name,,}" "${!name:-0}"; done
  for name in POLL_S MAX_HOURS; do
    [[ ${!name:-0} =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail 2 "--${name,,}=${!name} must be a number"
  done
}

check_settings() {
  local name
  for name in PROJECT ZONE NAME TYPE; do
    [[ -n ${!name} ]] || fail 2 "$name is not set; put it into tpu.env (launch/tpu/example.env), or say --${name,,}=…"
  done
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail 2 "NAME=$NAME must be small letters, digits and hyphens, begin with a letter, and have 40 of them at most"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail 2 "SLICES=$SLICES must be a number, 1 or more"
  [[ $TIER =~ ^(on-demand|spot|reserved)$ ]] || fail 2 "TIER=$TIER must be on-demand, spot or reserved"
  BUCKET=${BUCKET#gs://} BUCKET=${BUCKET%/}
  [[ -z $NFS || $NFS == ?*:/* ]] || fail 2 "NFS=$NFS must be SERVER:/EXPORT, such as 10.0.0.2:/runs"
  if [[ -z $RUNTIME ]]; then
    case $TYPE in
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    *) fail 2 "TYPE=$TYPE is not known here (v6e-…, v5p-…, v5litepod-…, v4-…); correct it, or say its RUNTIME, too" ;;
    esac
  fi
  [[ -z $DRY_RUN ]] || return 0
  command -v gcloud >/dev/null ||
    fail 2 "gcloud is missing; install the Google Cloud CLI (cloud.google.com/sdk), then: gcloud auth login"
  for name in timeout flock; do
    command -v "$name" >/dev/null || fail 2 "$name is missing; on macOS: brew install coreutils flock"
  done
}

# gcloud

# `gcloud compute tpus WORD...` here; tried again where the network or the service is at fault. Leaves what it printed
# in OUTPUT and REASON (stderr). With --dry_run all is only shown, what asks on stderr.
cloud() { # WORD...
  local command=(gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet)
  local attempt wait_s=$RETRY_S code errors
  OUTPUT="" REASON=""
  if [[ -n $DRY_RUN ]]; then
    if [[ " $* " =~ " "(describe|list)" " ]]; then say "asks: $(quote "${command[@]}")"; else act "${command[@]}"; fi
    return 0
  fi
  errors=$(mktemp)
  for ((attempt = 1; ; attempt++)); do
    code=0
    OUTPUT=$("${command[@]}" 2>"$errors" </dev/null) || code=$?
    REASON=$(<"$errors")
    if ((code == 0 || attempt == ATTEMPTS)) || ! is_passing; then
      rm -f "$errors"
      return "$code"
    fi
    say "gcloud: $(first_line "$REASON"); again in $wait_s s"
    sleep "$wait_s"
    wait_s=$((2 * wait_s))
  done
}

is_passing() {
  [[ $REASON =~ UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|RATE_LIMIT|"Connection reset"|"timed out"|" 503" ]]
}

is_not_found() {
  [[ $REASON =~ NOT_FOUND|"not found" ]]
}

# Ends the script with what to do about gcloud's REASON.
explain() { # WHAT
  local what=$1 todo
  case $REASON in
  *"auth login"* | *"active account"* | *eauthentication* | *credentials*) todo="log in: gcloud auth login" ;;
  *"not have permission"* | *PERMISSION_DENIED*locations* | *"Permission denied on 'locations"* | *"nvalid zone"* | *"nknown zone"*)
    todo="is ZONE=$ZONE right, and may your account use TPUs in $PROJECT? Zones: gcloud compute tpus locations list"
    ;;
  *PERMISSION_DENIED*) todo="your account needs the role TPU Admin in $PROJECT" ;;
  *uota*) todo="ask for quota of $TYPE ($TIER) in $ZONE, or take another zone or TIER" ;;
  *RESOURCE_EXHAUSTED* | *"no more capacity"*) todo="there is no room for $TYPE in $ZONE now; take another zone, or TIER=spot with VALID_FOR" ;;
  *ALREADY_EXISTS* | *"already exists"*) todo="NAME=$NAME is in use; take another, or delete that one: launch/tpu/delete.sh" ;;
  *ccelerator*ype*) todo="types in $ZONE: gcloud compute tpus accelerator-types list --zone=$ZONE" ;;
  *untime*ersion*) todo="runtimes in $ZONE: gcloud compute tpus versions list --zone=$ZONE" ;;
  *NOT_FOUND* | *"not found"*) todo="is it in ZONE=$ZONE, and asked for (launch/tpu/create.sh)? launch/tpu/status.sh shows what is there" ;;
  *) todo="see above, or ask gcloud with --verbosity=debug" ;;
  esac
  fail 2 "$what: $(first_line "$REASON"); $todo"
}

first_line() { # TEXT
  local line
  line=$(grep -m1 -v '^[[:space:]]*$' <<<"$1" || true)
  printf '%s' "${line:0:240}"
}

# WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, FAILED, SUSPENDING, SUSPENDED, …; NONE where there is no such resource.
state() {
  if cloud queued-resources describe "$NAME" --format='value(state.state)'; then
    printf '%s' "$OUTPUT"
  else
    is_not_found || explain "cannot ask for $NAME"
    printf NONE
  fi
}

# Workers

nodes() {
  local i
  if ((SLICES == 1)); then
    printf '%s\n' "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do printf '%s\n' "$NAME-$i"; done
  fi
}

# A line "NODE WORKER" for each worker.
workers() {
  local node i
  for node in $(nodes); do
    cloud tpu-vm describe "$node" --format='value(networkEndpoints.len())' || explain "cannot ask for the workers of $node"
    for ((i = 0; i < ${OUTPUT:-1}; i++)); do printf '%s %s\n' "$node" "$i"; done
  done
}

ssh_words() { # NODE WORKER WORD...
  printf '%s\0' gcloud compute tpus tpu-vm ssh "$1" --worker="$2" --project="$PROJECT" --zone="$ZONE" --quiet
  [[ -z $INTERNAL_IPS ]] || printf '%s\0' --internal-ip
  printf '%s\0' --command="$(quote "${@:3}")"
}

# Runs the words on one worker, LIMIT_S at most; once more where the connection was at fault (255) or hung (124).
on_worker() { # LIMIT_S NODE WORKER WORD...
  local limit_s=$1 command=() attempt code=0
  shift
  mapfile -d '' -t command < <(ssh_words "$@")
  if [[ -n $DRY_RUN ]]; then
    act "${command[@]}"
    return
  fi
  for attempt in 1 2 3; do
    code=0
    timeout --kill-after=5 "$limit_s" "${command[@]}" </dev/null || code=$?
    [[ $code == 255 ]] || break
    say "no connection to worker $2 of $1; attempt $attempt"
    sleep "$RETRY_S"
  done
  return "$code"
}

# Runs the words on all workers at once, each with its number in MESHLM_PROCESS. What each printed is in
# $STATE/logs/NODE.WORKER.txt; those that failed are named. Its code is the number of those, 255 at most. Where the cloud
# does not say which workers there are, it ends the script.
on_workers() { # LIMIT_S WORD...
  local limit_s=$1 node worker i failed=0 code names=() pids=() list number
  shift
  rm -f "$STATE"/logs/*
  list=$(workers) || exit
  while read -r node worker; do
    number=MESHLM_PROCESS=${#pids[@]}
    on_worker "$limit_s" "$node" "$worker" env "$number" "$@" >"$STATE/logs/$node.$worker.txt" 2>&1 &
    pids+=($!) names+=("$node.$worker")
    ((${#pids[@]} % AT_ONCE)) || wait "${pids[-1]}" || true
  done <<<"$list"
  for i in "${!pids[@]}"; do
    code=0
    wait "${pids[i]}" || code=$?
    if [[ -n $DRY_RUN ]]; then
      cat "$STATE/logs/${names[i]}.txt"
    elif ((code)); then
      failed=$((failed + 1))
      say "worker ${names[i]}: $(worker_problem "$code" "$limit_s" "$STATE/logs/${names[i]}.txt")"
    fi
  done
  return $((failed > 255 ? 255 : failed))
}

worker_problem() { # CODE LIMIT_S FILE
  case $1 in
  124 | 137) printf 'no answer within %s s' "$2" ;;
  255) printf 'no connection: %s' "$(grep -v '^[[:space:]]*$' "$3" | tail -n 1)" ;;
  *) printf 'exit code %s: %s (all of it: %s)' "$1" "$(grep -v '^[[:space:]]*$' "$3" | tail -n 1)" "$3" ;;
  esac
}

# What is paid for: queued resources that hold machines, and machines that belong to none. One line each.
billing() {
  cloud queued-resources list --format='csv[no-heading](name.basename(),state.state)' || explain "cannot list queued resources"
  grep -E ',(ACTIVE|PROVISIONING|CREATING|SUSPENDING|DELETING)$' <<<"$OUTPUT" | sed 's/,/ /; s/^/queued resource /' || true
  cloud tpu-vm list --format='csv[no-heading](name.basename(),state)' || explain "cannot list TPU VMs"
  grep -vE ',(PREEMPTED|TERMINATED|STOPPED|DELETING)$' <<<"$OUTPUT" | grep . | sed 's/,/ /; s/^/TPU VM /' || true
}

# A training command whose run can be told, on storage that all of several hosts share, and that outlives them.
check_command() {
  local run
  ((${#COMMAND[@]})) || fail 2 "name the training command after --: -- python -m launch.train --config=… --workdir=runs/…"
  run=$(flag workdir "${COMMAND[@]}")
  [[ -n $run ]] || fail 2 "the command has no --workdir=…"
  case $run in
  bucket/?*) [[ -n $BUCKET ]] || fail 2 "--workdir=$run is in the bucket, and none is set; put BUCKET into tpu.env" ;;
  runs/?*)
    [[ -z $NFS ]] || return 0
    if ((SLICES > 1)) || has_several_hosts; then
      fail 2 "$SLICES x $TYPE has several hosts, and --workdir=$run is on the disk of each; put NFS=SERVER:/EXPORT into tpu.env, which becomes runs/, or BUCKET, and say --workdir=bucket/$run"
    fi
    [[ -n $(flag config.checkpoint.mirror "${COMMAND[@]}") ]] ||
      fail 2 "--workdir=$run is on a disk that is deleted with the machine; put NFS or BUCKET into tpu.env (launch/tpu/example.env), or add --config.checkpoint.mirror=gs://…"
    ;;
  *) fail 2 "--workdir=$run must be below runs/ (NFS) or bucket/ (BUCKET), where it outlives the machines" ;;
  esac
}

# More chips than one host has: 8 of v5e and v6e in one machine at most, 4 of v4 and v5p, whose types count cores.
has_several_hosts() {
  local size=${TYPE##*-}
  [[ $size =~ ^[0-9]+$ ]] || return 0
  ((size > 8))
}
