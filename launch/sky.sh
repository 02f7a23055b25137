#!/usr/bin/env bash
# Submits a run to SkyPilot as a managed job: launch/skypilot.yaml, after the checks.

# shellcheck source=launch/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/sky.sh [--dry-run] [--section.field VALUE ...]

Checks and submits. --dry-run prints the commands and runs none. Variables, from the environment:

NAME          the job's name
ACCELERATORS  of a machine, e.g. H100:8
CONFIG RUN    configuration file; run directory, gs://BUCKET/FOLDER
NODES         1
TOPOLOGY      the GPUs as `sdxl-jax compile` names them; not set: the run is not compiled beforehand
PREFLIGHT     compile, or none
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit
fi
need NAME "the job's name, e.g. sdxl" ACCELERATORS "of a machine, e.g. H100:8" \
  CONFIG "configuration file, e.g. configs/sdxl_base_256.py" RUN "run directory, e.g. gs://BUCKET/runs/first"
NODES=${NODES:-1}
whole_number NODES
locate_config
[[ $RUN == gs://* ]] || refuse "RUN=$RUN would be lost with its machine. Give gs://BUCKET/FOLDER"
need_programs sky sdxl-jax gcloud
run sky check || refuse "SkyPilot reaches no cloud: see above"
check_bucket
if [[ -n ${TOPOLOGY:-} ]]; then
  check_fit "$@"
else
  say "TOPOLOGY is not set: nobody has checked that $CONFIG fits $ACCELERATORS"
fi
cd "$ROOT" # which SkyPilot copies to the machines
run sky jobs launch --yes --name "$NAME" --gpus "$ACCELERATORS" --num-nodes "$NODES" --env "CONFIG=$CONFIG" \
  --env "RUN=$RUN" --env "ARGUMENTS=$(quoted "$@")" launch/skypilot.yaml
