# shellcheck shell=bash
# Shared by the scripts below launch/, which source it: messages, flags, settings, quoting, dry runs. It runs nothing.
# Exit codes are those of docs/reliability.md: 2 for a mistake, 42 for "start me again".

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or newer is needed, and this is $BASH_VERSION; on macOS: brew install bash" >&2
  exit 2
fi

shopt -u checkwinsize # with it bash sets LINES, which is the flag --lines
unset CDPATH          # else cd may go elsewhere
unset POSIXLY_CORRECT # with it, wait returns the status of a process only once
set +o posix
letter=i
[[ ${letter^^} == I ]] || export LC_ALL=C.UTF-8 # a Turkish locale uppercases i to another letter, and breaks flag names

say() { printf '%s\n' "$*" >&2 || true; } # stdout is for results; a closed stderr ends nothing

report() { [[ -n ${DRY_RUN:-} ]] || say "$*"; } # says what was done

fail() { # CODE MESSAGE: prints one line, whatever it quotes
  say "error: ${2//[[:cntrl:]]/ }"
  exit "$1"
}

usage() { # prints the comment at the top of the script that was started
  sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$0"
}

# Prints one line that any POSIX shell reads back as the same words, whatever is in them.
quote() { # WORD...
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      line+=" $word"
    else
      line+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  printf '%s' "${line# }"
}

is_among() { # WORD WORD...
  local word
  for word in "${@:2}"; do
    [[ $word != "$1" ]] || return 0
  done
  return 1
}

