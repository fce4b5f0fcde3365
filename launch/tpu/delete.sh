#!/usr/bin/env bash
# Deletes NAME with all its machines, and prints what is still billing in the zone. The bucket is kept.
#   launch/tpu/delete.sh [--adopt] [settings] [--dry_run]
#     --adopt    also if NAME was not made from here
# Exit codes: 0 if NAME is gone; 2 if it does not exist or is not ours; 42 if it is not known to be gone.
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
# By now another user may have created a resource NAME: NAME is deleted only if its creation time is the one seen before.
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  [[ $MADE != "$made" ]] || delete || said=": ${REASON:0:240}"
  ((attempt == 1)) || nap "$RETRY_S"
  ! look || [[ $MADE == "$made" ]] || break
done
((attempt <= ATTEMPTS)) || fail 42 "$NAME in $ZONE of $PROJECT KEEPS BILLING; it is not known to be deleted$said; try again"
rm -f "$STATE"/commands/*/asked
report "$NAME is deleted"
still=$(billing 2>/dev/null) || still="not known, because it cannot be listed now; launch/tpu/status.sh"
[[ -z $still ]] || say "still billing in $ZONE:"$'\n'"$still"
