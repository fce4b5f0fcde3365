#!/usr/bin/env bash
# Keeps a run going for weeks: makes the machines, sets them up, starts the command, and begins again with new ones when
# they are taken away. It ends, and deletes the machines,
#   with 0          when the run is done,
#   with its code   when the command must not be started again (2, 3, 4, 130), or three lives brought no new checkpoint,
#   with 42         after --max_hours; the run has saved.
# With 42 also if the machines are not known to be deleted: the same command goes on with that. It sets up, stops and
# deletes only what was made from here (label meshlm). What it does not know is no reason to do anything.
# Ctrl-C ends only this script: the run goes on, and the same command watches it again.
#   launch/tpu/babysit.sh [--max_hours=N] [--poll_s=30] [--keep] [settings] [--dry_run] -- python -m launch.train …
#     --keep        leaves the machines at the end; they go on costing
#     --new_code    from the next life on with the code of now, and not that of the first start of this command
#     --adopt       takes over NAME, which is there, and was not made from here
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$0")/tpu.sh"
HERE=$(dirname "$0")
POLL_S=30 MAX_HOURS=0 KEEP="" NEW_CODE="" LIVES=3
LOST_S=${MESHLM_LOST_S:-900} # a worker that does not answer for so long is not waited for
begin poll_s max_hours "keep?" "new_code?" "adopt?" -- "$@"
check_command

# Another script of this folder, with the settings of this one: tpu.env is read once.
tpu() { # NAME ARGUMENT...
  local name words=(--env=) code=0
  for name in "${SETTINGS[@]}"; do words+=("--${name,,}=${!name}"); done
  "$HERE/$1.sh" "${words[@]}" ${DRY_RUN:+--dry_run} "${@:2}" 9>&- &
  child=$!
  wait "$child" || code=$?
  child=""
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

# Of this command, and kept until it is done: the time it began, its best step, lives without a better one; whether a life
# is under way; and the code of its first start.
TOLD=("$BUCKET" "$NFS" "${COMMAND[@]}")
MINE=$STATE/commands/$(quote "${TOLD[@]}" | git hash-object --stdin)
CODE=$MINE/code.tgz
mkdir -p "$MINE"
[[ -s $MINE/began ]] || remember "$MINE/began" "$(date +%s)"

shown=""
note() { # TEXT: a line in the log, and the one that is shown
  printf '%s %s\n' "$(date '+%F %T')" "$1" >>"$STATE/babysit.log"
  if [[ -t 2 ]]; then printf '\r\e[K%s %s' "$(date +%T)" "$1" >&2; elif [[ $1 != "$shown" ]]; then say "$(date +%T) $1"; fi
  shown=$1
}

# The end

child="" named=""

# Whatever ends this script, what may go on costing is named.
leave() {
  [[ ! -t 2 ]] || printf '\n' >&2
  [[ -z $child ]] || kill "$child" 2>/dev/null || true
  named=1
  say "$NAME in $ZONE of $PROJECT goes on, and on costing; watch it again with the same command, or end it: launch/tpu/stop.sh, delete.sh"
  exit 42
}
last_words_of_ours() {
  tidy
  [[ -n $named || ${NOW:-NONE} == NONE && ! -s $MINE/asked ]] || say "$NAME in $ZONE of $PROJECT may be there, and cost: launch/tpu/status.sh"
}
trap leave INT TERM HUP
trap last_words_of_ours EXIT

finish() { # CODE TEXT
  local code=$1
  note "$2"
  [[ ! -t 2 ]] || printf '\n' >&2
  if [[ -n $KEEP ]]; then
    say "$NAME in $ZONE of $PROJECT goes on costing, because of --keep; still billing in $ZONE:"$'\n'"$(billing)"
  elif ! delete; then
    say "DELETE IT YOURSELF: $NAME in $ZONE of $PROJECT goes on costing (launch/tpu/delete.sh, or the same command again)"
    ((code)) || code=42
  fi
  named=1
  rm -f "$MINE"/{began,best,fruitless,alive,asked}
  ((code)) || rm -rf "$MINE"
  exit "$code"
}

# Tried until it is known that nothing of ours is there, LOST_S at most.
delete() {
  local end=$((SECONDS + LOST_S))
  while true; do
    if look; then
      is_ours || return 0
      ! tpu delete || return 0
    fi
    ((SECONDS < end)) || return 1
    nap "$POLL_S"
  done
}

# Lives

# Counts a life that has ended; too many without a new step are the end.
count_life() { # CODE HOW
  local fruitless
  rm -f "$MINE/alive"
  last_words
  fruitless=$(($(recall "$MINE/fruitless" 0) + 1))
  remember "$MINE/fruitless" "$fruitless"
  note "life ended: $2; step $(best), $fruitless without a new one"
  ((fruitless < LIVES)) || finish "$1" "$LIVES lives without a new checkpoint; the last words of the workers: $STATE/logs"
}

life_ended() { # CODE HOW
  [[ ! -s $MINE/alive ]] || count_life "$@"
}

# Puts the end of every worker's log into STATE/logs, if there is a machine to have it from.
last_words() {
  local code=0
  [[ $NOW == ACTIVE ]] || return 0
  on_workers 60 bash meshlm/launch/tpu/worker.sh log 200 || code=$?
  ((code < 2)) || return 0 # which workers there are is not known
  rm -rf "$STATE/logs"
  cp -r "$ANSWERS" "$STATE/logs"
}

best() { recall "$MINE/best" 0; }

seen_step() { # STEP
  (($1 > $(best))) || return 0
  remember "$MINE/best" "$1"
  remember "$MINE/fruitless" 0
}

# Sets the machines up, which is little if they are, and starts the command. That a worker does not answer ends no life.
begin_life() {
  local code=0
  note "setting up"
  tpu setup --code="$CODE" || code=$?
  if ((code == 0)); then
    found_again # all have answered
    note "starting at step $(best)"
    remember "$MINE/alive" 1
    tpu run -- "${COMMAND[@]}" || code=$?
  fi
  case $code in
  0) ;;
  42) lost ;;
  *) ! look || [[ $NOW != ACTIVE ]] || count_life 2 "it could not be started" ;;
  esac
}

