#!/usr/bin/env bash
# Prints the state of NAME, of the command on each worker with its newest committed step, and what is billing in the
# zone. Exits with 42 if a part of this is not known.
#   launch/tpu/status.sh [settings]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$(readlink -f "$0")")/tpu.sh"
begin -- "$@"

look || explain "cannot ask for $NAME"
printf '%s %s\n' "$NAME" "$NOW"
code=0
if [[ $NOW == ACTIVE || -n $DRY_RUN ]]; then
  { ask_workers 60 status && heard "$STATUS"; } || code=42 # what is billing must be printed anyway
  for file in "$ANSWERS"/*.txt; do
    [[ -n $DRY_RUN || ! -f $file ]] || printf '%s %s\n' "$(basename "$file" .txt)" "$(said "$STATUS" "$file" || echo unknown)"
  done
fi
printf 'billing in %s:\n' "$ZONE"
costs=$(billing) || code=$?
[[ -z $costs ]] || printf '%s\n' "$costs"
if [[ $NOW == ACTIVE ]] && ! grep -q "^queued resource $NAME " <<<"$costs"; then
  say "the cloud's lists are incomplete: $NAME is ACTIVE, but not in them"
  code=42
fi
exit "$code"
