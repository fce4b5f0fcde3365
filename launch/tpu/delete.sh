#!/usr/bin/env bash
# Deletes NAME with all its machines, and says what still costs in the zone. What is in the bucket stays.
#   launch/tpu/delete.sh [settings] [--dry_run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$0")/tpu.sh"
begin -- "$@"

cloud queued-resources delete "$NAME" --force || is_not_found || explain "cannot delete $NAME, WHICH GOES ON COSTING"
report "$NAME is deleted"
still=$(billing)
[[ -z $still ]] || say "still billing in $ZONE:"$'\n'"$still"
