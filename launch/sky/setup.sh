#!/usr/bin/env bash
# Prepares a host of a SkyPilot job, in its copy of the code: `setup:` of the yaml files. Installs Python 3.12 and the
# known-good packages in ~/meshlm-env, and mounts NFS=SERVER:/EXPORT at /runs; without NFS, /runs is a local folder.
#   launch/sky/setup.sh tpu|cuda
set -euo pipefail
CDPATH="" cd "$(dirname "$(readlink -f "$0")")/../.."
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source launch/lib.sh

RUNS=${RUNS:-/runs} NFS=${NFS:-}
ENVIRONMENT=$HOME/meshlm-env
PATH=$HOME/.local/bin:$PATH # where SkyPilot keeps uv

install_packages() { # EXTRA
  command -v uv >/dev/null || fail 2 "uv is missing, which SkyPilot installs; use a newer SkyPilot"
  [[ -x $ENVIRONMENT/bin/python ]] || uv venv --quiet --python=3.12 "$ENVIRONMENT" # the image's Python may be older
  uv pip install --quiet --python="$ENVIRONMENT/bin/python" -c .ci/constraints-3.12.txt -e ".[$1,data]"
}

mount_runs() {
  local there
  sudo mkdir -p "$RUNS"
  there=$(mounted_at "$RUNS")
  [[ -z $NFS || -z $there || $there == "$NFS" ]] || fail 2 "$RUNS is $there here, and NFS=$NFS; sudo umount $RUNS first"
  if [[ -n $NFS && -z $there ]]; then
    command -v mount.nfs >/dev/null || install_nfs || fail 2 "the NFS client cannot be installed; see above"
    # lookupcache: a file made by another host must be visible at once, because processes tell each other that it
    # exists.
    sudo mount -t nfs -o hard,lookupcache=positive "$NFS" "$RUNS" ||
      fail 2 "cannot mount NFS=$NFS; is it SERVER:/EXPORT, in the region and the network (VPC) of these machines?"
  fi
  sudo chmod 1777 "$RUNS" || [[ -w $RUNS ]] || fail 2 "NFS=$NFS is not writable; does its server refuse root (root_squash)?"
}

install_nfs() { # waits for apt's lock: images update themselves when they start
  sudo apt-get update -qq -o DPkg::Lock::Timeout=300 &&
    sudo apt-get install -qq -y -o DPkg::Lock::Timeout=300 nfs-common
}

case ${1:-} in
tpu | cuda) ;;
*) fail 2 "name the accelerator: launch/sky/setup.sh tpu or cuda" ;;
esac
check_nfs
chmod +x launch/*/*.sh # an upload through a bucket loses the executable bit
mount_runs
install_packages "$1"
