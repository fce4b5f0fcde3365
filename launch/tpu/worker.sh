#!/usr/bin/env bash
# Runs on a TPU worker, started by the other scripts. All files are in the home directory:
#   meshlm/          the snapshot of the code, and in it bucket/, the bucket, and runs/, the shared folder
#   meshlm-env/      the Python environment; its file `installed` has a hash of what it was made from
#   meshlm-busy      a lock: only one setup, start or stop runs at a time
#   meshlm-run.before/  the meshlm-run from before the last start or setup
#   meshlm-names     the top-level names in the last archive of the code, which the next setup removes
#   meshlm-run/      state of the training command: lock (held while it runs), group (its process group), told (arguments of
#                    start), call (the id of the call to start), workdir, code (exit code, once it has ended), log.txt
#
#   worker.sh setup BUCKET NFS  makes the environment, mounts bucket and shared folder (or ''); prints versions and devices
#   worker.sh start BUCKET NFS COMMAND...  mounts these or fails; runs in the background, under launch.supervise, after
#                               stopping the command before
#   worker.sh status            prints running, exited CODE or none, and the newest committed step
#   worker.sh status BUCKET NFS COMMAND...  the same; "other" if another command runs, none if another has ended
#   worker.sh stop              lets the command save and end, as a preemption would
#   worker.sh log [LINES]       prints the end of the command's log
set -euo pipefail

RUN=$HOME/meshlm-run
STOP_S=${MESHLM_STOP_S:-120} # time for a save; then the command is killed
CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source launch/lib.sh
export PATH=$HOME/meshlm-env/bin:$HOME/.local/bin:$PATH

# set -e is off in these functions, because callers test their status: so each step has || return.
setup() { # BUCKET NFS
  stop
  put_away
  environment >setup.log 2>&1 || {
    tail -n 3 setup.log
    printf 'the environment could not be created\n'
    return 1
  }
  mounts "$1" "$2" || return
  python - <<'EOF'
import jax, os, platform, sys
if jax.default_backend() != "tpu" and os.environ.get("JAX_PLATFORMS") is None:
    sys.exit("JAX finds no TPU here, only " + jax.default_backend())
print(f"python {platform.python_version()} jax {jax.__version__} devices {jax.local_device_count()} of {jax.device_count()}")
EOF
}

# Keeps the last run directory, because its log shows how the command ended.
put_away() {
  [[ -d $RUN ]] || return 0
  rm -rf "$RUN.before"
  mv "$RUN" "$RUN.before"
}

environment() {
  local python
  if [[ ! -x $HOME/meshlm-env/bin/python ]]; then
    if python=$(new_enough); then
      "$python" -m venv "$HOME/meshlm-env" || return
    else # the images of TPU VMs may have 3.10
      python3 -m pip install --quiet --user uv || return
      uv venv --quiet --seed --python=3.12 "$HOME/meshlm-env" || return
    fi
  fi
  local constraints made_from
  constraints=.ci/constraints-$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
  made_from=$(cat "$constraints" pyproject.toml | cksum)
  [[ $(cat "$HOME/meshlm-env/installed" 2>/dev/null) != "$made_from" ]] || return 0
  # The constraints pin jax, jaxlib and libtpu, too.
  python -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".[tpu,data]" || return
  printf '%s' "$made_from" >"$HOME/meshlm-env/installed"
}

new_enough() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s' "$python"
      return 0
    fi
  done
  return 1
}

# Mounts the bucket at bucket/ and the shared folder at runs/, or says why it cannot. A reboot removes mounts: a run
# must then not start from step 0 on the machine's own disk, nor in another folder.
mounts() { # BUCKET NFS
  mkdir -p bucket runs
  mounted bucket "$1" mount_bucket "gs://$1 could not be mounted; is it there, and may the service account of this TPU write to it?" &&
    mounted runs "$2" mount_nfs "NFS=$2 could not be mounted; is it SERVER:/EXPORT, in the region and the network (VPC) of these machines?"
}

mounted() { # FOLDER SOURCE HOW OR
  local there
  there=$(mounted_at "$1")
  if [[ -z $there && -n $2 ]]; then
    "$3" "$2" >>setup.log 2>&1 || {
      tail -n 3 setup.log
      printf '%s\n' "$4"
      return 1
    }
    there=$(mounted_at "$1")
  fi
  [[ $there == "$2" ]] ||
    fail 2 "$1/ is ${there:-not mounted} here, and the settings say ${2:-that it is not mounted}; launch/tpu/ssh.sh -- sudo umount meshlm/$1 unmounts it"
}

