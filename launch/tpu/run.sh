#!/usr/bin/env bash
# Starts the training command on every worker, in the background; what ran there before is stopped first. The same
# command on the same run directory goes on with it.
#   launch/tpu/run.sh [settings] [--dry_run] -- python -m launch.train --config=… --workdir=runs/…
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$0")/tpu.sh"
begin -- "$@"
check_command

on_workers 300 bash meshlm/launch/tpu/worker.sh start "${COMMAND[@]}" || fail 2 "it did not start on $? workers of $NAME"
report "started; launch/tpu/status.sh, logs.sh, and babysit.sh to keep it going"
