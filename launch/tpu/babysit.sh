#!/usr/bin/env bash
# Keeps a run going for weeks: makes the machines, sets them up, starts the command, and begins again with new ones when
# they are taken away. It ends, and deletes the machines,
#   with 0          when the run is done,
#   with its code   when the command must not be started again (2, 3, 4, 130), or three lives brought no new checkpoint,
#   with 42         after --max_hours; the run has saved.
# Ctrl-C ends only this script: the run goes on, and the same command watches it again.
#   launch/tpu/babysit.sh [--max_hours=N] [--poll_s=30] [--keep] [settings] [--dry_run] -- python -m launch.train …
#     --keep     leaves the machines at the end; they go on costing
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$0")/tpu.sh"
HERE=$(dirname "$0")
POLL_S=30 MAX_HOURS=0 KEEP="" LIVES=3
LOST_S=${MESHLM_LOST_S:-900} # a worker that does not answer for so long is not waited for
begin poll_s max_hours "keep?" -- "$@"
check_command
settings=()
for name in "${SETTINGS[@]}"; do [[ -z ${!name} ]] || settings+=("--${name,,}=${!name}"); done

tpu() { "$HERE/$1.sh" "${settings[@]}" ${DRY_RUN:+--dry_run} "${@:2}"; }

if [[ -n $DRY_RUN ]]; then
  tpu create
  tpu wait
  tpu setup
  tpu run -- "${COMMAND[@]}"
  [[ -n $KEEP ]] || tpu delete
  exit
fi

exec 9>"$STATE/babysitter"
flock -n 9 || fail 2 "another babysitter has $NAME; its log: $STATE/babysit.log"

# What outlives this script, a word a file: the time it began, the best step, lives without a better one, and which
# machines (by their time of creation) are set up; and whether a life is under way.
recall() { # NAME DEFAULT
  if [[ -s $STATE/$1 ]]; then cat "$STATE/$1"; else printf '%s' "$2"; fi
}
remember() { # NAME VALUE
  printf '%s' "$2" >"$STATE/$1.new"
  mv "$STATE/$1.new" "$STATE/$1"
}
forget() {
  rm -f "$STATE"/{began,best,fruitless,ready,alive,asked,command}
}

# Another command is another run, with lives of its own.
if [[ $(recall command "") != "$(quote "${COMMAND[@]}")" ]]; then
  forget
  remember command "$(quote "${COMMAND[@]}")"
fi
[[ -s $STATE/began ]] || remember began "$(date +%s)"

note() { # TEXT: a line in the log, and the one that is shown
  printf '%s %s\n' "$(date '+%F %T')" "$1" >>"$STATE/babysit.log"
  if [[ -t 2 ]]; then printf '\r\e[K%s %s' "$(date +%T)" "$1" >&2; elif [[ $1 != "${shown:-}" ]]; then say "$(date +%T) $1"; fi
  shown=$1
}

finish() { # CODE TEXT
  note "$2"
  [[ ! -t 2 ]] || printf '\n' >&2
  trap - INT TERM
  if [[ -n $KEEP ]]; then
    say "still billing in $ZONE:"$'\n'"$(billing)"
  else
    tpu delete || say "DELETE IT YOURSELF: $NAME in $ZONE of $PROJECT goes on costing"
  fi
  forget
  exit "$1"
}

leave() {
  [[ ! -t 2 ]] || printf '\n' >&2
  say "$NAME goes on, and on costing; watch it again with the same command, or end it: launch/tpu/stop.sh, delete.sh"
  exit 42
}
trap leave INT TERM HUP

# Fetches the end of every worker's log while there is a machine to have it from.
last_words() {
  [[ $now != ACTIVE ]] || (on_workers 60 bash meshlm/launch/tpu/worker.sh log 200) || true
}

# Counts a life that has ended, once; too many without a new step are the end of it.
life_ended() { # CODE HOW
  local fruitless
  [[ -s $STATE/alive ]] || return 0
  rm "$STATE/alive"
  last_words
  fruitless=$(($(recall fruitless 0) + 1))
  remember fruitless "$fruitless"
  note "life ended: $2; step $(recall best 0), $fruitless without a new one"
  ((fruitless < LIVES)) || finish "$1" "$LIVES lives without a new checkpoint; the last words of the workers: $STATE/logs"
}

