#!/usr/bin/env bash
# Submits a run to Slurm: launch/slurm.sbatch, after the checks.

# shellcheck source=launch/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/slurm.sh [--dry-run] [--section.field VALUE ...]

Checks and submits. --dry-run prints the commands and runs none. Variables, from the environment:

CONFIG RUN  configuration file; run directory on a disk that all nodes see, or gs://BUCKET/FOLDER
NODES       1
GPUS        of a node; one task per GPU. Not set: one task per node, on CPUs
TOPOLOGY    the GPUs as `sdxl-jax compile` names them; not set: the run is not compiled beforehand
PREFLIGHT   compile, or none
SBATCH_*    sbatch's own: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, SBATCH_JOB_NAME
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit
fi
need CONFIG "configuration file, e.g. configs/sdxl_base_256.py" RUN "run directory, e.g. /shared/runs/first"
NODES=${NODES:-1} GPUS=${GPUS:-}
whole_number NODES
[[ -z $GPUS ]] || whole_number GPUS
[[ -f $CONFIG ]] || refuse "There is no configuration file CONFIG=$CONFIG"
check_run_directory
need_programs sbatch sdxl-jax
[[ $RUN != gs://* ]] || need_programs gcloud
check_bucket
if [[ -n ${TOPOLOGY:-} ]]; then
  check_fit "$@"
else
  say "TOPOLOGY is not set: nobody has checked that $CONFIG fits the nodes"
fi

# Not --gpus-per-task: each task sees all GPUs of its node, jax takes the one with the task's number, and NCCL reaches
# the others directly.
tasks=(--ntasks-per-node 1)
[[ -z $GPUS ]] || tasks=(--ntasks-per-node "$GPUS" --gpus-per-node "$GPUS")
run sbatch --nodes "$NODES" "${tasks[@]}" "$ROOT/launch/slurm.sbatch" "$CONFIG" "$RUN" "$@"
