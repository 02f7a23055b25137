#!/usr/bin/env bash
# What happens on a worker of a slice. tpu-vm.sh calls it there, through ssh.
#
# Training is a unit of systemd, which outlives the ssh connection, gets SIGTERM when the machine is shut down, and logs
# to the journal. It is started again where the machine may be at fault, but not after 2 (the user's input is), nor
# after 143 and 130 (somebody stopped it).
set -euo pipefail

UNIT=sdxl-jax
PYTHON=$HOME/venv/bin/python
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# retry COMMAND...: five times, as package servers and locks come back.
retry() {
  local try
  for try in 1 2 3 4 5; do
    "$@" && return
    echo "try $try of 5 failed: $1" >&2
    sleep "${RETRY_SECONDS:-10}"
  done
  return 1
}

# setup COMMIT: Python 3.12 and the locked packages, the same on every worker.
setup() {
  export PATH=$HOME/.local/bin:$PATH PIP_BREAK_SYSTEM_PACKAGES=1
  type -P uv >/dev/null || retry python3 -m pip install --user --quiet uv
  [[ -x $PYTHON ]] || retry uv venv --quiet --clear --python 3.12 "$HOME/venv"
  retry uv pip sync --quiet --python "$PYTHON" launch/requirements-tpu.txt
  retry uv pip install --quiet --python "$PYTHON" --no-deps --editable .
  # What a run's config.json has as its commit is read here.
  mkdir -p .git
  echo "$1" >.git/HEAD
  # jax asks for it on v5e and newer: start-up and shutdown are faster.
  echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null
}

# start ARGUMENTS...: `sdxl-jax train ARGUMENTS`, detached. What ran before is stopped first.
start() {
  stop
  sudo systemctl reset-failed "$UNIT" 2>/dev/null || true
  # What a killed process leaves behind: "The TPU is already in use". Only after that process has ended.
  sudo rm -f /tmp/libtpu_lockfile
  {
    echo "# Written at $(date -u +%FT%TZ) by launch/lib/worker.sh."
    local name
    for name in JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID; do
      [[ -z ${!name:-} ]] || echo "export $name=${!name}"
    done
    echo "unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY" # jax's processes hang on them
    printf 'exec %q train' "$HOME/venv/bin/sdxl-jax"
    printf ' %q' "$@"
    echo
  } >"$HOME/train.sh"
  touch "$HOME/train.env"
  chmod 600 "$HOME/train.env"
  sudo systemd-run --quiet --unit="$UNIT" --uid="$(id -un)" --working-directory="$PWD" --setenv=HOME="$HOME" \
    --setenv=PYTHONUNBUFFERED=1 --property=EnvironmentFile="$HOME/train.env" \
    --property=Restart=on-failure --property=RestartSec=30 --property=RestartPreventExitStatus="2 130 143" \
    --property=StartLimitIntervalSec=1h --property=StartLimitBurst=5 \
    --property=KillMode=mixed --property=TimeoutStopSec=300 \
    bash "$HOME/train.sh"
}

# SIGTERM, and up to five minutes for the checkpoint.
stop() { sudo systemctl stop "$UNIT" 2>/dev/null || true; }

# One line: the unit's state (active, activating, inactive, failed) and the exit code of its last end.
state() {
  local state code
  state=$(systemctl show --property=ActiveState --value "$UNIT")
  code=$(systemctl show --property=ExecMainStatus --value "$UNIT")
  echo "worker $(hostname): $state $code"
}

# logs LINES
logs() { sudo journalctl --unit "$UNIT" --output cat --no-pager --lines "$1"; }

follow() { sudo journalctl --unit "$UNIT" --output cat --lines 100 --follow; }

# Every thread's stack, into the log.
stacks() { sudo systemctl kill --kill-who=main --signal=SIGUSR1 "$UNIT"; }

"$@"
