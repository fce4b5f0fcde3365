#!/usr/bin/env bash
# Keeps a run going for weeks: creates the machines, sets them up, starts the command, and starts over with new machines
# when these are taken away. It ends, and deletes the machines,
#   with 0          when the run is done,
#   with its code   when the command must not be restarted (any code except 42, 1, and 128 and above, but also 130), or
#                   three attempts made no new checkpoint,
#   with 42         after --max_hours of babysitting, when the run has saved; and after five requests in a row that
#                   brought no machines.
# It also ends with 42 if the machines are not known to be deleted: the same command tries again to delete them. It
# sets up, stops and deletes only machines that were created from here (label meshlm) or taken over. It never acts on
# missing information: each action rests on what the cloud and the workers have said in the same round.
# Ctrl-C ends only this script: the run continues, and the same command watches it again.
#   launch/tpu/babysit.sh [--max_hours=N] [--poll_s=30] [--keep] [settings] [--dry_run] -- python -m launch.train …
#     --keep        keeps the machines at the end; they keep billing
#     --new_code    uses the present code from the next attempt on, not that of the first start of this command
#     --adopt       takes over the present NAME, which was not created from here
set -euo pipefail
HERE=$(dirname "$(readlink -f "$0")")
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$HERE/tpu.sh"
# shellcheck source-path=SCRIPTDIR source=lives.sh
source "$HERE/lives.sh"
POLL_S=30 MAX_HOURS=0 KEEP="" NEW_CODE="" LIVES=3 REQUESTS=5
LOST_S=${MESHLM_LOST_S:-900} # a worker that has not answered for this long is given up
begin poll_s max_hours "keep?" "new_code?" "adopt?" -- "$@"
check_command
ROUND_S=$((10#${POLL_S%.*} + 300)) # limit for one round: if it seems longer, the clock was set or this machine slept

# Runs another script of this folder with the settings of this one: tpu.env is read once.
tpu() { # NAME ARGUMENT...
  local name words=(--env=) code=0
  for name in "${SETTINGS[@]}"; do words+=("--${name,,}=${!name}"); done
  "$HERE/$1.sh" "${words[@]}" ${DRY_RUN:+--dry_run} "${@:2}" 9>&- &
  wait $! || code=$?
  return "$code"
}

if [[ -n $DRY_RUN ]]; then
  tpu create
  tpu wait
  tpu setup
  tpu run -- "${COMMAND[@]}"
  [[ -n $KEEP ]] || tpu delete
  exit
fi

take_name
know_owner

# State kept until this command is done: its age, in seconds of babysitting; its best step, and the attempts
# without a better one; whether an attempt is in progress (begun, or perhaps); what was requested, and how often since
# there were last machines; and the code of its first start.
TOLD=("$BUCKET" "$NFS" "${COMMAND[@]}")
MINE=$(quote "${TOLD[@]}" | git hash-object --stdin) || fail 2 "git does not work here, as it says above"
MINE=$STATE/commands/$MINE
CODE=$MINE/code.tgz
mkdir -p "$MINE"

# The terminal or the reader of stderr may be gone: the log has everything, and a broken pipe ends nothing.
trap '' PIPE
shown=""
log() { # TEXT
  printf '%s %s\n' "$(date '+%F %T')" "$1" >>"$STATE/babysit.log" || true
}
note() { # TEXT: logs it, and shows it as the current status line
  log "$1"
  if [[ -t 2 ]]; then
    printf '\r\e[K%s %s' "$(date +%T)" "$1" >&2 || true
  elif [[ $1 != "$shown" ]]; then
    say "$(date +%T) $1"
  fi
  shown=$1
}
tell() { # TEXT: logs it, and prints it on a line that stays
  log "$1"
  [[ ! -t 2 ]] || say ""
  say "$1"
}

# CLOCK counts seconds, and STEP is the part of this round: the machine's clock, which SECONDS follows, may be set.
CLOCK=0 STEP=0 seconds_before=$SECONDS
tick() {
  STEP=$((SECONDS - seconds_before))
  seconds_before=$SECONDS
  ((STEP >= 0)) || STEP=0
  ((STEP <= ROUND_S)) || STEP=$ROUND_S
  CLOCK=$((CLOCK + STEP))
}

# The end

named=""
known="" # the state of NAME in the last round; empty if it is not known

# Whatever ends this script, the script names what may keep billing.
leave() {
  trap '' "${SIGNALS[@]}"
  end_jobs
  if [[ $known == ACTIVE ]]; then
    named=1
    tell "$NAME in $ZONE of $PROJECT keeps running, and billing; watch it again with the same command, or end it: launch/tpu/stop.sh, delete.sh"
  fi
  exit 42
}
MAY_BE_THERE="$NAME in $ZONE of $PROJECT may exist, and may be billing: launch/tpu/status.sh; launch/tpu/delete.sh ends it"
last_words_of_ours() {
  local code=$?
  tidy
  [[ -n $named || $known == NONE && ! -s $MINE/asked ]] || tell "$MAY_BE_THERE"
  [[ -n $named || $code != 1 ]] || code=42 # 1 is not the run's code, but that of a full disk or the like
  exit "$code"
}
trap leave "${SIGNALS[@]}"
trap last_words_of_ours EXIT

finish() { # CODE TEXT
  local code=$1 reason="" kept=""
  last_words
  [[ $code =~ ^(0|42)$ || -z $LOGS ]] || reason=$(grep -hm1 ^error "$LOGS"/*.txt | head -n 1 || true)
  tell "$2${reason:+: $reason}"
  if [[ -n $KEEP ]]; then
    as_job billing >"$STATE/billing" &
    wait $! || true
    tell "$NAME in $ZONE of $PROJECT keeps billing, because of --keep; still billing in $ZONE:"$'\n'"$(<"$STATE/billing")"
  elif ! delete; then
    tell "DELETE IT YOURSELF: $NAME in $ZONE of $PROJECT keeps billing (launch/tpu/delete.sh, or the same command again)"
    ((code)) || code=42
    kept=1
  elif [[ $known == NONE && -s $MINE/asked ]]; then
    tell "$MAY_BE_THERE"
  fi
  named=1
  rm -f "$MINE"/{age,best,fruitless,asked,requests}
  [[ -n $kept ]] || rm -f "$MINE/alive" # else the same command continues the end of this attempt
  ((code)) || rm -rf "$MINE"
  exit "$code"
}

# Tries to delete NAME for up to LOST_S, until it is known that nothing of ours is left.
delete() {
  local end=$((CLOCK + LOST_S))
  while true; do
    if look; then
      is_ours || return 0
      ! tpu delete || return 0
    fi
    tick
    ((CLOCK < end)) || return 1
    nap "$POLL_S"
  done
}

# Rounds

# Whether WHAT has failed for LOST_S and at least three times, counting only rounds about which something is known.
failing="" failing_s=0 failing_times=0
too_long() { # WHAT
  if [[ $failing == "$1 $MADE" ]]; then
    failing_s=$((failing_s + STEP)) failing_times=$((failing_times + 1))
  else
    failing="$1 $MADE" failing_s=0 failing_times=1
  fi
  ((failing_times >= 3 && failing_s >= LOST_S))
}

# Asks for new machines only after a worker has been silent for long.
lost() {
  note "a worker does not answer; step $(best)"
  too_long silence || return 0
  ! over || finish 42 "ended after $MAX_HOURS hours, while a worker has not answered for $LOST_S s; the same command resumes from step $(best)"
  remember "$MINE/alive" begun # also if it never began, so that machines that are lost repeatedly count as attempts
  replace "a worker has not answered for $LOST_S s"
}

# Deletes dead machines; the next round asks for new ones.
replace() { # WHY
  if [[ -s $MINE/alive ]]; then count_life 42 "$1"; else note "$1: new machines"; fi
  tpu delete || note "$1, and not deleted yet"
}

# Handles a request that the cloud has given up, as after VALID_FOR, or whose machines were taken away.
failed() {
  local why="" requests
  requests=$(recall "$MINE/requests" 0)
  [[ $NOW != FAILED ]] || ! cloud queued-resources describe "$NAME" --format='value(state.failedData.error.message)' ||
    why=$(tr -s '[:space:]' ' ' <<<"${OUTPUT:0:240}")
  ((requests < REQUESTS)) || finish 42 "$REQUESTS requests have brought no machines; the last is $NOW${why:+: $why}"
  replace "it is $NOW${why:+: $why}"
}

over() {
  awk -v age="$(recall "$MINE/age" 0)" "BEGIN { exit !($MAX_HOURS > 0 && age > 3600 * $MAX_HOURS) }"
}

# Asks the run to save; if that fails, asks again in each round, for LOST_S at most.
stop_at_the_end() {
  note "$MAX_HOURS hours have passed: the run saves"
  [[ $NOW != ACTIVE ]] || tpu stop || too_long stopping || return 0
  finish 42 "ended after $MAX_HOURS hours; the same command resumes from step $(best)"
}

check_mine() {
  is_ours || [[ -n $ADOPT ]] || named=1 # another user's machines are not a cost of this run
  check_ours
  [[ ! $NOW =~ ^(CREATING|ACCEPTED|WAITING_FOR_RESOURCES|PROVISIONING|ACTIVE)$ ]] || check_kind
}

# Called if the machines exist and are ours. Their command may be another user's, so this first asks what runs there.
attend() {
  rm -f "$MINE/requests"
  watch
  [[ $FOUND =~ ^(lost|unknown)$ || $failing != silence* ]] || failing=""
  case $FOUND in
  unknown)
    note "it is not known what the workers do; step $(best)"
    over && too_long asking || return 0
    if [[ $(recall "$MINE/seen" "") != "$MADE" ]]; then # an unknown command may be another user's run
      named=1
      fail 42 "$MAX_HOURS hours have passed, and it is not known what runs on $NAME, which KEEPS BILLING: launch/tpu/status.sh; delete.sh ends it"
    fi
    finish 42 "ended after $MAX_HOURS hours, and the run could not be asked to save; the same command resumes from step $(best)"
    ;;
  lost) lost ;;
  other) fail 2 "$NAME runs another command; end it with launch/tpu/stop.sh and start again, or take another NAME" ;;
  done) finish 0 "done at step $(best)" ;;
  *) keep_running ;;
  esac
}

keep_running() {
  local code=${FOUND#ended }
  if [[ $FOUND == ended\ * && -s $MINE/alive ]] && ! may_restart "$code"; then # else it was reported before, and fixed
    finish "$code" "the command ended with $code, which a restart does not fix"
  fi
  if over; then
    stop_at_the_end
    return
  fi
  case $FOUND in
  running)
    failing=""
    remember "$MINE/seen" "$MADE" # these machines have run this command
    remember "$MINE/alive" begun
    note "running, step $(best)"
    ;;
  none)
    [[ $(recall "$MINE/alive" "") != begun ]] || count_life 42 "it has vanished"
    begin_life
    ;;
  *)
    life_ended "$code" "exit code $code"
    begin_life
    ;;
  esac
}

# An error of the first request ends the script, because the settings are wrong; later requests are tried again.
ask() {
  local code=0 kind="$SLICES x $TYPE, $TIER" before requests
  before=$(recall "$MINE/asked" "") requests=$(recall "$MINE/requests" 0)
  note "asking for $kind"
  ((requests == 0)) || nap $((RETRY_S << requests))
  [[ $before == "$kind" ]] || remember "$MINE/asked" perhaps # this script may be killed meanwhile
  tpu create || code=$?
  if ((code == 0 || code == 42)); then
    remember "$MINE/asked" "$kind"
    ((code)) || remember "$MINE/requests" $((requests + 1))
  elif [[ $before != "$kind" ]]; then
    ! look || is_ours || named=1 # nothing exists, or it belongs to another user
    [[ -z $named ]] || rm -f "$MINE/asked"
    exit "$code"
  fi
}

one_round() {
  known=$NOW
  remember "$MINE/age" $(($(recall "$MINE/age" 0) + STEP))
  if [[ -z $NOW ]]; then
    note "no answer from the cloud: ${REASON:0:240}"
    return
  fi
  if [[ $NOW != NONE ]]; then check_mine; fi
  [[ -n $code_name ]] || keep_code
  if [[ $NOW == ACTIVE ]]; then
    attend
    return
  fi
  ! over || stop_at_the_end
  case $NOW in
  NONE) ask ;;
  FAILED | SUSPENDED) failed ;;
  CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | SUSPENDING | DELETING) note "$NAME is $NOW" ;;
  *) note "$NAME is $NOW; waiting, perhaps forever; launch/tpu/delete.sh ends it" ;;
  esac
}

# Wrong settings or a wrong login end the script now. --adopt takes what exists now, and nothing later.
look || { [[ -z $ADOPT ]] && is_passing; } || explain "cannot ask for $NAME"
while true; do
  one_round
  ADOPT=""
  nap "$POLL_S"
  look || true
  tick
done
