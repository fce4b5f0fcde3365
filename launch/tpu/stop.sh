#!/usr/bin/env bash
# Ends the training command on every worker: it saves first, as at a preemption. The machines stay, and cost.
#   launch/tpu/stop.sh [--adopt] [settings] [--dry_run]
#     --adopt    also if NAME was not made from here
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$(readlink -f "$0")")/tpu.sh"
begin "adopt?" -- "$@"

refuse_beside_babysitter
need
ask_workers 300 stop || give_up $? "may go on"
{ ask_workers 60 status && heard "$STATUS"; } || give_up $? "may go on"
if [[ -z $DRY_RUN ]] && grep -qE '^running ' "$ANSWERS"/*.txt; then
  fail 42 "it goes on: $(grep -lE '^running ' "$ANSWERS"/*.txt | wc -l) workers of $NAME have not stopped it; the same again"
fi
report "stopped; $NAME goes on costing until launch/tpu/delete.sh"
