#!/usr/bin/env bash
# Asks for TPU VMs as a queued resource, and marks them as made from here (label meshlm). Nothing happens when NAME is
# there already, made from here with this TYPE and SLICES.
#   launch/tpu/create.sh [--env=tpu.env] [--zone=… and other settings] [--dry_run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$(readlink -f "$0")")/tpu.sh"
begin -- "$@"

# Ends the script when NAME is there, and not dead.
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
is_there "$NAME is there already"
[[ $NOW == NONE || -n $DRY_RUN ]] || fail 2 "$NAME is there, and dead ($NOW); launch/tpu/delete.sh, then again"
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
asked="$NAME is asked for: $SLICES x $TYPE, $TIER, in $ZONE; it costs from when it is ACTIVE until launch/tpu/delete.sh"
cloud "${words[@]}" || {
  said=$REASON # no reason to believe that nothing was created: an answer may be lost
  look || fail 42 "it is not known whether $NAME was created in $ZONE of $PROJECT, WHERE IT MAY COST: ${said:0:240}; the same command again"
  is_there "$asked"
  [[ $NOW == NONE ]] || fail 42 "$NAME was created, and is dead by now ($NOW); launch/tpu/delete.sh, then again"
  REASON=$said
  explain "cannot create $NAME"
}
report "$asked"
