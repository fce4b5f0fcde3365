# shellcheck shell=bash
# What the scripts of launch/tpu/ share: settings and state files; cloud.sh talks to gcloud, workers.sh to the workers.
# They source this; it runs nothing. A queued resource NAME has the node NAME, or NAME-0, NAME-1, … with several slices.
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
# shellcheck source-path=SCRIPTDIR source=cloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/cloud.sh"
# shellcheck source-path=SCRIPTDIR source=workers.sh
source "$(dirname "${BASH_SOURCE[0]}")/workers.sh"

SETTINGS=(PROJECT ZONE NAME TYPE SLICES RUNTIME TIER VALID_FOR BUCKET NFS SERVICE_ACCOUNT INTERNAL_IPS)
PROJECT="" ZONE="" NAME="" TYPE="" SLICES=1 RUNTIME="" TIER=on-demand
# shellcheck disable=SC2034
VALID_FOR="" BUCKET="" NFS="" SERVICE_ACCOUNT="" INTERNAL_IPS="" DRY_RUN="" ADOPT=""

SIGNALS=(INT TERM HUP USR1) # end a script, which says what may be billing

# Reads settings from tpu.env (or --env=FILE; --env= means none), then from flags, and checks them before asking the
# cloud.
begin() { # FLAG... -- ARGUMENT...
  local own=()
  while [[ $1 != -- ]]; do
    own+=("$1")
    shift
  done
  shift
  load_env tpu.env launch/tpu/example.env "${SETTINGS[@]}" -- "$@"
  parse_flags "${own[@]}" env "dry_run?" "${SETTINGS[@],,}" -- "$@"
  check_numbers
  check_settings
  find_state
  trap tidy EXIT
  trap leave_all "${SIGNALS[@]}"
}

