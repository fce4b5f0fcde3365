#!/usr/bin/env bash
# Copies the code to every worker, makes the environment there, mounts bucket and NFS, and compares versions and
# devices. The code is the commit plus the changes of tracked files. A second setup installs only what has changed.
#   launch/tpu/setup.sh [--limit_s=1200] [--adopt] [settings] [--dry_run]
#     --code=FILE    copies this archive instead
#     --adopt        also if NAME was not made from here
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$(readlink -f "$0")")/tpu.sh"
LIMIT_S=1200 CODE=""
begin limit_s code "adopt?" -- "$@"
COPY_S=300

refuse_beside_babysitter
need
[[ -n $DRY_RUN ]] || check_kind
if [[ -z $CODE ]]; then
  folder=$(new_folder)
  trap 'rm -rf "$folder"; tidy' EXIT
  CODE=$folder/meshlm.tgz
  (cd "$(dirname "$(readlink -f "$0")")/../.." && snapshot "$CODE")
  read -r _ text <"$CODE.txt" || true
  say "code of $text"
fi
[[ -r $CODE ]] || fail 2 "--code=$CODE cannot be read"
copy_to_workers "$COPY_S" "$CODE" || give_up $? "have not got the code; the same command copies it to all again"
# Only the babysitter, which knows that the run is broken, stops a running command here. Otherwise it may be healthy.
# shellcheck disable=SC2016 # for the worker's shell
unpack='if [ -f meshlm-run/lock ] && ! flock --nonblock --shared meshlm-run/lock true; then '
if by_babysitter; then
  unpack+='bash meshlm/launch/tpu/worker.sh stop || exit; fi; '
else
  unpack+='echo "a command runs here, which setup would end; run launch/tpu/stop.sh first"; exit 2; fi; '
fi
# shellcheck disable=SC2016
unpack+='[ "$(cksum <meshlm.tgz)" = "$2" ] || { echo "the code that arrived is not the code that was copied"; exit 2; }; '
# Removes only the files of the last archive: datasets and mounts stay.
# shellcheck disable=SC2016
unpack+='mkdir -p meshlm && touch meshlm-names && while IFS= read -r name; do rm -rf --one-file-system "meshlm/${name:?}" || exit; done <meshlm-names && '
unpack+='tar -tzf meshlm.tgz | cut -d/ -f1 | sort -u | grep -vxE "bucket|runs" >meshlm-names && tar -xzf meshlm.tgz -C meshlm && '
# shellcheck disable=SC2016
unpack+='exec bash meshlm/launch/tpu/worker.sh setup "$0" "$1"'
versions='^python [^ ]+ jax [^ ]+ devices [0-9]+ of [0-9]+$'
{
  on_free_workers "$LIMIT_S" bash -c "$unpack" "$BUCKET" "$NFS" "$(cksum <"$CODE")" && heard "$versions"
} || give_up $? "are not set up; the same command tries all again"
[[ -z $DRY_RUN ]] || exit 0
lines=$(for file in "$ANSWERS"/*.txt; do said "$versions" "$file"; done | sort | uniq -c | sort -rn | sed -E 's/^ *([0-9]+) /\1 workers: /')
(($(wc -l <<<"$lines") == 1)) || fail 2 "the workers of $NAME differ: ${lines//$'\n'/; }"
say "$lines"
