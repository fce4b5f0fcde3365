#!/usr/bin/env bash
# Starts the training command on every worker, in the background, after stopping the earlier one. The same command on
# the same run directory resumes.
#   launch/tpu/run.sh [--adopt] [settings] [--dry_run] -- python -m launch.train --config=… --workdir=runs/…
#     --adopt    also if NAME was not made from here
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$(readlink -f "$0")")/tpu.sh"
begin "adopt?" -- "$@"
check_command

refuse_beside_babysitter
need
[[ -n $DRY_RUN ]] || check_kind
{
  on_free_workers 300 bash meshlm/launch/tpu/worker.sh start "$BUCKET" "$NFS" "${COMMAND[@]}" && heard "$STATUS"
} || give_up $? "have not started it"
if [[ -z $DRY_RUN ]] && ! by_babysitter; then # the babysitter asks for the exit codes itself
  ended=$(grep -hE '^exited [1-9]' "$ANSWERS"/*.txt | sort | uniq -c | sed -E 's/^ *([0-9]+) exited ([0-9]+) .*/\1 workers with \2/' || true)
  [[ -z $ended ]] || fail 2 "it was started, but ended at once: ${ended//$'\n'/, }; launch/tpu/logs.sh shows why"
fi
report "started; launch/tpu/status.sh, logs.sh, and babysit.sh to keep it going"
