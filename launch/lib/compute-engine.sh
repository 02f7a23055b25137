# shellcheck shell=bash
# A slice as a managed instance group of Compute Engine: v5p, v6e, tpu7x. Sourced by tpu-vm.sh.
#
# Machines of four chips. All of them are created, or none (bulk). A group that spot took away is deleted and created
# again. Several slices are left to GKE.

# Sets TYPE, FAMILY and HOSTS.
choose_machine() {
  case $CHIP in
    v5p) TYPE=ct5p-hightpu-4t FAMILY=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    v6e) TYPE=ct6e-standard-4t FAMILY=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    tpu7x) TYPE=tpu7x-standard-4t FAMILY="" ;;
    *) refuse "Compute Engine does not serve $CHIP. Set BACKEND=tpu-api" ;;
  esac
  FAMILY=${IMAGE_FAMILY:-$FAMILY}
  [[ -n $FAMILY ]] || refuse "Set IMAGE_FAMILY to the family of ubuntu-os-accelerator-images that serves $CHIP"
  ((CHIPS % 4 == 0)) || refuse "TOPOLOGY=$TOPOLOGY: Compute Engine's machines have four chips. Give a multiple of them"
  HOSTS=$((CHIPS / 4))
  ((SLICES == 1)) || refuse "SLICES=$SLICES: Compute Engine has one slice per group. Use launch/kubernetes.sh"
}

slice_create() {
  local -a flags=() policy=() size=(--size "$HOSTS" --target-size-policy-mode bulk)
  case $CAPACITY in
    spot) flags=(--provisioning-model SPOT --instance-termination-action STOP) ;;
    flex-start)
      flags=(--provisioning-model FLEX_START --max-run-duration "${MAX_HOURS}h" --instance-termination-action DELETE)
      flags+=(--reservation-affinity none)
      size=(--size 0)
      ;;
    reservation) flags=(--reservation-affinity specific --reservation "$RESERVATION") ;;
  esac
  [[ -z $SERVICE_ACCOUNT ]] || flags+=(--service-account "$SERVICE_ACCOUNT")
  run gcloud compute instance-templates create "$NAME" --machine-type "$TYPE" --image-family "$FAMILY" \
    --image-project ubuntu-os-accelerator-images --boot-disk-size 100GB --maintenance-policy TERMINATE \
    --scopes cloud-platform "${flags[@]}" || return
  if ((HOSTS > 1)); then
    run gcloud compute resource-policies create workload-policy "$NAME" --type high-throughput \
      --accelerator-topology "$ARRANGEMENT" --region "${ZONE%-*}" || return
    policy=(--workload-policy "$NAME")
  fi
  run gcloud alpha compute instance-groups managed create "$NAME" --zone "$ZONE" --template "$NAME" \
    "${size[@]}" "${policy[@]}" || return
  [[ $CAPACITY != flex-start ]] ||
    run gcloud compute instance-groups managed resize-requests create "$NAME" --zone "$ZONE" --resize-request "$NAME" \
      --resize-by "$HOSTS" --requested-run-duration "${MAX_HOURS}h"
}

# In the words of the Cloud TPU API: NONE, PROVISIONING, ACTIVE, SUSPENDED.
slice_state() {
  local answer running
  if ! answer=$(query "" gcloud compute instance-groups managed list-instances "$NAME" --zone "$ZONE" \
    --format 'value(instanceStatus)' 2>&1); then
    if grep --quiet --ignore-case 'not.found' <<<"$answer"; then
      echo NONE
      return
    fi
    say "$answer"
    return 1
  fi
  running=$(grep --count '^RUNNING$' <<<"$answer" || true)
  if [[ -n $DRY_RUN ]]; then
    echo "$DRY_STATE"
  elif grep --quiet --extended-regexp '^(STOPP|SUSPEND|TERMINATED)' <<<"$answer"; then
    echo SUSPENDED
  elif ((running == HOSTS)); then
    echo ACTIVE
  else
    echo PROVISIONING
  fi
}

# What is gone already is passed over, so that a half-made slice can be deleted too.
slice_delete() {
  run gcloud compute instance-groups managed delete "$NAME" --zone "$ZONE" --quiet || say "no group $NAME"
  run gcloud compute instance-templates delete "$NAME" --quiet || say "no template $NAME"
  ((HOSTS == 1)) || run gcloud compute resource-policies delete "$NAME" --region "${ZONE%-*}" --quiet
}

instances() {
  query "$NAME-0" gcloud compute instance-groups managed list-instances "$NAME" --zone "$ZONE" \
    --format 'value(instance.basename())' | sort
}

# on_workers NUMBER|all COMMAND. Whether jax detects the processes of such a group is unknown: they are numbered here.
on_workers() {
  local -a names pids=()
  local number pid code=0
  mapfile -t names < <(instances)
  for number in "${!names[@]}"; do
    [[ $1 == all || $1 == "$number" ]] || continue
    run gcloud compute ssh "${names[number]}" --zone "$ZONE" --strict-host-key-checking no --quiet --command \
      "export JAX_COORDINATOR_ADDRESS=${names[0]}:8476 JAX_NUM_PROCESSES=${#names[@]} JAX_PROCESS_ID=$number; $2" &
    pids+=($!)
  done
  ((${#pids[@]} > 0)) || return 1
  for pid in "${pids[@]}"; do
    wait "$pid" || code=$?
  done
  return "$code"
}

# copy_to_workers FILE NAME: into every worker's home directory.
copy_to_workers() {
  local -a names
  local each
  mapfile -t names < <(instances)
  for each in "${names[@]}"; do
    run gcloud compute scp "$1" "$each:$2" --zone "$ZONE" --strict-host-key-checking no --quiet || return
  done
}