# Sets a variable for each --name=VALUE or --name VALUE: --dry_run is the variable DRY_RUN. A name with a ? is a switch,
# 1 when given. What follows -- is left in the array COMMAND.
parse_flags() { # NAME... -- ARGUMENT...
  local names=() name value
  while [[ $1 != -- ]]; do
    names+=("$1")
    shift
  done
  shift
  # shellcheck disable=SC2034 # read by the scripts
  COMMAND=()
  while (($#)); do
    case $1 in
    --)
      shift
      # shellcheck disable=SC2034
      COMMAND=("$@")
      return
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    --*) ;;
    *) fail 2 "unexpected argument $1; flags are --name=VALUE, and the training command follows --" ;;
    esac
    name=${1#--}
    name=${name%%=*}
    if is_among "$name?" "${names[@]}"; then
      [[ $1 != *=* ]] || fail 2 "--$name takes no value"
      value=1
    elif [[ $name == *\? ]] || ! is_among "$name" "${names[@]}"; then
      fail 2 "unknown flag --$name; the flags are $(printf -- '--%s ' "${names[@]%\?}")"
    elif [[ $1 == *=* ]]; then
      value=${1#*=}
    else
      (($# > 1)) || fail 2 "--$name needs a value"
      shift
      value=$1
    fi
    printf -v "${name^^}" '%s' "$value"
    shift
  done
}

at_least() { # LEAST FLAG VALUE
  [[ $3 =~ ^(0|[1-9][0-9]{0,5})$ ]] && (($3 >= $1)) && return
  fail 2 "$2=$3 must be a whole number, $1 or more"
}

# Reads a NAME=VALUE on each line; # starts a comment, and quotes around a value are stripped. Unknown names are errors.
load_settings() { # FILE NAME...
  local file=$1 line number=0 name value
  shift
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    ((number > 1)) || line=${line#$'\xef\xbb\xbf'} # the BOM that some editors write
    line=${line%%[[:space:]]#*}
    [[ -n ${line//[[:space:]]/} && ${line:0:1} != "#" ]] || continue
    name=${line%%=*} value=${line#*=}
    value=${value%"${value##*[![:space:]]}"}
    if [[ $line != *=* ]] || ! is_among "$name" "$@"; then
      fail 2 "$file, line $number: ${line:0:60} sets none of $*"
    fi
    case $value in
    \"*\" | \'*\') value=${value:1:-1} ;;
    esac
    printf -v "$name" '%s' "$value"
  done <"$file"
}

# Reads settings from the file that --env names (--env= means none); without --env from DEFAULT, if it exists.
load_env() { # DEFAULT EXAMPLE NAME... -- ARGUMENT...
  local file=$1 example=$2 names=()
  shift 2
  while [[ $1 != -- ]]; do
    names+=("$1")
    shift
  done
  shift
  [[ -f $file ]] || file=""
  while (($#)) && [[ $1 != -- ]]; do # ignores the flags of the training command
    case $1 in
    -h | --help) # works even if the file is damaged
      usage
      exit 0
      ;;
    --env=*) file=${1#*=} ;;
    --env) file=${2:-} ;;
    esac
    shift
  done
  [[ -z $file || -f $file ]] || fail 2 "--env=$file: no such file; start from $example"
  [[ -z $file ]] || load_settings "$file" "${names[@]}"
}

# Runs a command that changes something; with --dry_run only prints it.
act() { # WORD...
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

# Prints the value of --NAME=VALUE or --NAME VALUE in a command, with one hyphen or two. The last one counts, as for
# the command itself.
flag() { # NAME COMMAND...
  local name=$1 value=""
  while shift && (($#)); do
    case $1 in
    "--$name="* | "-$name="*) value=${1#*=} ;;
    "--$name" | "-$name") value=${2:-} ;;
    esac
  done
  printf '%s' "$value"
}

# Prints the run directory of a training command, as the command names it; all launchers use this function.
workdir_of() { # COMMAND...
  local run word
  for word in "$@"; do
    [[ ! $word =~ ^--?flagfile(=|$) ]] || fail 2 "leave $word out: a --workdir in it is not seen here"
  done
  run=$(flag workdir "$@")
  [[ -n $run ]] || fail 2 "the command has no --workdir=…; name a folder for the run"
  [[ $run != *[[:cntrl:]]* ]] || fail 2 "--workdir=$run has a line feed or the like in it"
  printf '%s' "$run"
}

# Whether PATH is below FOLDER and stays there: no component is empty, . or .. (which could lead out again).
is_below() { # FOLDER PATH
  local rest=${2#"$1"/}
  [[ $2 == "$1"/* && "/${rest%/}/" != *//* && "/$rest/" != */./* && "/$rest/" != */../* ]]
}

# Prints a path with a leading ~ or ~USER expanded, as the trainer expands it (launch/cli.py).
expanded() { # PATH
  local user=${1%%/*} home
  [[ $1 == "~"* ]] || { printf '%s' "$1" && return; }
  [[ $user =~ ^~([A-Za-z_][A-Za-z0-9._-]*)?$ ]] && eval "home=$user" && [[ $home != "~"* ]] ||
    fail 2 "$1 begins with the home of an unknown user ${user#"~"}; for a folder of that name, write ./$user"
  printf '%s' "$home${1#"$user"}"
}

# Strips trailing slashes from NFS, as findmnt shows it, and rejects what mount would read as an option.
check_nfs() {
  [[ -z $NFS || $NFS =~ ^([A-Za-z0-9][-A-Za-z0-9._]*|\[[0-9A-Fa-f:.]+\]):/[^[:space:]]*$ ]] ||
    fail 2 "NFS=$NFS must be SERVER:/EXPORT, such as 10.0.0.2:/runs"
  while [[ $NFS == *[!:]/ ]]; do NFS=${NFS%/}; done
}

# Prints what is mounted at FOLDER, if anything.
mounted_at() { # FOLDER
  findmnt --noheadings --nofsroot --output=SOURCE --mountpoint "$1" | tail -n 1 || true
}

# Whether a launcher restarts after this code: stopped (42), an exception (1), death by a signal except a second Ctrl-C.
may_restart() { # CODE
  (($1 == 42 || $1 == 1 || $1 >= 128 && $1 != 130))
}
