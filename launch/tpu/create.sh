#!/usr/bin/env bash
# Requests TPU VMs as a queued resource, and labels them as made from here (label meshlm). It does nothing if NAME exists
# already and was made from here with this TYPE and SLICES.
#   launch/tpu/create.sh [--env=tpu.env] [--zone=… and other settings] [--dry_run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$(readlink -f "$0")")/tpu.sh"
begin -- "$@"

# Ends the script if NAME exists and is not dead.
is_there() { # SAY
  [[ $NOW != NONE && -z $DRY_RUN ]] || return 0
  check_kind
  check_ours
  [[ ! $NOW =~ ^(FAILED|SUSPENDED|SUSPENDING|DELETING)$ ]] || return 0
  say "$1"
  exit 0
}

know_owner
look || explain "cannot ask for $NAME"
is_there "$NAME exists already"
[[ $NOW == NONE || -n $DRY_RUN ]] || fail 2 "$NAME exists, but is dead ($NOW); run launch/tpu/delete.sh, and try again"
words=(queued-resources create "$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --labels=meshlm="$OWNER")
if ((SLICES == 1)); then
  words+=(--node-id="$NAME")
else
  words+=(--node-count="$SLICES" --node-prefix="$NAME")
fi
case $TIER in
spot) words+=(--spot) ;;
reserved) words+=(--reserved) ;;
esac
[[ -z $VALID_FOR ]] || words+=(--valid-until-duration="$VALID_FOR")
[[ -z $SERVICE_ACCOUNT ]] || words+=(--service-account="$SERVICE_ACCOUNT")
[[ -z $INTERNAL_IPS ]] || words+=(--internal-ips)
asked="$NAME is requested: $SLICES x $TYPE, $TIER, in $ZONE; it bills from when it is ACTIVE until launch/tpu/delete.sh"
cloud "${words[@]}" || {
  said=$REASON # NAME may have been created all the same: an answer can be lost
  look || fail 42 "it is not known whether $NAME was created in $ZONE of $PROJECT; IT MAY BE BILLING: ${said:0:240}; try again"
  is_there "$asked"
  [[ $NOW == NONE ]] || fail 42 "$NAME was created, but is dead by now ($NOW); run launch/tpu/delete.sh, and try again"
  REASON=$said
  explain "cannot create $NAME"
}
report "$asked"
