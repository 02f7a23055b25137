#!/usr/bin/env bash
# A run on a TPU slice: from the request for the machines to the last step.

# shellcheck source=launch/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/tpu-vm.sh [--dry-run] COMMAND [--section.field VALUE ...]

check    programs, credentials, the bucket of RUN, and `sdxl-jax compile` for TOPOLOGY
create   check, request the slice, and wait until it is there
setup    copy this checkout to every worker and install it
train    start training on every worker, detached from this terminal; again: it resumes
status   the slice, its workers, the run
logs     follow the log of worker WORKER (0)
stacks   print every thread's stack into the logs of all workers: for a run that hangs
stop     SIGTERM: training saves a checkpoint and ends
delete   delete the slice
babysit  create, setup, train; again after every preemption, until the run has finished; then delete

--dry-run prints the commands and runs none. Variables, from the environment:

NAME ZONE TOPOLOGY  the slice's name and zone, and e.g. v5e:4x4 (the table of launch/README.md)
CONFIG RUN          configuration file; run directory, gs://BUCKET/FOLDER
SLICES              1; slices of this topology, connected by the data-centre network
CAPACITY            on-demand, spot, flex-start, or reservation with RESERVATION
MAX_HOURS           24; of flex-start, at most 168
BACKEND             tpu-api, or compute-engine (tpu7x; v5p and v6e too)
SERVICE_ACCOUNT     of the workers; the project's default one
ENV_FILE            lines NAME=value for training (secrets, LIBTPU_INIT_ARGS), copied to the workers
PREFLIGHT           compile, or none
ATTEMPTS            5; failures in a row after which babysit gives up. A preemption is not a failure
POLL_SECONDS        60; between two looks at the slice and at training
KEEP                yes: babysit does not delete the slice of a finished run
TEXT
}

WORKER_SCRIPT="bash sdxl_jax/launch/lib/worker.sh"
IF_INSTALLED="test ! -e sdxl_jax/launch/lib/worker.sh ||"
DRY_STATE=NONE # the slice's, in a dry run
DRY_CODE=143   # of `sdxl-jax status`, in a dry run
failures=0
workers=0 # of the slice that have answered