# Sets STATE, the folder of persistent state. A dry run has a temporary one that contains only the owner.
find_state() {
  local owner
  [[ -n ${XDG_STATE_HOME:-${HOME:-}} ]] || fail 2 "HOME is not set; the records of whose machines are whose are kept below it, or below XDG_STATE_HOME"
  STATE=${XDG_STATE_HOME:-${HOME:-}/.local/state}/meshlm/tpu/$PROJECT.$ZONE.$NAME
  [[ $STATE == /* ]] || STATE=$PWD/$STATE
  if [[ -n $DRY_RUN ]]; then
    owner=$STATE/owner
    STATE=$(new_folder)
    [[ ! -r $owner ]] || cp "$owner" "$STATE"
    return
  fi
  mkdir -p "$STATE" 2>/dev/null && [[ -w $STATE ]] ||
    fail 2 "$STATE is not writable; it records whose machines are whose; set XDG_STATE_HOME to another folder"
  find "$STATE" -maxdepth 1 -name 'answers.*' -mtime +7 -exec rm -rf {} + || true # left by calls that were killed or failed
}

new_folder() {
  mktemp -d 2>/dev/null || fail 2 "no file can be made in ${TMPDIR:-/tmp}; free disk space, or set TMPDIR"
}

# Persistent values, one per file; files are replaced atomically.
recall() { # FILE DEFAULT
  if [[ -s $1 ]]; then cat "$1"; else printf '%s' "$2"; fi
}
remember() { # FILE VALUE
  local new=$1.$BASHPID.new
  # Not { }: a signal trap's output would go to /dev/null, too.
  (mkdir -p "${1%/*}" && printf '%s' "$2" >"$new" && mv "$new" "$1") 2>/dev/null ||
    fail 42 "$1 cannot be written, and $NAME in $ZONE of $PROJECT may exist, and may be billing; free disk space, and try again"
}

# Ends the script after a signal. The cloud may carry out a request nevertheless.
leave_all() {
  trap '' "${SIGNALS[@]}"
  end_jobs
  fail 42 "ended by a signal; $NAME in $ZONE of $PROJECT may exist, and may be billing: launch/tpu/status.sh"
}

# Runs a function of these scripts in the background, without the babysitter's lock (9), which would otherwise outlive
# the babysitter. A TERM ends the function at once, with the command that it waits for. (Bash itself would first wait
# for that command, because there is an EXIT trap.)
as_job() { # FUNCTION ARGUMENT...
  exec 9>&-
  trap 'kill "$!" 2>/dev/null; exit 143' TERM
  "$@"
}

# Ends all background jobs of this shell, such as gcloud, which does not get a terminal's Ctrl-C.
end_jobs() {
  local pid
  for pid in $(jobs -p); do kill "$pid" 2>/dev/null || true; done
}

# Babysitters: NAME has one at most, and no other script acts on NAME meanwhile: it would undo the babysitter's work.

# The babysitter locks $STATE/babysitter (fd 9), which has its pid; other scripts that act hold a shared lock on it.
take_name() {
  exec 9<>"$STATE/babysitter"
  flock --wait=1 9 ||
    fail 2 "another babysitter has $NAME (pid $(<"$STATE/babysitter"); its log: $STATE/babysit.log), or another script acts on it just now"
  printf '%s\n' "$$" >"$STATE/babysitter"
  export MESHLM_BABYSITTER=$$ # scripts that it starts act for it
}

by_babysitter() { [[ ${MESHLM_BABYSITTER:-} == "$PPID" ]]; }

refuse_beside_babysitter() {
  ! by_babysitter || return 0
  exec 9<>"$STATE/babysitter"
  flock --nonblock --shared 9 ||
    fail 2 "a babysitter has $NAME (pid $(<"$STATE/babysitter")), and would undo it; end it first (kill $(<"$STATE/babysitter")), then the same again"
}

# Whether no process is left that waits for this one: this script, or the babysitter it acts for, was killed.
is_orphan() {
  ! kill -0 "$$" 2>/dev/null || ! kill -0 "${MESHLM_BABYSITTER:-$$}" 2>/dev/null
}

check_numbers() {
  local name
  for name in LIMIT_S LINES; do at_least 0 "--${name,,}" "${!name:-0}"; done
  for name in POLL_S MAX_HOURS; do
    [[ ${!name:-0} =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail 2 "--${name,,}=${!name} must be a number"
  done
}

check_settings() {
  local name
  for name in PROJECT ZONE NAME TYPE; do
    [[ -n ${!name} ]] || fail 2 "$name is not set; put it into tpu.env (launch/tpu/example.env), or say --${name,,}=…"
  done
  for name in PROJECT ZONE; do
    [[ ${!name} =~ ^[a-z0-9][-a-z0-9.:]*$ ]] || fail 2 "$name=${!name} must be small letters, digits and hyphens"
  done
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail 2 "NAME=$NAME must be small letters, digits and hyphens, begin with a letter, and have 40 of them at most"
  [[ $SLICES =~ ^[1-9][0-9]{0,5}$ ]] || fail 2 "SLICES=$SLICES must be a number, 1 or more"
  [[ $TIER =~ ^(on-demand|spot|reserved)$ ]] || fail 2 "TIER=$TIER must be on-demand, spot or reserved"
  [[ $VALID_FOR =~ ^([0-9]+[smhdw])*$ ]] || fail 2 "VALID_FOR=$VALID_FOR must be a duration with its unit, such as 6h"
  BUCKET=${BUCKET#gs://} BUCKET=${BUCKET%/}
  [[ $BUCKET =~ ^([a-z0-9]([-a-z0-9_.]*[a-z0-9])?)?$ ]] || fail 2 "BUCKET=$BUCKET must be the name of a bucket, without a folder"
  check_nfs
  if [[ -z $RUNTIME ]]; then
    case $TYPE in
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    *) fail 2 "TYPE=$TYPE is not known here (v6e-…, v5p-…, v5litepod-…, v4-…); correct it, or say its RUNTIME, too" ;;
    esac
  fi
  [[ -z $DRY_RUN ]] || return 0
  command -v gcloud >/dev/null ||
    fail 2 "gcloud is missing; install the Google Cloud CLI (cloud.google.com/sdk), then: gcloud auth login"
  for name in timeout flock; do
    command -v "$name" >/dev/null || fail 2 "$name is missing; on macOS: brew install coreutils flock"
  done
  [[ ! $0 =~ /(setup|babysit)\.sh$ ]] || command -v git >/dev/null || fail 2 "git is missing; the code that is copied is a commit"
}

# Checks that the training command has a run directory on storage that all hosts share and that outlives them.
check_command() {
  local run
  ((${#COMMAND[@]})) || fail 2 "name the training command after --: -- python -m launch.train --config=… --workdir=runs/…"
  run=$(workdir_of "${COMMAND[@]}")
  is_below "${run%%/*}" "$run" || run="" # matches only *) below
  case $run in
  bucket/*) [[ -n $BUCKET ]] || fail 2 "--workdir=$run is in the bucket, and none is set; put BUCKET into tpu.env" ;;
  runs/*)
    [[ -z $NFS ]] || return 0
    if ((SLICES > 1)) || has_several_hosts; then
      fail 2 "$SLICES x $TYPE has several hosts, and --workdir=$run is on the local disk of each; put NFS=SERVER:/EXPORT into tpu.env, which becomes runs/, or BUCKET with --workdir=bucket/$run"
    fi
    [[ -n $(flag config.checkpoint.mirror "${COMMAND[@]}") ]] ||
      fail 2 "--workdir=$run is on a disk that is deleted with the machine; put NFS or BUCKET into tpu.env (launch/tpu/example.env), or add --config.checkpoint.mirror=gs://…"
    ;;
  *)
    fail 2 "--workdir=$(flag workdir "${COMMAND[@]}") must be below runs/ (NFS) or bucket/ (BUCKET), which outlive the machines, without . and .."
    ;;
  esac
}

# Whether TYPE has more chips than one host: at most 8 of v5e and v6e, or 4 of v4 and v5p, whose types count cores.
has_several_hosts() {
  local size=${TYPE##*-}
  [[ $size =~ ^[0-9]+$ ]] || return 0
  ((size > 8))
}

# Packs the code: the commit of this clone plus the changes of tracked files. FILE.txt gets its tree and a description.
snapshot() { # FILE
  local changes left text
  forget_other_clones
  changes=$(changes)
  left=$(git ls-files --others --exclude-standard | wc -l)
  text="$(git rev-parse --short "${changes:-HEAD}${changes:+^}")${changes:+ with changes}"
  changes=${changes:-$(git rev-parse HEAD)} # a fixed commit, even if the clone changes meanwhile
  ((left == 0)) || text+=", without $((left)) untracked files"
  git archive --format=tar.gz --output="$1.new" "$changes" || fail 42 "$1 cannot be written; free disk space, and try again"
  remember "$1.txt" "$(git rev-parse "$changes^{tree}") $text"
  mv "$1.new" "$1"
}

tree() {
  local changes
  forget_other_clones
  changes=$(changes) && git rev-parse "${changes:-HEAD}^{tree}"
}

# Unsets GIT_DIR and the like, which may name another clone than that of these scripts.
forget_other_clones() {
  local names
  mapfile -t names < <(git rev-parse --local-env-vars)
  unset "${names[@]}"
}

# Prints a commit of the changes of tracked files; nothing if there are none. It checks first with git diff, because git
# stash fails silently if a file only seems to have changed, as after a touch.
changes() {
  local said="" pause_s name
  git rev-parse --verify --quiet HEAD >/dev/null || fail 2 "$PWD is not a git clone; the code that is copied is a commit"
  ! git diff --quiet HEAD || return 0
  name=$(git diff --name-only --diff-filter=AU)
  [[ -z $name ]] || fail 2 "${name//$'\n'/, } in $PWD is added without its content (git add -N), or unmerged; git add it, or git reset it"
  for pause_s in 0 1 5; do
    sleep "$pause_s"
    { said=$(git stash create 2>&1 >&3) && return; } 3>&1
  done
  fail 2 "git cannot collect the changes of $PWD ($said); is another git running there? If not, remove .git/index.lock"
}
