#!/usr/bin/env bash
# Submits a run to Kubernetes as a JobSet: TPU slices of GKE, or GPU nodes.

# shellcheck source=launch/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/kubernetes.sh [--dry-run] [--section.field VALUE ...]

Checks, prints the manifest and applies it. --dry-run prints the commands and the manifest, and applies nothing.
Variables, from the environment:

NAME IMAGE       the JobSet's name; an image of launch/Dockerfile
CONFIG RUN       configuration file in the image; run directory, gs://BUCKET/FOLDER
TOPOLOGY         TPUs: e.g. v5e:4x4, a folder of launch/gke/overlays
SLICES           TPUs: 1; slices of this topology
GPUS NODES       GPUs: of a node, and nodes (1)
CAPACITY         GKE: on-demand, spot, flex-start, or reservation with RESERVATION
SERVICE_ACCOUNT  of Kubernetes; default. It must be allowed to use the bucket of RUN
QUEUE            Kueue's LocalQueue, if the cluster has one
NAMESPACE        default
PREFLIGHT        compile, or none
TEXT
}

SPEC=/spec/replicatedJobs/0/template/spec
POD=$SPEC/template/spec

# A JSON string. $( is not for Kubernetes to expand.
json() {
  local text=$1
  [[ $text != *[[:cntrl:]]* ]] || refuse "A name or argument has a line break or control character: $(quoted "$text")"
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//\$(/\$\$(}"
}

# operation add|replace PATH VALUE
operation() { printf '%s{"op": "%s", "path": "%s", "value": %s}' "${comma:-}" "$1" "$2" "$3" && comma=$',\n '; }

# What distinguishes this run from the manifest in the repository, as a JSON patch.
patch() {
  local comma="" arguments="" word key
  for word in train "$CONFIG" --run-dir "$RUN" "$@"; do
    arguments+="${arguments:+, }$(json "$word")"
  done
  printf '['
  operation replace /metadata/name "$(json "$NAME")"
  operation replace "$POD/serviceAccountName" "$(json "$SERVICE_ACCOUNT")"
  operation replace "$POD/containers/0/image" "$(json "$IMAGE")"
  operation replace "$POD/containers/0/args" "[$arguments]"
  [[ -z ${QUEUE:-} ]] || operation add /metadata/labels/kueue.x-k8s.io~1queue-name "$(json "$QUEUE")"
  key=$POD/nodeSelector/cloud.google.com
  case $CAPACITY in
    spot) operation add "$key~1gke-spot" '"true"' ;;
    flex-start) operation add "$key~1gke-flex-start" '"true"' ;;
    reservation) operation add "$key~1reservation-name" "$(json "$RESERVATION")" ;;
  esac
  if [[ -n $GPUS ]]; then
    operation replace "$SPEC/parallelism" "$NODES"
    operation replace "$SPEC/completions" "$NODES"
    operation replace "$POD/containers/0/env/0/value" "\"$NODES\""
    operation replace "$POD/containers/0/resources/limits/nvidia.com~1gpu" "$GPUS"
  else
    operation replace /spec/replicatedJobs/0/replicas "$SLICES"
  fi
  printf ']\n'
}

settings() {
  GPUS=${GPUS:-} NODES=${NODES:-1} SLICES=${SLICES:-1} CAPACITY=${CAPACITY:-on-demand} NAMESPACE=${NAMESPACE:-default}
  SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
  [[ -n $GPUS ]] || need TOPOLOGY "of TPUs, e.g. v5e:4x4; or set GPUS, the number of GPUs of a node"
  need NAME "the JobSet's name, e.g. sdxl" IMAGE "an image of launch/Dockerfile, in a registry that the cluster reads" \
    CONFIG "configuration file, e.g. configs/sdxl_base_256.py" RUN "run directory, e.g. gs://BUCKET/runs/first"
  [[ -z $GPUS ]] || whole_number GPUS
  whole_number NODES
  whole_number SLICES
  one_of CAPACITY on-demand spot flex-start reservation
  [[ $CAPACITY != reservation ]] || need RESERVATION "the reservation's name"
  MANIFEST=$ROOT/launch/gpu
  [[ -n $GPUS ]] || MANIFEST=$ROOT/launch/gke/overlays/${TOPOLOGY/:/-}
  [[ -d $MANIFEST ]] || refuse "TOPOLOGY=$TOPOLOGY has no folder in launch/gke/overlays. There are: \
$(cd "$ROOT/launch/gke/overlays" && echo *)"
  locate_config
  check_run_directory
}

check() {
  need_programs kubectl sdxl-jax
  [[ $RUN != gs://* ]] || need_programs gcloud
  run kubectl config current-context >/dev/null ||
    refuse "kubectl has no cluster. Run: gcloud container clusters get-credentials CLUSTER --location LOCATION"
  run kubectl get crd jobsets.jobset.x-k8s.io --output name >/dev/null ||
    refuse "The cluster has no JobSet, or does not answer: https://jobset.sigs.k8s.io/docs/installation"
  run kubectl get serviceaccount "$SERVICE_ACCOUNT" --namespace "$NAMESPACE" --output name >/dev/null ||
    refuse "The namespace $NAMESPACE has no service account $SERVICE_ACCOUNT. Create it, or set SERVICE_ACCOUNT"
  check_bucket
  if [[ -n ${TOPOLOGY:-} ]]; then
    check_fit "$@"
  else
    say "TOPOLOGY is not set: nobody has checked that $CONFIG fits the GPUs"
  fi
}

main() {
  local folder
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    return
  fi
  settings
  [[ -n $GPUS ]] || ((SLICES == 1)) || set -- --mesh.slices "$SLICES" "$@"
  check "$@"
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # this folder
  trap "rm -rf '$folder'" EXIT
  patch "$@" >"$folder/patch.json"
  printf 'resources: ["%s"]\npatches: [{path: patch.json, target: {kind: JobSet}}]\n' \
    "$(realpath --relative-to="$folder" "$MANIFEST")" >"$folder/kustomization.yaml"
  say "+ $(quoted kubectl kustomize "$folder")"
  kubectl kustomize "$folder" | tee "$folder/jobset.yaml" # changes nothing: in a dry run too
  run kubectl apply --namespace "$NAMESPACE" --filename "$folder/jobset.yaml"
}

main "$@"
