#!/usr/bin/env bash
# Builds a shard set on Dataflow: `sdxl-jax data build` with the runner Beam, after the checks.

# shellcheck source=launch/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/dataflow.sh [--dry-run] [OPTION of sdxl-jax data build ...]

Checks and builds. --dry-run prints the commands and runs none. The command stays until the job has ended; stopped, it
cancels the job, and started again it goes on. Variables, from the environment:

SRC DST      images or shards, and the new shard set: gs://BUCKET/FOLDER
PROJECT      of Google Cloud
REGION       that of the buckets, e.g. us-west4
TEMPORARY    gs://BUCKET/FOLDER for Dataflow's own files
WORKERS      64; at most
MACHINE      n2-standard-8
DISK_GB      200; of a worker
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit
fi
need SRC "the source, gs://BUCKET/FOLDER" DST "the new shard set, gs://BUCKET/FOLDER" PROJECT "of Google Cloud" \
  REGION "that of the buckets, e.g. us-west4" TEMPORARY "gs://BUCKET/FOLDER for Dataflow's own files"
WORKERS=${WORKERS:-64} MACHINE=${MACHINE:-n2-standard-8} DISK_GB=${DISK_GB:-200}
whole_number WORKERS
whole_number DISK_GB
for variable in SRC DST TEMPORARY; do
  [[ ${!variable} == gs://* ]] || refuse "$variable=${!variable} is not seen by the workers. Give gs://BUCKET/FOLDER"
done
need_programs gcloud sdxl-jax pip
check_google_credentials
for variable in SRC DST TEMPORARY; do
  check_bucket "$variable"
done
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
run pip wheel --quiet --no-deps --wheel-dir "$wheels" "$ROOT" || fail "The wheel for the workers was not built: see above"
wheel=$(query "$wheels/sdxl_jax.whl" find "$wheels" -name '*.whl')
run sdxl-jax data build "$SRC" "$DST" "$@" --runner beam -- --runner DataflowRunner --project "$PROJECT" \
  --region "$REGION" --temp_location "$TEMPORARY" --extra_package "$wheel" --worker_machine_type "$MACHINE" \
  --max_num_workers "$WORKERS" --disk_size_gb "$DISK_GB"
