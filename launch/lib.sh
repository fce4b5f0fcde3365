# shellcheck shell=bash
# What the scripts below launch/ share: messages, flags, settings, quoting, dry runs, retries. Sourced; runs nothing.
# Exit codes are those of docs/reliability.md: 2 for a mistake, 42 for "start me again".

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or newer is needed, and this is $BASH_VERSION; on macOS: brew install bash" >&2
  exit 2
fi

shopt -u checkwinsize # with it bash sets LINES, which is the flag --lines

say() { printf '%s\n' "$*" >&2 || true; } # stdout is for results; that nobody reads this ends nothing

report() { [[ -n ${DRY_RUN:-} ]] || say "$*"; } # what was done

fail() { # CODE MESSAGE
  say "error: $2"
  exit "$1"
}

usage() { # the comment at the top of the script that was started
  sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$0"
}

# One line that any POSIX shell reads back as the same words, whatever is in them.
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
    *) fail 2 "$1 is no flag; flags are --name=VALUE, and the training command follows --" ;;
    esac
    name=${1#--}
    name=${name%%=*}
    if [[ " ${names[*]} " == *" $name? "* ]]; then
      [[ $1 != *=* ]] || fail 2 "--$name takes no value"
      value=1
    elif [[ " ${names[*]} " != *" $name "* ]]; then
      fail 2 "unknown flag --$name; there are $(printf -- '--%s ' "${names[@]%\?}")"
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

# NAME=VALUE a line, # for comments; quotes around a value are left out. Unknown names are mistakes.
load_settings() { # FILE NAME...
  local file=$1 line number=0 name value
  shift
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%%[[:space:]]#*}
    [[ -n ${line//[[:space:]]/} && ${line:0:1} != "#" ]] || continue
    name=${line%%=*} value=${line#*=}
    value=${value%"${value##*[![:space:]]}"}
    if [[ $line != *=* || " $* " != *" $name "* ]]; then
      fail 2 "$file, line $number: ${line:0:60} sets none of $*"
    fi
    case $value in
    \"*\" | \'*\') value=${value:1:-1} ;;
    esac
    printf -v "$name" '%s' "$value"
  done <"$file"
}

# Settings from the file that --env names (--env= is none); without --env from DEFAULT, if it is there.
load_env() { # DEFAULT EXAMPLE NAME... -- ARGUMENT...
  local file=$1 example=$2 names=()
  shift 2
  while [[ $1 != -- ]]; do
    names+=("$1")
    shift
  done
  shift
  [[ -f $file ]] || file=""
  while (($#)) && [[ $1 != -- ]]; do # not those of the training command
    case $1 in
    --env=*) file=${1#*=} ;;
    --env) file=${2:-} ;;
    esac
    shift
  done
  [[ -z $file || -f $file ]] || fail 2 "--env=$file is no file; $example is one to begin with"
  [[ -z $file ]] || load_settings "$file" "${names[@]}"
}

# Runs a command that changes something; with --dry_run it is only shown.
act() { # WORD...
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

# The value of --NAME=VALUE or --NAME VALUE in a command; the last one, as the command itself has it.
flag() { # NAME COMMAND...
  local name=$1 value=""
  while shift && (($#)); do
    case $1 in
    "--$name="*) value=${1#*=} ;;
    "--$name") value=${2:-} ;;
    esac
  done
  printf '%s' "$value"
}

# What is mounted at FOLDER; nothing if nothing is.
mounted_at() { # FOLDER
  findmnt --noheadings --nofsroot --output=SOURCE --mountpoint "$1" | tail -n 1 || true
}

# What a launcher starts again: stopped, an exception, and what signals leave but for the second Ctrl-C.
may_restart() { # CODE
  (($1 == 42 || $1 == 1 || $1 >= 128 && $1 != 130))
}
