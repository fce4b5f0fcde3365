#!/usr/bin/env bash
# Stops the training command on every worker; the command saves first, as at a preemption. The machines stay, and keep
# billing.
#   launch/tpu/stop.sh [--adopt] [settings] [--dry_run]
#     --adopt    also if NAME was not made from here
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$(readlink -f "$0")")/tpu.sh"
begin "adopt?" -- "$@"

refuse_beside_babysitter
need
ask_workers 300 stop || give_up $? "may still be running"
{ ask_workers 60 status && heard "$STATUS"; } || give_up $? "may still be running"
if [[ -z $DRY_RUN ]] && grep -qE '^running ' "$ANSWERS"/*.txt; then
  fail 42 "it still runs: $(grep -lE '^running ' "$ANSWERS"/*.txt | wc -l) workers of $NAME have not stopped it; try again"
fi
report "stopped; $NAME keeps billing until launch/tpu/delete.sh"
