#!/usr/bin/env bash
# Starts the training command on every worker, in the background; what ran there before is stopped first. The same
# command on the same run directory goes on with it.
#   launch/tpu/run.sh [--adopt] [settings] [--dry_run] -- python -m launch.train --config=… --workdir=runs/…
#     --adopt    also if NAME was not made from here
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$0")/tpu.sh"
begin "adopt?" -- "$@"
check_command

need
on_workers 300 flock --close --wait=150 meshlm-busy bash meshlm/launch/tpu/worker.sh start "$BUCKET" "$NFS" "${COMMAND[@]}" || give_up $? "have not started it"
report "started; launch/tpu/status.sh, logs.sh, and babysit.sh to keep it going"
