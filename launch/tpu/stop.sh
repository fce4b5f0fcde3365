#!/usr/bin/env bash
# Ends the training command on every worker: it saves first, as at a preemption. The machines stay, and cost.
#   launch/tpu/stop.sh [--adopt] [settings] [--dry_run]
#     --adopt    also if NAME was not made from here
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$0")/tpu.sh"
begin "adopt?" -- "$@"

need
ask_workers 300 stop || give_up $? "may go on"
report "stopped; $NAME goes on costing until launch/tpu/delete.sh"
