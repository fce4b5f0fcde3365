# shellcheck shell=bash
# Sourced by each script of a history, by BASH_ENV (tests/system/babysitter_histories_test.py): gcloud and other small
# programs as functions, because a history calls them some hundred times. Each call of gcloud is passed on to the test,
# which has the model of the cloud; 124 stands for an answer that does not come in time.
timeout() { # --kill-after=S LIMIT COMMAND...
  if [[ $3 == gcloud ]]; then "${@:3}"; else command timeout "$@"; fi
}
gcloud() {
  local code="" output="" errors="" place
  exec {place}<>"/dev/tcp/127.0.0.1/$HISTORY_PORT" || return 1
  printf '%s\0' $(($# + 2)) "$HISTORY" "$HISTORY_ROLE ${0##*/}" "$@" >&"$place" &&
    IFS= read -r -d '' code <&"$place" && IFS= read -r -d '' output <&"$place" &&
    IFS= read -r -d '' errors <&"$place" || true
  exec {place}>&-
  printf '%s' "$errors" >&2 # in this order: gcloud says that it connects, then comes the worker's output
  printf '%s' "$output"
  return "${code:-1}"
}
sleep() {
  [[ $1 == 0 ]] || command sleep "$1"
}
dirname() {
  local path=${1%/}
  case $path in
  */*) path=${path%/*} && printf '%s\n' "${path:-/}" ;;
  *) echo . ;;
  esac
}
basename() {
  local name=${1##*/}
  printf '%s\n' "${name%"${2:-}"}"
}
date() {
  printf "%(${1#+})T\n" -1
}
rm() { # which the babysitter calls in each round: the clock is set in one of them
  command rm "$@" || return
  [[ -n ${HISTORY_CLOCK:-} && ${0##*/} == babysit.sh && BASH_SUBSHELL -eq 0 ]] && ((RANDOM % 4 == 0)) || return 0
  SECONDS=$((SECONDS + HISTORY_CLOCK)) HISTORY_CLOCK=""
}
