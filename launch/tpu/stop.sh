#!/usr/bin/env bash
# Ends the training command on every worker: it saves first, as at a preemption. The machines stay, and cost.
#   launch/tpu/stop.sh [settings] [--dry_run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$0")/tpu.sh"
begin -- "$@"

on_workers 300 bash meshlm/launch/tpu/worker.sh stop || fail 2 "it may go on on $? workers of $NAME"
report "stopped; $NAME goes on costing until launch/tpu/delete.sh"
