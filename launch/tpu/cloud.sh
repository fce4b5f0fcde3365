# shellcheck shell=bash
# gcloud, for the scripts of launch/tpu/: calls with retries and one-line errors; what exists, whose it is, what is
# billing. Scripts source it; it runs nothing.

ATTEMPTS=5
RETRY_S=${MESHLM_RETRY_S:-5} # doubled each time
ASK_S=120 ACT_S=900          # limits of queries and of actions: gcloud waits until an action is complete
OWNER=""                     # set by know_owner
FIELDS='csv[no-heading](state.state,createTime,tpu.nodeSpec[0].node.acceleratorType.basename(),tpu.nodeSpec[0].multisliceParams.nodeCount,tpu.nodeSpec[0].node.labels.meshlm)'

# Runs `gcloud compute tpus WORD...` for PROJECT and ZONE; retries if the network or the service is at fault. Sets
# OUTPUT, and REASON from stderr. With --dry_run it only prints the command, queries on stderr.
cloud() { # WORD...
  local command=(gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet)
  local attempt wait_s=$RETRY_S limit_s=$ACT_S code
  OUTPUT="" REASON=""
  [[ ! $2 =~ ^(describe|list)$ ]] || limit_s=$ASK_S
  if [[ -n $DRY_RUN ]]; then
    if ((limit_s == ASK_S)); then say "asks: $(quote "${command[@]}")"; else act "${command[@]}"; fi
    return 0
  fi
  for ((attempt = 1; ; attempt++)); do
    code=0
    answer "$limit_s" "${command[@]}" || code=$?
    if ((code == 0 || attempt == ATTEMPTS)) || ! is_passing || is_orphan; then return "$code"; fi
    say "gcloud: ${REASON:0:240}; again in $wait_s s"
    nap "$wait_s"
    wait_s=$((2 * wait_s))
  done
}

# Runs a command for LIMIT_S at most. It runs in the background, so that signals are handled at once, and without the
# babysitter's lock (9), which would otherwise outlive the babysitter.
answer() { # LIMIT_S COMMAND...
  local said code=0
  said=$(mktemp -d 2>/dev/null) || { REASON="no file can be made in ${TMPDIR:-/tmp}" && return 1; }
  timeout --kill-after=5 "$@" >"$said/output" 2>"$said/reason" </dev/null 9>&- &
  wait $! || code=$?
  OUTPUT=$(<"$said/output") REASON=""
  ((code == 0)) || REASON=$(error_in "$said/reason")
  rm -rf "$said"
  ((code != 124 && code != 137)) || REASON="no answer within $1 s"
  return "$code"
}

# Prints gcloud's output from ERROR: on, as one line, without the progress messages before it and the account in it.
error_in() { # FILE
  local text
  text=$(sed -n '/^ERROR: /,$p' "$1")
  tr -s '[:space:]' ' ' <<<"${text:-$(<"$1")}" |
    sed -E 's/^ | $//g; s/ This command is authenticated as [^[]*\[core\/account\] property\.?//'
}

nap() { # SECONDS
  sleep "$1" 9>&- &
  wait $!
}

# Whether the network or the service is at fault, by the messages of gcloud 528. gcloud reports an expired login like a
# network failure, which this must not take it for.
is_passing() {
  [[ ! $REASON =~ invalid_grant|[Rr]eauth ]] || return 1
  # Statuses of the service; those of an operation are numbers.
  [[ $REASON =~ UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|CANCELLED|RATE_LIMIT|"per minute"|" 503" ]] ||
    [[ $REASON =~ \"code\":\ (1|4|10|13|14)[,\ ] ]] ||
    # 5xx, 429 and truncated answers
    [[ $REASON =~ "network connectivity issues"|\'status\':\ (5|429)|InvalidDataFromServerError|IncompleteRead ]] ||
    [[ $REASON =~ ConnectionError|"Connection "(reset|refused|aborted)|"establish a new connection"|"Max retries"|[Uu]nreachable ]] ||
    [[ $REASON =~ "Failed to resolve"|"name resolution"|"find the server"|"auth tokens"|"timed out"|[Tt]imeout|SSLE|TransportError ]] ||
    [[ $REASON =~ RemoteDisconnected|"Broken pipe"|"no answer within"|"an unexpected answer" ]]
}

# Whether WHAT itself was not found: a missing project, host or file says nothing about it.
is_absent() { # WHAT, such as queuedResources/NAME
  [[ $REASON =~ NOT_FOUND:.*/"$1"\' ]]
}

# Ends the script and says what to do about gcloud's REASON; with 42 if the error may pass.
explain() { # WHAT
  local what=$1 todo code=2
  case $REASON in
  "no file can be made"*) todo="free disk space, or set TMPDIR" ;;
  *"auth login"* | *"active account"* | *eauthentication* | *credentials* | *invalid_grant*) todo="log in: gcloud auth login" ;;
  *"not have permission"* | *PERMISSION_DENIED*locations* | *"Permission denied on 'locations"* | *"nvalid zone"* | *"nknown zone"*)
    todo="is ZONE=$ZONE right, and may your account use TPUs in $PROJECT? Zones: gcloud compute tpus locations list"
    ;;
  *PERMISSION_DENIED*) todo="your account needs the role TPU Admin in $PROJECT" ;;
  *uota*) todo="ask for quota of $TYPE ($TIER) in $ZONE, or take another zone or TIER" ;;
  *RESOURCE_EXHAUSTED* | *"no more capacity"*) todo="there is no capacity for $TYPE in $ZONE now; take another zone, or TIER=spot with VALID_FOR" ;;
  *ALREADY_EXISTS* | *"already exists"*) todo="NAME=$NAME is in use; take another, or delete that one: launch/tpu/delete.sh" ;;
  *ccelerator*ype*) todo="types in $ZONE: gcloud compute tpus accelerator-types list --zone=$ZONE" ;;
  *untime*ersion*) todo="runtimes in $ZONE: gcloud compute tpus versions list --zone=$ZONE" ;;
  *NOT_FOUND* | *"not found"*) todo="is it in ZONE=$ZONE, and created (launch/tpu/create.sh)? launch/tpu/status.sh shows what exists" ;;
  *) todo="see above, or ask gcloud with --verbosity=debug" ;;
  esac
  ! is_passing || { code=42 && todo="the network or the service is at fault; try again"; }
  fail "$code" "$what: ${REASON:0:240}; $todo"
}

