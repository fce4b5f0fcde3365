#!/usr/bin/env bash
# Deletes NAME with all its machines, and says what still costs in the zone. What is in the bucket stays.
#   launch/tpu/delete.sh [--adopt] [settings] [--dry_run]
#     --adopt    also if it was not made from here
# 0 when it is gone; 2 when it is not there, or not ours; 42 when it is not known to be gone.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$(readlink -f "$0")")/tpu.sh"
begin "adopt?" -- "$@"
refuse_beside_babysitter

delete() {
  ATTEMPTS=1 cloud queued-resources delete "$NAME" --force
}

need
[[ -z $DRY_RUN ]] || {
  delete
  exit
}
made=$MADE said=""
# What has its name may be another's by now: only what was seen a moment ago, and is the same, is deleted.
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  [[ $MADE != "$made" ]] || delete || said=": ${REASON:0:240}"
  ((attempt == 1)) || nap "$RETRY_S"
  ! look || [[ $MADE == "$made" ]] || break
done
((attempt <= ATTEMPTS)) || fail 42 "$NAME in $ZONE of $PROJECT GOES ON COSTING; it is not known to be deleted$said; the same command again"
rm -f "$STATE"/commands/*/asked
report "$NAME is deleted"
still=$(billing 2>/dev/null) || still="what is not known: it cannot be listed now; launch/tpu/status.sh"
[[ -z $still ]] || say "still billing in $ZONE:"$'\n'"$still"
