# shellcheck shell=bash
# The attempts of a run under Slurm: a row of RUN/lives.jsonl for each start of the job, in the format that
# trainer/reliability/restarts.py reads (without goodput, which would need Python here). train.sbatch sources it,
# sets RUN and is the only writer.

begin_life() {
  LIVES=$RUN/lives.jsonl
  LIFE=$(($(field life "$(last_row "$LIVES")") + 1))
  START=$(now) FIRST_STEP=$(newest_step) METRICS=$(last_row "$RUN/metrics.jsonl")
}

# Sets LAST_STEP and writes the row.
end_life() { # CODE
  local cause="exit code $1" before waited=0 metrics reached=0 end torn=""
  LAST_STEP=$(newest_step)
  may_restart "$1" || [[ -e $RUN/config.json ]] || return 0 # a wrong configuration leaves no run directory
  [[ $1 != 0 ]] || cause="done"
  [[ $1 != 42 ]] || cause="stopped (42)"
  end=$(now) before=$(last_row "$LIVES") metrics=$(last_row "$RUN/metrics.jsonl")
  if ((${SLURM_RESTART_COUNT:-0})) && [[ $before =~ \"end\":\ \"([^\"]*) ]]; then
    waited=$(seconds "${BASH_REMATCH[1]}" "$START")
  fi
  [[ $metrics == "$METRICS" ]] || reached=$(field step "$metrics") # else the row is from an earlier attempt
  mkdir -p "$RUN" || return
  [[ ! -s $LIVES || -z $(tail -c 1 "$LIVES") ]] || torn=$'\n'
  printf '%s{"life": %d, "start": "%s", "end": "%s", "waited": %d, "seconds": %d, "cause": "%s", "code": %d, ' \
    "$torn" "$LIFE" "$START" "$end" "$waited" "$(seconds "$START" "$end")" "$cause" "$1" >>"$LIVES" &&
    printf '"first_step": %d, "last_step": %d, "lost_steps": %d}\n' \
      "$FIRST_STEP" "$LAST_STEP" $((reached > LAST_STEP ? reached - LAST_STEP : 0)) >>"$LIVES"
}

# Prints how many attempts of this job have passed since the last new checkpoint. An attempt whose node died has no row;
# the next attempt sees its checkpoint, and an extra row, of an earlier job, is older than that.
fruitless() {
  local row first last before="" count=0
  while read -r row; do
    first=$(field first_step "$row") last=$(field last_step "$row")
    ((first <= ${before:-$first})) || count=0
    count=$((last > first ? 0 : count + 1)) before=$last
  done < <(tail -n $((${SLURM_RESTART_COUNT:-0} + 1)) "$LIVES")
  printf '%s' "$count"
}

newest_step() { # committed in RUN: _CHECKPOINT_METADATA is the last file of a checkpoint to be written
  local path step newest=0
  for path in "$RUN"/checkpoints/*/_CHECKPOINT_METADATA; do
    step=$(basename "$(dirname "$path")")
    [[ ! -e $path || ! $step =~ ^[0-9]+$ ]] || ((10#$step <= newest)) || newest=$((10#$step))
  done
  printf '%s' "$newest"
}

last_row() { # FILE
  [[ ! -s $1 ]] || tail -n 1 "$1"
}

field() { # NAME ROW: a whole number
  if [[ $2 =~ \"$1\":\ ([0-9]+) ]]; then printf '%s' "${BASH_REMATCH[1]}"; else printf 0; fi
}

now() { date --utc +%FT%T.%3N+00:00; }

seconds() { # FROM TO
  local seconds=$(($(date --date="$2" +%s) - $(date --date="$1" +%s)))
  printf '%s' $((seconds > 0 ? seconds : 0))
}
