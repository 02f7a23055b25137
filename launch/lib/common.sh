# shellcheck shell=bash
# What the scripts of launch/ share. Sourced, not run.
#
# Exit codes are those of sdxl-jax: 2 where trying again will not help, 1 where it may.

set -euo pipefail
exec 3>&2 # commands are announced here, also while a function's stderr is read

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
DRY_RUN=""
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=yes
  shift
fi

say() { printf '%s\n' "$*" >&3; }

refuse() {
  say "$(basename "$0"): $*"
  exit 2
}

fail() {
  say "$(basename "$0"): $*"
  exit 1
}

# The words as a shell reads them back.
quoted() {
  local word text=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    text+=" $word"
  done
  printf '%s' "${text# }"
}

# run COMMAND...: prints the command and runs it; a dry run only prints it.
run() {
  say "+ $(quoted "$@")"
  [[ -n $DRY_RUN ]] || "$@"
}

# query ANSWER COMMAND...: the same for a command whose output is read. ANSWER is what it says in a dry run.
query() {
  local answer=$1
  shift
  run "$@" || return
  [[ -z $DRY_RUN ]] || printf '%s\n' "$answer"
}

# need NAME MEANING ...: ends where one of these variables is not set, and says which and what belongs there.
need() {
  local -a missing=()
  while (($# > 0)); do
    [[ -n ${!1:-} ]] || missing+=("  $1: $2")
    shift 2
  done
  ((${#missing[@]} == 0)) && return
  say "$(basename "$0"): these variables are not set. Set them in the environment, e.g. export NAME=sdxl"
  printf '%s\n' "${missing[@]}" >&3
  exit 2
}

# one_of NAME VALUE...: ends where the variable has another value.
one_of() {
  local variable=$1 value
  shift
  for value in "$@"; do
    [[ ${!variable} != "$value" ]] || return 0
  done
  refuse "$variable=${!variable} is unknown. Give one of: $*"
}

whole_number() {
  [[ ${!1} =~ ^[1-9][0-9]*$ ]] || refuse "$1=${!1} is no whole number from 1 on"
}

need_programs() {
  local program
  for program in "$@"; do
    [[ -n $(type -P "$program") ]] || refuse "$program is not installed, or not on PATH: see launch/README.md"
  done
}

# CONFIG as seen from the root of this checkout, which is where the other machines have it, and from where all is run.
locate_config() {
  local given=$CONFIG
  [[ -f $CONFIG ]] || refuse "There is no configuration file CONFIG=$given"
  CONFIG=$(realpath --relative-to="$ROOT" "$CONFIG")
  [[ $CONFIG != ../* ]] || refuse "CONFIG=$given is outside of $ROOT, which is what the other machines receive. Copy it in"
  cd "$ROOT"
}

# The run directory outlives the machine, and all processes see it.
check_run_directory() {
  [[ $RUN == gs://* || $RUN == /* ]] ||
    refuse "RUN=$RUN would be on one machine's own disk. Give gs://BUCKET/FOLDER, or an absolute path on a shared disk"
}

check_google_credentials() {
  run gcloud auth print-access-token --quiet >/dev/null ||
    refuse "gcloud has no valid credentials. Run: gcloud auth login && gcloud auth application-default login"
}

# check_bucket [VARIABLE]: that of RUN, or of another variable.
check_bucket() {
  local variable=${1:-RUN} bucket
  [[ ${!variable} == gs://* ]] || return 0
  bucket=${!variable#gs://}
  bucket=gs://${bucket%%/*}
  run gcloud storage buckets describe "$bucket" --format 'value(location)' >/dev/null ||
    refuse "The bucket of $variable=${!variable} does not exist, or may not be read. Create it: gcloud storage buckets create $bucket"
}

# check_fit [--section.field VALUE ...]: compiles the train step for TOPOLOGY, before anything is paid for.
check_fit() {
  if [[ ${PREFLIGHT:-compile} == none ]]; then
    say "PREFLIGHT=none: nobody has checked that $CONFIG fits $TOPOLOGY"
    return
  fi
  run sdxl-jax compile "$CONFIG" --topology "$TOPOLOGY" --slices "${SLICES:-1}" "$@" ||
    refuse "$CONFIG was not compiled for $TOPOLOGY: see above. PREFLIGHT=none leaves this check out"
}