mount_bucket() { # BUCKET
  command -v gcsfuse >/dev/null || install_gcsfuse || return
  # A checkpoint is committed by renaming its folder, which is atomic in a bucket with a hierarchical namespace. Without
  # a cache each host sees at once what another has written; without streaming writes fsync puts a file into the bucket.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --enable-streaming-writes=false --rename-dir-limit=200000 "$1" bucket ||
    return
  : >"bucket/.meshlm-$HOSTNAME" && rm -f "bucket/.meshlm-$HOSTNAME"
}

mount_nfs() { # SERVER:/EXPORT
  command -v mount.nfs >/dev/null || { sudo apt-get update -qq && sudo apt-get install -qq -y nfs-common; } || return
  # lookupcache: a file made by another host must be visible at once, because processes tell each other that it exists.
  sudo mount -t nfs -o hard,lookupcache=positive "$1" runs || return
  [[ -w runs ]] || sudo chmod 1777 runs
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
  curl -fsS "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null || return
  printf 'deb [signed-by=%s] %s gcsfuse-%s main\n' "$key" "$packages" "$(lsb_release -cs)" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null || return
  sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
}

# Starts the command; does nothing if the same call has started it before (gcloud retries when an answer is lost).
start() { # BUCKET NFS COMMAND...
  if is_running && [[ -n ${MESHLM_CALL:-} && $(cat "$RUN/call") == "$MESHLM_CALL" ]]; then
    status
    return
  fi
  stop
  mounts "$1" "$2" || return
  put_away
  mkdir "$RUN"
  quote "$@" >"$RUN/told"
  printf '%s' "${MESHLM_CALL:-}" >"$RUN/call"
  shift 2
  flag workdir "$@" >"$RUN/workdir"
  exec 9>"$RUN/lock"
  flock 9
  setsid nohup bash launch/tpu/worker.sh live "$@" >"$RUN/log.txt" 2>&1 </dev/null & # and keeps the lock
  exec 9>&-
  printf '%s\n' $! >"$RUN/group"
  sleep 1
  status
}

# Runs in the background of start. The supervisor handles signals and passes them on; the shell only waits for its end.
live() { # COMMAND...
  local code=0
  trap : TERM INT USR1
  python -m launch.supervise --process="${MESHLM_PROCESS:-0}" -- "$@" || code=$?
  printf '%s\n' "$code" >"$RUN/code.new"
  mv "$RUN/code.new" "$RUN/code"
}

# Whether a process of the command holds the lock, perhaps a trainer that still saves after its supervisor has died. A
# pid would not do: after a reboot it may belong to another process.
is_running() {
  [[ -f $RUN/lock ]] && ! flock --nonblock --shared "$RUN/lock" true
}

# shellcheck disable=SC2120
status() { # [BUCKET NFS COMMAND...]
  local told step
  told=$(cat "$RUN/told" 2>/dev/null || true) step=$(newest_step)
  if [[ ! -f $RUN/lock ]]; then
    echo none 0
  elif (($#)) && [[ $told != "$(quote "$@")" ]]; then
    if is_running; then echo other 0; else echo none 0; fi
  elif is_running; then
    printf 'running %s\n' "$step"
  elif [[ -f $RUN/code ]]; then
    printf 'exited %s %s\n' "$(<"$RUN/code")" "$step"
  else # killed, or the machine was rebooted
    printf 'exited 137 %s\n' "$step"
  fi
}

newest_step() {
  local step=0 folder
  if [[ -f $RUN/workdir ]]; then
    for folder in "$(<"$RUN/workdir")"/checkpoints/*/_CHECKPOINT_METADATA; do
      folder=$(basename "$(dirname "$folder")")
      [[ $folder =~ ^[0-9]+$ ]] && ((folder > step)) && step=$folder
    done
  fi
  printf '%s' "$step"
}

stop() {
  local group waited fd
  is_running || return 0
  group=$(<"$RUN/group")
  kill -TERM -- "-$group" 2>/dev/null || true # it may have ended by now
  for ((waited = 0; waited < STOP_S; waited++)); do
    is_running || return 0
    sleep 1
  done
  kill -KILL -- "-$group" 2>/dev/null || true
  for fd in /proc/[0-9]*/fd/9; do # the trainer has its own process group, but holds the lock
    if [[ $fd -ef $RUN/lock ]]; then kill -KILL "$(cut -d/ -f3 <<<"$fd")" || true; fi
  done
  for ((waited = 0; waited < 10; waited++)); do
    is_running || return 0
    sleep 1
  done
  fail 2 "the command does not end, not even by SIGKILL; run launch/tpu/delete.sh, and start with new machines"
}

log() { # [LINES]
  [[ -e $RUN/log.txt ]] ||
    fail 2 "nothing was started here since setup; the log before: launch/tpu/ssh.sh -- tail meshlm-run.before/log.txt"
  tail -n "${1:-20}" "$RUN/log.txt"
}

"$@"
