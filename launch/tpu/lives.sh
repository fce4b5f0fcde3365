# shellcheck shell=bash
# The attempts of a command on the workers of NAME, for babysit.sh: starts an attempt, asks the workers for its state,
# counts it at its end. babysit.sh sources this; it runs nothing.
# shellcheck disable=SC2034,SC2153 # babysit.sh shares its variables

# Counts an attempt that has ended; ends the script after too many without a new step.
count_life() { # CODE HOW
  local fruitless
  fruitless=$(($(recall "$MINE/fruitless" 0) + 1))
  failing=""
  rm -f "$MINE/alive"
  remember "$MINE/fruitless" "$fruitless"
  note "attempt ended: $2; step $(best), $fruitless without a new one"
  ((fruitless < LIVES)) || finish "$1" "$LIVES attempts without a new checkpoint; the last output of the workers: $STATE/logs"
  last_words
}

life_ended() { # CODE HOW
  [[ ! -s $MINE/alive ]] || count_life "$@"
}

# Copies the end of the log of each worker that answers to LOGS, a new folder below STATE/logs; LOGS is empty if no
# worker answers.
last_words() {
  local worker
  LOGS=""
  [[ $NOW == ACTIVE ]] || return 0
  on_workers 60 bash meshlm/launch/tpu/worker.sh log 200 || (($? == 1)) || return 0
  for worker in "${!CODES[@]}"; do
    [[ ${CODES[$worker]} == 0 ]] || continue
    LOGS=${LOGS:-$STATE/logs/$(date '+%F-%H%M%S')}
    mkdir -p "$LOGS"
    cp "$ANSWERS/$worker.txt" "$LOGS"
  done
}

best() { recall "$MINE/best" 0; }

seen_step() { # STEP
  local before
  before=$(best) # not inside (( )), because a signal may have ended the subshell
  (($1 > before)) || return 0
  remember "$MINE/best" "$1"
  remember "$MINE/fruitless" 0
}

# Sets the machines up, which is quick if they were set up before, and starts the command. A failure of this counts as
# an attempt only if a worker has reported it (2), or if it has lasted for LOST_S. Only machines that are silent or were
# taken away are replaced.
begin_life() {
  local code=0
  note "setting up"
  tpu setup --code="$CODE" || code=$?
  if ((code == 0)); then
    note "starting at step $(best)"
    remember "$MINE/alive" perhaps
    tpu run -- "${COMMAND[@]}" || code=$?
    ((code)) || remember "$MINE/alive" begun
  fi
  case $code in
  0) ;;
  2) ! look || ! is_ours || [[ $NOW != ACTIVE ]] || count_life 2 "it could not be started" ;;
  *)
    note "it is not known to have started; step $(best)"
    ! too_long starting || count_life 42 "it could not be started for $LOST_S s"
    ;;
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
      note "code of $code_name, from the first start of this command; the code here differs: --new_code uses it"
  fi
}

# Sets FOUND to what the workers report: running, done, "ended CODE" with the most informative code, none, or other
# (another command runs there); lost if a worker is silent or gone; unknown if it is not known for another reason.
watch() {
  local worker file status code step worst="" all=" "
  FOUND=unknown
  ask_workers 60 status "${TOLD[@]}" || (($? == 1)) || {
    [[ ! -e $ANSWERS/absent ]] || FOUND=lost
    return 0
  }
  for worker in "${!CODES[@]}"; do
    status=unknown code=${CODES[$worker]} file=$ANSWERS/$worker.txt
    if is_silent "$code" "$file"; then
      status=silent
    elif [[ $code == 0 && $(said "$STATUS" "$file") =~ $STATUS ]]; then
      status=${BASH_REMATCH[2]:-exited} code=${BASH_REMATCH[3]} step=${BASH_REMATCH[4]}
      [[ $status$code != exited0 ]] || status="done"
      [[ $status == other ]] || seen_step "$step"
      [[ $status != exited ]] || { [[ -n $worst ]] && may_restart "$code"; } || worst=$code
    fi
    all+="$status "
  done
  case $all in
  *" other "*) FOUND=other ;;
  *" unknown "*) ;;
  *" silent "*) FOUND=lost ;;
  *" exited "*) FOUND="ended $worst" ;;
  *" running "*) FOUND=running ;;
  *" none "*) FOUND=none ;;
  *" done "*) FOUND="done" ;;
  esac
}
