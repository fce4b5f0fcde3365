#!/usr/bin/env bash
# The state of NAME, of the command on each worker with its newest committed step, and what is billing in the zone.
#   launch/tpu/status.sh [settings]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$0")/tpu.sh"
begin -- "$@"

look || explain "cannot ask for $NAME"
printf '%s %s\n' "$NAME" "$NOW"
if [[ $NOW == ACTIVE || -n $DRY_RUN ]]; then
  ask_workers 60 status || true # what is billing has to be shown
  for file in "$ANSWERS"/*.txt; do
    [[ -n $DRY_RUN || ! -f $file ]] || printf '%s %s\n' "$(basename "$file" .txt)" "$(tail -n 1 "$file")"
  done
fi
printf 'billing in %s:\n' "$ZONE"
billing
