#!/usr/bin/env bash
# Asks for TPU VMs as a queued resource. Nothing happens where NAME is there already, with this TYPE.
#   launch/tpu/create.sh [--env=tpu.env] [--zone=… and other settings] [--dry_run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$0")/tpu.sh"
begin -- "$@"

now=$(state)
case $now in
NONE | "") ;;
FAILED | SUSPENDED | SUSPENDING) fail 2 "$NAME is there, and dead; launch/tpu/delete.sh, then again" ;;
*)
  cloud queued-resources describe "$NAME" --format='value(tpu.nodeSpec[0].node.acceleratorType)' || explain "cannot ask for $NAME"
  [[ -z $OUTPUT || $OUTPUT == "$TYPE" ]] ||
    fail 2 "NAME=$NAME is in use, by a $OUTPUT; take another for your $TYPE, or delete that one: launch/tpu/delete.sh"
  say "$NAME is there already"
  exit 0
  ;;
esac
words=(queued-resources create "$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME")
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
cloud "${words[@]}" || explain "cannot create $NAME"
report "$NAME is asked for: $SLICES x $TYPE, $TIER, in $ZONE; it costs from when it is ACTIVE until launch/tpu/delete.sh"
