#!/usr/bin/env bash
# Runs a command on every worker and prints the output of each; without a command, opens a shell on the first worker.
#   launch/tpu/ssh.sh [--limit_s=600] [settings] [--dry_run] [-- COMMAND...]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$(readlink -f "$0")")/tpu.sh"
LIMIT_S=600
begin limit_s -- "$@"

if ((${#COMMAND[@]} == 0)); then
  trap - "${SIGNALS[@]}" # signals are for the remote shell
  read -r node < <(nodes)
  act gcloud compute tpus tpu-vm ssh "$node" --worker=0 --project="$PROJECT" --zone="$ZONE" ${INTERNAL_IPS:+--internal-ip}
  exit
fi
find_name
code=0
on_workers "$LIMIT_S" "${COMMAND[@]}" || code=$?
((code < 2)) || exit "$code"
[[ -n $DRY_RUN ]] || tail -n +1 "$ANSWERS"/*.txt
((code == 0)) || give_up "$code" "ended with an error"
