# shellcheck shell=bash
# A slice, or several, as a queued resource of the Cloud TPU API: v4, v5e, v5p, v6e. Sourced by tpu-vm.sh.
#
# This API is maintained, no longer developed. Of these chips, Compute Engine has v5p and v6e.

# Sets TYPE and VERSION.
choose_machine() {
  case $CHIP in
    v4) TYPE=v4-$((2 * CHIPS)) VERSION=tpu-ubuntu2204-base ;; # v4 and v5p count cores, two per chip
    v5e) TYPE=v5litepod-$CHIPS VERSION=v2-alpha-tpuv5-lite ;;
    v5p) TYPE=v5p-$((2 * CHIPS)) VERSION=v2-alpha-tpuv5 ;;
    v6e) TYPE=v6e-$CHIPS VERSION=v2-alpha-tpuv6e ;;
    *) refuse "The Cloud TPU API does not serve $CHIP. Set BACKEND=compute-engine" ;;
  esac
  VERSION=${RUNTIME_VERSION:-$VERSION}
}

slice_create() {
  local -a track=() nodes=(--node-id "$NAME") flags=()
  ((SLICES == 1)) || nodes=(--node-count "$SLICES" --node-prefix "$NAME")
  case $CAPACITY in
    spot) flags=(--spot) ;;
    flex-start) track=(alpha) flags=(--provisioning-model flex-start --max-run-duration "${MAX_HOURS}h") ;;
    reservation) track=(alpha) flags=(--reserved --reservation "$RESERVATION") ;;
  esac
  [[ -z $SERVICE_ACCOUNT ]] || flags+=(--service-account "$SERVICE_ACCOUNT")
  run gcloud "${track[@]}" compute tpus queued-resources create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" \
    --runtime-version "$VERSION" "${nodes[@]}" --scopes cloud-platform "${flags[@]}"
}

# NONE, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDING, SUSPENDED (preempted), FAILED.
slice_state() {
  local answer
  if answer=$(query "$DRY_STATE" gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" \
    --format 'value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif grep --quiet --ignore-case 'not.found' <<<"$answer"; then
    echo NONE
  else
    say "$answer"
    return 1
  fi
}

slice_delete() {
  run gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet
}

# on_workers NUMBER|all COMMAND. A number is a worker of the first slice.
on_workers() {
  local node=0
  [[ $1 != all ]] || node=all
  run gcloud compute tpus queued-resources ssh "$NAME" --zone "$ZONE" --node "$node" --worker "$1" --command "$2" \
    --strict-host-key-checking no --quiet
}

# copy_to_workers FILE NAME: into every worker's home directory.
copy_to_workers() {
  run gcloud compute tpus queued-resources scp "$1" "$NAME:$2" --zone "$ZONE" --node all --worker all \
    --strict-host-key-checking no --quiet
}