code_name=""
keep_code() {
  local kept
  if [[ -n $NEW_CODE || ! -s $CODE ]]; then
    (cd "$HERE/../.." && snapshot "$CODE")
    read -r kept code_name <"$CODE.txt" || true
    note "code of $code_name"
  else
    read -r kept code_name <"$CODE.txt" || true
    [[ $(cd "$HERE/../.." && tree) == "$kept" ]] ||
      note "code of $code_name, as at the first start of this command; here it is another now, which --new_code takes"
  fi
}

# What the workers say, in FOUND: running, done, "ended CODE" with the most telling code, none, other (something else
# runs there), or lost if one of them gives no answer that is one.
watch() {
  local file status code step worst="" all=" " answer='^((running|none|other) |exited ([0-9]+) )(0|[1-9][0-9]{0,15})$'
  FOUND=lost
  ask_workers 60 status "${TOLD[@]}" || return 0
  for file in "$ANSWERS"/*.txt; do
    [[ $(grep -E "$answer" "$file" | tail -n 1) =~ $answer ]] || return 0 # gcloud has words of its own around it
    status=${BASH_REMATCH[2]:-exited} code=${BASH_REMATCH[3]} step=${BASH_REMATCH[4]}
    [[ $status$code != exited0 ]] || status="done"
    all+="$status "
    [[ $status == other ]] || seen_step "$step"
    [[ $status != exited ]] || [[ -n $worst && ! $code =~ ^(2|3|4|130)$ ]] || worst=$code
  done
  case $all in
  *" other "*) FOUND=other ;;
  *" exited "*) FOUND="ended $worst" ;;
  *" running "*) FOUND=running ;;
  *" none "*) FOUND=none ;;
  *) FOUND="done" ;;
  esac
}

# Rounds

lost_since="" lost_times=0
found_again() { lost_since="" lost_times=0; }

# Not the first time, nor after a pause in which nobody asked: new machines only when a worker is long gone.
lost() {
  note "a worker does not answer; step $(best)"
  lost_since=${lost_since:-$SECONDS} lost_times=$((lost_times + 1))
  ((lost_times >= 3 && SECONDS - lost_since >= LOST_S)) || return 0
  remember "$MINE/alive" 1 # also if it never began: what is lost again and again has an end
  replace "a worker has not answered for $LOST_S s"
}

# Deletes what is dead; the next round asks for new machines.
replace() { # WHY
  found_again
  life_ended 42 "$1"
  tpu delete || note "$1, and not deleted yet"
}

over() {
  [[ $MAX_HOURS != 0 ]] && awk "BEGIN { exit !($(date +%s) - $(recall "$MINE/began" 0) > 3600 * $MAX_HOURS) }"
}

# A run that could not be told to save is told so again, as long as a worker may be silent.
stop_at_the_end() {
  note "$MAX_HOURS hours are over: the run saves"
  if [[ $NOW == ACTIVE ]] && ! tpu stop; then
    lost_since=${lost_since:-$SECONDS}
    ((SECONDS - lost_since >= LOST_S)) || return 0
  fi
  finish 42 "ended after $MAX_HOURS hours; the same command goes on from step $(best)"
}

check_mine() {
  is_ours || [[ -n $ADOPT ]] || named=1 # what is another's is no cost of this run
  check_ours
  ADOPT="" # once
  [[ ! $NOW =~ ^(CREATING|ACCEPTED|WAITING_FOR_RESOURCES|PROVISIONING|ACTIVE)$ ]] || check_kind
}

# The machines are there.
attend() {
  if [[ -e $STATE/new ]]; then FOUND=none; else watch; fi
  [[ $FOUND =~ ^(lost|none)$ ]] || found_again
  case $FOUND in
  running)
    [[ -s $MINE/alive ]] || remember "$MINE/alive" 1
    note "running, step $(best)"
    ;;
  done) finish 0 "done at step $(best)" ;;
  none) begin_life ;;
  lost) lost ;;
  other) fail 2 "$NAME runs another command; launch/tpu/stop.sh ends it, and then the same command; or take another NAME" ;;
  ended\ [234] | "ended 130")
    last_words
    finish "${FOUND#ended }" "the command ended with ${FOUND#ended }, which a restart does not mend: $(cat "$STATE"/logs/* | grep -m1 ^error: || true)"
    ;;
  *)
    life_ended "${FOUND#ended }" "exit code ${FOUND#ended }"
    begin_life
    ;;
  esac
}

# The first request ends at what is wrong with the settings; later it is tried again.
ask() {
  local code=0
  note "asking for $SLICES x $TYPE"
  tpu create || code=$?
  if ((code == 0 || code == 42)); then
    remember "$MINE/asked" 1
  elif [[ ! -s $MINE/asked ]]; then
    ! look || is_ours || named=1 # there is nothing, or it is another's
    exit "$code"
  fi
}

go_on() {
  if [[ -z $NOW ]]; then
    note "no answer from the cloud: ${REASON:0:240}"
    found_again
    return
  fi
  if [[ $NOW != NONE ]]; then check_mine; fi
  [[ -n $code_name ]] || keep_code
  if over; then
    stop_at_the_end
    return
  fi
  case $NOW in
  NONE) ask ;;
  FAILED | SUSPENDED) replace "it is $NOW" ;;
  ACTIVE) attend ;;
  *) note "$NAME is $NOW" ;;
  esac
}

look || is_passing || explain "cannot ask for $NAME" # what is wrong with the settings or the login ends it now
while true; do
  go_on
  nap "$POLL_S"
  look || true
done
