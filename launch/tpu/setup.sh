#!/usr/bin/env bash
# Copies the code to every worker, makes the environment there, mounts bucket and NFS, and compares versions and devices.
# What is copied is the commit with the changes of tracked files on top. Again: only what has changed is installed.
#   launch/tpu/setup.sh [--limit_s=1200] [settings] [--dry_run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=tpu.sh
source "$(dirname "$0")/tpu.sh"
LIMIT_S=1200
begin limit_s -- "$@"
cd "$(dirname "$0")/../.."

git rev-parse --verify --quiet HEAD >/dev/null || fail 2 "$PWD is no git clone, and the code that is copied is a commit"
snapshot=""
# First a look: git stash fails, and says nothing, where a file only seems to have changed, as after a touch.
git diff --quiet HEAD || snapshot=$(git stash create) ||
  fail 2 "git cannot put the changes of $PWD together; is another git at work there? Else remove .git/index.lock"
git archive --format=tar.gz --output="$STATE/meshlm.tgz" "${snapshot:-HEAD}"
left=$(git ls-files --others --exclude-standard | wc -l)
say "code of $(git rev-parse --short HEAD)${snapshot:+ with changes}$( ((left)) && printf ', without %s untracked files' "$left")"
for node in $(nodes); do
  cloud tpu-vm scp "$STATE/meshlm.tgz" "$node:" --worker=all ${INTERNAL_IPS:+--internal-ip} || explain "cannot copy the code to $node"
done
# shellcheck disable=SC2016 # for the worker's shell
unpack='if [ -e meshlm/launch ]; then bash meshlm/launch/tpu/worker.sh stop; fi && mkdir -p meshlm && '
unpack+='find meshlm -mindepth 1 -maxdepth 1 ! -name bucket ! -name runs -exec rm -rf {} + && tar -xzf meshlm.tgz -C meshlm && '
# shellcheck disable=SC2016
unpack+='exec bash meshlm/launch/tpu/worker.sh setup "$0" "$1"'
on_workers "$LIMIT_S" bash -c "$unpack" "$BUCKET" "$NFS" || fail 2 "$? workers of $NAME are not set up; the same command again tries all"
[[ -z $DRY_RUN ]] || exit 0
lines=$(tail -qn 1 "$STATE"/logs/"$NAME"*.txt | sort | uniq -c | sort -rn | sed -E 's/^ *([0-9]+) /\1 workers: /')
(($(wc -l <<<"$lines") == 1)) || fail 2 "the workers of $NAME differ: ${lines//$'\n'/; }"
say "$lines"