settings() {
  need NAME "the slice's name, e.g. sdxl" ZONE "its zone, e.g. us-west4-a" \
    TOPOLOGY "chip and arrangement, e.g. v5e:4x4: the table of launch/README.md"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || refuse "NAME=$NAME: small letters, digits and - only, e.g. sdxl-1"
  [[ $TOPOLOGY =~ ^(v4|v5e|v5p|v6e|tpu7x):([0-9]+(x[0-9]+){1,2})$ ]] ||
    refuse "TOPOLOGY=$TOPOLOGY is unknown. Give chip and arrangement, e.g. v5e:4x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1"
  CHIP=${BASH_REMATCH[1]} ARRANGEMENT=${BASH_REMATCH[2]}
  CHIPS=$((${ARRANGEMENT//x/*}))
  SLICES=${SLICES:-1} CAPACITY=${CAPACITY:-on-demand} MAX_HOURS=${MAX_HOURS:-24} SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-}
  ATTEMPTS=${ATTEMPTS:-5} POLL_SECONDS=${POLL_SECONDS:-60} WORKER=${WORKER:-0}
  BACKEND=${BACKEND:-$([[ $CHIP == tpu7x ]] && echo compute-engine || echo tpu-api)}
  whole_number SLICES
  whole_number MAX_HOURS
  whole_number ATTEMPTS
  one_of CAPACITY on-demand spot flex-start reservation
  one_of BACKEND tpu-api compute-engine
  [[ $CAPACITY != reservation ]] || need RESERVATION "the reservation's name"
  if [[ -n ${ENV_FILE:-} ]]; then
    [[ -f $ENV_FILE ]] || refuse "There is no file ENV_FILE=$ENV_FILE"
    ENV_FILE=$(realpath "$ENV_FILE")
  fi
  # shellcheck source=launch/lib/tpu-api.sh
  source "$ROOT/launch/lib/$BACKEND.sh"
  choose_machine
}

run_settings() {
  need CONFIG "configuration file, e.g. configs/sdxl_base_256.py" RUN "run directory, e.g. gs://BUCKET/runs/first"
  locate_config
  check_run_directory
}

check_programs() {
  need_programs gcloud sdxl-jax git tar
  check_google_credentials
  check_bucket
  # gcloud connects to several workers at once only with a key that needs no passphrase.
  ((CHIPS * SLICES <= 4)) || run ssh-add -l >/dev/null ||
    refuse "ssh has no key at hand. Run: eval \"\$(ssh-agent)\" && ssh-add ~/.ssh/google_compute_engine"
}

pause() { [[ -n $DRY_RUN ]] || sleep "$POLL_SECONDS"; }

# try_again MESSAGE: waits; ends after ATTEMPTS failures in a row.
try_again() {
  failures=$((failures + 1))
  ((failures < ATTEMPTS)) || fail "$1, $failures times in a row. $(costs)"
  say "$1: failure $failures, trying again up to $ATTEMPTS"
  pause
}

costs() { echo "The slice $NAME may still be there, and cost: launch/tpu-vm.sh delete"; }

# Returns when the slice is there. It is requested where there is none, and again where it was preempted.
ensure_slice() {
  local state
  while true; do
    state=$(slice_state) || state=UNKNOWN
    say "slice $NAME: $state"
    case $state in
      ACTIVE) return ;;
      NONE)
        workers=0
        if slice_create; then
          # shellcheck disable=SC2034  # lib/ reads it
          DRY_STATE=ACTIVE
        else
          slice_delete || true # what there is of it
          try_again "The slice was not created"
        fi
        ;;
      SUSPENDED) slice_delete || try_again "The slice was not deleted" ;;
      FAILED)
        slice_delete || true
        try_again "The request for the slice has failed"
        ;;
      UNKNOWN) try_again "The slice's state is not known" ;;
      *) pause ;;
    esac
  done
}

setup() {
  local folder commit
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # this folder
  trap "rm -rf '$folder'" EXIT
  commit=$(git -C "$ROOT" rev-parse --verify --quiet HEAD || echo unknown)
  run git -C "$ROOT" ls-files -z --cached --others --exclude-standard >"$folder/files" || return
  run tar --create --gzip --file "$folder/sdxl_jax.tar.gz" --directory "$ROOT" --null --files-from "$folder/files" || return
  copy_to_workers "$folder/sdxl_jax.tar.gz" sdxl_jax.tar.gz || return
  [[ -z ${ENV_FILE:-} ]] || copy_to_workers "$ENV_FILE" train.env || return
  on_workers all "mkdir -p sdxl_jax && tar --extract --gzip --file sdxl_jax.tar.gz --directory sdxl_jax && $WORKER_SCRIPT setup $commit"
}

# train [--section.field VALUE ...]
train() {
  local -a slices=()
  ((SLICES == 1)) || slices=(--mesh.slices "$SLICES")
  on_workers all "$WORKER_SCRIPT start $(quoted "$CONFIG" --run-dir "$RUN" "${slices[@]}" "$@")"
}

stop() { on_workers all "$IF_INSTALLED $WORKER_SCRIPT stop"; }

# Sets `seen`: running; refused, failed (a worker ended with 2, with something else); ended; or unreachable. gcloud
# passes over a slice that it cannot reach, and ends with 0: fewer workers than before answer then.
training_state() {
  local answer count
  seen=unreachable
  answer=$(on_workers all "$IF_INSTALLED $WORKER_SCRIPT state") || return 0
  count=$(grep --count '^worker ' <<<"$answer" || true)
  ((count >= workers)) || return 0
  workers=$count
  seen=ended
  ((count > 0)) || return 0
  say "$answer"
  if grep --quiet ': failed 2$' <<<"$answer"; then
    seen=refused
  elif grep --quiet ': failed ' <<<"$answer"; then
    seen=failed
  elif ! grep '^worker ' <<<"$answer" | grep --quiet --invert-match --extended-regexp ': (active|activating) '; then
    seen=running
  fi
}