# Asks the cloud about NAME in one query: sets its state in NOW (NONE if it does not exist), creation time in MADE, type
# in KIND, number of slices in COUNT, and owner in MARK. Fails without a valid answer. A resource that is being deleted
# may be described only by state and time; one that has had our label before is recognized by its creation time.
look() {
  local line='^([A-Z_]+),([0-9-]+T[0-9:.]+Z),([a-z0-9-]*),([0-9]*),([a-z0-9_-]*)$'
  NOW="" MADE="" KIND="" COUNT="" MARK=""
  if ! cloud queued-resources describe "$NAME" --format="$FIELDS"; then
    is_absent "queuedResources/$NAME" || return 1
    NOW=NONE
  elif [[ $(grep -E "$line" <<<"$OUTPUT") =~ $line ]]; then # gcloud has words of its own around it
    NOW=${BASH_REMATCH[1]} MADE=${BASH_REMATCH[2]} KIND=${BASH_REMATCH[3]} COUNT=${BASH_REMATCH[4]} MARK=${BASH_REMATCH[5]}
    [[ -z $KIND ]] || COUNT=${COUNT:-1}
    [[ -z $OWNER || $MARK != "$OWNER" ]] || keep_made
  elif [[ -z $DRY_RUN ]]; then
    REASON="an unexpected answer: '${OUTPUT:0:80}'"
    return 1
  fi
}

keep_made() {
  [[ $MADE == "$(recall "$STATE/made" "")" ]] || remember "$STATE/made" "$MADE"
}

# Sets OWNER, which identifies STATE by account, machine and a random number; resources created from here have it as the
# label meshlm. Only resources that have or had this label, or that --adopt took over, are set up, stopped or deleted.
know_owner() {
  local file=$STATE/owner who
  if [[ ! -e $file ]]; then
    who=$(printf '%s-%s' "${USER:-user}" "${HOSTNAME%%.*}" | tr '[:upper:]' '[:lower:]' | tr -c 'a-z0-9' -)
    (set -o noclobber && printf '%s-%s' "${who:0:40}" "$(od -An -N6 -tx1 /dev/urandom | tr -d ' \n')" >"$file") 2>/dev/null || true
  fi
  OWNER=$(<"$file")
  [[ $OWNER =~ ^[-a-z0-9]{14,63}$ ]] || fail 2 "$file is damaged; remove it, and take what is yours over with --adopt"
}

is_ours() {
  [[ -n $OWNER && $MARK == "$OWNER" || -n $MADE && $MADE == "$(recall "$STATE/made" "")" ]]
}

# Ends the script unless NAME is ours, or becomes ours by --adopt.
check_ours() {
  [[ -z $ADOPT ]] || is_ours || adopt
  is_ours || fail 2 "$NAME in $ZONE of $PROJECT was not made from here (label meshlm: ${MARK:-none}), so it is left as it is; take another NAME, or, if only you use it, take it over: the same command with --adopt"
}

adopt() {
  cloud queued-resources describe "$NAME" --format='value(tpu.nodeSpec[0].nodeId,tpu.nodeSpec[0].multisliceParams.nodeIdPrefix)' ||
    explain "cannot ask for the machines of $NAME"
  [[ $OUTPUT =~ ^[[:space:]]*"$NAME"[[:space:]]*$ ]] ||
    fail 2 "the machines of $NAME are called '${OUTPUT//[[:space:]]/}', and only those called $NAME can be taken over"
  keep_made
}

# Ends the script unless NAME has the requested type and number of slices.
check_kind() {
  [[ -z $KIND || "$COUNT x $KIND" == "$SLICES x $TYPE" ]] ||
    fail 2 "NAME=$NAME is in use, by $COUNT x $KIND; take another for your $SLICES x $TYPE, or delete that one: launch/tpu/delete.sh"
}

# Ends the script unless NAME exists.
find_name() {
  look || explain "cannot ask for $NAME"
  [[ $NOW != NONE ]] || fail 2 "there is no $NAME in $ZONE of $PROJECT; launch/tpu/create.sh asks for it, status.sh shows what exists"
}

# Ends the script unless NAME exists and is ours.
need() {
  know_owner
  find_name
  [[ -n $DRY_RUN ]] || check_ours
}

# Prints what is billing, or will be, one per line: queued resources that are not dead, and machines that are not gone.
billing() {
  cloud queued-resources list --format='csv[no-heading](name.basename(),state.state)' || explain "cannot list queued resources"
  grep -vE ',(FAILED|SUSPENDED)$' <<<"$OUTPUT" | grep . | sed 's/,/ /; s/^/queued resource /' || true
  cloud tpu-vm list --format='csv[no-heading](name.basename(),state)' || explain "cannot list TPU VMs"
  grep -vE ',(PREEMPTED|TERMINATED|STOPPED|DELETING)$' <<<"$OUTPUT" | grep . | sed 's/,/ /; s/^/TPU VM /' || true
}
