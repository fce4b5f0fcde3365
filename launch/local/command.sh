# shellcheck shell=bash
# How launch/local/ and launch/gpu/ check the training command in the array COMMAND. Scripts source it after lib.sh.

# Sets PYTHON to the interpreter that COMMAND names: supervisor and checks must run in the same environment.
find_python() {
  local i python="" example="python -m launch.train --config=configs/tiny.py --workdir=runs/tiny"
  local advice="activate the environment, or name its Python, such as .venv/bin/python"
  ((${#COMMAND[@]})) || fail 2 "no command; it follows --, as in $0 … -- $example"
  PYTHON=""
  for ((i = 0; i + 1 < ${#COMMAND[@]}; i++)); do
    [[ ${COMMAND[i]##*/} != python* ]] || python=${COMMAND[i]}
    [[ "${COMMAND[i]} ${COMMAND[i + 1]}" != "-m launch.train" ]] || PYTHON=$python
  done
  [[ -n $PYTHON ]] || fail 2 "the command after -- must look like $example; it is $(quote "${COMMAND[@]:0:4}")"
  command -v "$PYTHON" >/dev/null ||
    fail 2 "$PYTHON is not a command here; $advice"
  [[ -n ${DRY_RUN:-} ]] || "$PYTHON" -c 'import absl' 2>/dev/null ||
    fail 2 "$PYTHON lacks our packages; $advice"
  workdir_of "${COMMAND[@]}" >/dev/null
}