seen_step() { # STEP
  (($1 > $(recall best 0))) || return 0
  remember best "$1"
  remember fruitless 0
}

created() {
  cloud queued-resources describe "$NAME" --format='value(createTime)' || return 1
  printf '%s' "$OUTPUT"
}

# Sets the machines up and starts the command, where they are new or it does not run.
begin_life() {
  local now
  remember alive 1
  now=$(created) || return 1
  if [[ $(recall ready "") != "$now" ]]; then
    note "setting up"
    tpu setup || return 1
  fi
  remember ready "$now"
  note "starting at step $(recall best 0)"
  tpu run -- "${COMMAND[@]}"
}

# What the workers say: running, done, "ended CODE" with the most telling code, none, or lost where one does not answer.
watch() {
  local file status code step worst="" any_running="" any_none="" done=0 count=0
  on_workers 60 bash meshlm/launch/tpu/worker.sh status || {
    printf lost
    return
  }
  for file in "$STATE"/logs/"$NAME"*.txt; do
    read -r status code step < <(tail -n 1 "$file" | sed 's/^\(running\|none\) /\1 - /')
    count=$((count + 1))
    seen_step "${step:-0}"
    case $status in
    running) any_running=1 ;;
    exited)
      if [[ $code == 0 ]]; then
        done=$((done + 1))
      elif [[ -z $worst || $code =~ ^(2|3|4|130)$ ]]; then
        worst=$code
      fi
      ;;
    *) any_none=1 ;;
    esac
  done
  if [[ -n $worst ]]; then
    printf 'ended %s' "$worst"
  elif ((done == count)); then
    printf 'done'
  elif [[ -n $any_running ]]; then
    printf 'running'
  elif [[ -n $any_none ]]; then
    printf 'none'
  fi
}

over() {
  [[ $MAX_HOURS != 0 ]] && awk "BEGIN { exit !($(date +%s) - $(recall began 0) > 3600 * $MAX_HOURS) }"
}

# Deletes what is dead; the next round asks for new machines.
replace() { # WHY
  life_ended 42 "$1"
  rm -f "$STATE/ready"
  tpu delete || note "$1, and not deleted yet"
}

lost_since=$SECONDS
now=$(state) # what is wrong with the settings or the login ends it now; later it is tried again
while true; do
  if over; then
    note "$MAX_HOURS hours are over: the run saves"
    [[ $now != ACTIVE ]] || tpu stop || true
    finish 42 "ended after $MAX_HOURS hours; the same command goes on from step $(recall best 0)"
  fi
  case $now in
  NONE)
    note "asking for $SLICES x $TYPE"
    rm -f "$STATE/ready"
    tpu create || [[ -s $STATE/asked ]] || exit 2
    remember asked 1
    ;;
  FAILED | SUSPENDED) replace "it is $now" ;;
  ACTIVE)
    if [[ -s $STATE/ready ]]; then found=$(watch) || found=lost; else found=none; fi
    [[ $found == lost ]] || lost_since=$SECONDS
    case $found in
    running) note "running, step $(recall best 0)" ;;
    done) finish 0 "done at step $(recall best 0)" ;;
    none) begin_life || life_ended 2 "it could not be started" ;;
    lost)
      note "a worker does not answer; step $(recall best 0)"
      ((SECONDS - lost_since < LOST_S)) || replace "a worker has not answered for $LOST_S s"
      ;;
    "ended "*)
      code=${found#ended }
      if [[ $code =~ ^(2|3|4|130)$ ]]; then
        last_words
        finish "$code" "the command ended with $code, which a restart does not mend: $(first_line "$(grep -hs ^error: "$STATE"/logs/*)")"
      fi
      life_ended "$code" "exit code $code"
      begin_life || life_ended 2 "it could not be started"
      ;;
    esac
    ;;
  *) note "$NAME is $now" ;;
  esac
  sleep "$POLL_S" &
  wait $! # so that a signal is taken up at once
  now=$(state) || now="not known: no answer from the cloud"
done
