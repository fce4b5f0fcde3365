#!/usr/bin/env bash
# Prints the end of the training log of every worker.
#   launch/tpu/logs.sh [--lines=20] [settings]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$(readlink -f "$0")")/tpu.sh"
LINES=20
begin lines -- "$@"

find_name
code=0
on_workers 60 bash meshlm/launch/tpu/worker.sh log "$LINES" || code=$?
((code < 2)) || exit "$code"
[[ -n $DRY_RUN ]] || tail -n "$LINES" "$ANSWERS"/*.txt
((code == 0)) || give_up "$code" "have no log"
