#!/usr/bin/env bash
# Waits until NAME is ACTIVE; exits with 42 if NAME cannot become that, and has to be deleted and created again.
#   launch/tpu/wait.sh [--poll_s=30] [--limit_s=N] [settings] [--dry_run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$(readlink -f "$0")")/tpu.sh"
POLL_S=30 LIMIT_S=0
begin poll_s limit_s -- "$@"

before=""
while true; do
  look || explain "cannot ask for $NAME"
  [[ -z $DRY_RUN ]] || exit 0
  [[ $NOW == "$before" ]] || say "$(date +%H:%M:%S) $NAME is $NOW"
  before=$NOW
  case $NOW in
  ACTIVE) exit 0 ;;
  NONE) fail 2 "there is no $NAME in $ZONE; launch/tpu/create.sh" ;;
  FAILED | SUSPENDED | SUSPENDING | DELETING) fail 42 "$NAME will not become ACTIVE; launch/tpu/delete.sh, then create.sh" ;;
  esac
  ((LIMIT_S == 0 || SECONDS < LIMIT_S)) || fail 42 "$NAME is $NOW after $LIMIT_S s; it stays in the queue until delete.sh"
  nap "$POLL_S"
done