# The exit code of `sdxl-jax status`: 0 finished, 143 with work left, 2 no run there, 1 not known.
run_code() {
  local code=0
  run sdxl-jax status "$RUN" --quiet || code=$?
  [[ -z $DRY_RUN ]] || code=$DRY_CODE
  return "$code"
}

# Returns when training runs no longer on all workers; `seen` says why.
watch_training() {
  local unreachable=0
  while true; do
    pause
    training_state
    case $seen in
      running) unreachable=0 ;;
      unreachable)
        unreachable=$((unreachable + 1))
        [[ $(slice_state || echo UNKNOWN) =~ ^(ACTIVE|UNKNOWN)$ ]] && ((unreachable < ATTEMPTS)) || return 0
        ;;
      *) return 0 ;;
    esac
  done
}

finished() {
  say "$RUN has finished"
  if [[ -n ${KEEP:-} ]]; then
    say "$(costs)"
  elif [[ $(slice_state) != NONE ]]; then
    stop || true # waits for those that are still writing
    slice_delete
  fi
}

# refused_by MESSAGE: trying again does not help.
refused_by() {
  on_workers 0 "$WORKER_SCRIPT logs 40" || true
  refuse "$1: see above. $(costs)"
}

babysit() {
  local began code seen=""
  trap 'say "babysit has ended; training has not. $(costs)"; exit 130' INT TERM
  while true; do
    if run_code; then
      finished
      return
    fi
    ensure_slice
    began=$SECONDS
    training_state
    if [[ $seen != running ]]; then
      if ! { stop && setup && train "$@"; }; then
        try_again "Training was not started on all workers"
        continue
      fi
      DRY_CODE=0
    fi
    watch_training
    ((SECONDS - began < 3600)) || failures=0
    [[ $seen != refused ]] || refused_by "Training has ended with 2: its input is at fault"
    [[ $(slice_state || echo UNKNOWN) == ACTIVE ]] || continue # preempted
    if [[ $seen == unreachable ]]; then
      slice_delete || true
      try_again "A worker does not answer; the slice is requested again"
      continue
    fi
    code=0
    run_code || code=$?
    # After a machine's failure, 2 may mean that the run has not begun.
    [[ $code != 2 || $seen == failed ]] || refused_by "sdxl-jax status $RUN has ended with 2"
    if [[ $code == 0 ]]; then
      finished
      return
    fi
    on_workers 0 "$WORKER_SCRIPT logs 20" || true
    try_again "Training has ended on a worker, with work left"
  done
}

main() {
  local command=${1:-}
  (($# == 0)) || shift
  case $command in
    check | create | train | babysit) settings && run_settings && check_programs ;;
    status | logs | stacks | stop | delete) settings && need_programs gcloud ;;
    setup) settings && need_programs gcloud git tar ;;
    -h | --help) usage && return ;;
    *)
      usage >&2
      refuse "${command:-no command}: give one of the commands above"
      ;;
  esac
  case $command in
    check) check_fit "$@" ;;
    create) check_fit "$@" && ensure_slice ;;
    babysit) check_fit "$@" && babysit "$@" ;;
    train) train "$@" ;;
    status)
      say "slice $NAME: $(slice_state)"
      on_workers all "$WORKER_SCRIPT state" || true
      [[ -z ${RUN:-} ]] || run sdxl-jax status "$RUN"
      ;;
    logs) on_workers "$WORKER" "$WORKER_SCRIPT follow" ;;
    stacks) on_workers all "$WORKER_SCRIPT stacks" ;;
    setup) setup ;;
    stop) stop ;;
    delete) slice_delete ;;
  esac
}

main "$@"
