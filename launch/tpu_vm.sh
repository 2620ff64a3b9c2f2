#!/usr/bin/env bash
# A run on TPU VMs of Google Cloud, from the request for them to their deletion: docs/pods.md.
# shellcheck disable=SC2153 # NAME comes from the environment
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/tpu_vm.sh [--dry-run] COMMAND [ARGUMENTS]

  create            request the VMs (a queued resource) and wait until they are there
  setup             on every VM: install the package; mount BUCKET and NFS where they are given
  ssh 'COMMAND'     run a command on every VM
  run RECIPE ...    beit-jax train RECIPE ... on every VM, once; relative paths begin at the home directory
  resume RECIPE ... the same, again and again until it is done, fails for good, or RESTARTS are used up;
                    VMs that were taken away are deleted, requested again and set up
  stop              SIGTERM to the run: it saves and ends with exit code 75 (end `resume` first)
  delete            delete the VMs and the request

--dry-run prints the gcloud commands instead.

Environment:
  PROJECT ZONE NAME      always; NAME is that of the request, and what the VMs are called by
  ACCELERATOR RUNTIME    create, resume: v5litepod-16 v2-alpha-tpuv5-lite, v6e-16 v2-alpha-tpuv6e ...
  REPOSITORY REVISION    setup, resume: what git clones, and the commit or tag
  SLICES=1               more than one: multislice
  SPOT=yes               cheaper VMs that may be taken away
  CREATE_FLAGS, SSH_FLAGS  more flags for these gcloud commands: '--network=N --subnetwork=S', '--internal-ip'
  BUCKET                 a bucket, mounted read-only at DATA_DIR (/mnt/data) by gcsfuse
  NFS                    SERVER:/SHARE, mounted at RUNS_DIR (/mnt/runs)
  PYTHON=3.12            version to install the package for
  RESTARTS=100 PAUSE=30 POLL=30   how often, and seconds between attempts and between looks at the request
END
}

die() {
    echo "tpu_vm.sh: $*" >&2
    exit 2
}

need() {
    local name
    for name in "$@"; do
        [ -n "${!name:-}" ] || die "$name is not set; --help says what it is"
    done
}

act() { # runs a command, or prints it
    local line
    printf -v line '%q ' "$@"
    if [ -n "$dry" ]; then echo "${line% }"; else "$@"; fi
}

queued() {
    act gcloud compute tpus queued-resources "$@" --project="$PROJECT" --zone="$ZONE"
}

everywhere() { # all at once: by default gcloud waits for 64 hosts to end before it begins with the others
    local flags
    read -ra flags <<<"${SSH_FLAGS:-}"
    queued ssh "$NAME" --node=all --worker=all --batch-size=all "${flags[@]}" --command="$1"
}

request() {
    local flags
    read -ra flags <<<"${CREATE_FLAGS:-}"
    if [ "${SLICES:-1}" -gt 1 ]; then
        flags+=(--node-count="$SLICES" --node-prefix="$NAME")
    else
        flags+=(--node-id="$NAME")
    fi
    [ -z "${SPOT:-}" ] || flags+=(--spot)
    queued create "$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${flags[@]}"
}

state() {
    queued describe "$NAME" --format='value(state.state)'
}

await() {
    local now
    while now=$(state); do
        [ -z "$dry" ] || { echo "$now" && return; }
        case $now in
        ACTIVE) return ;;
        FAILED | SUSPENDING | SUSPENDED) die "$NAME is $now; gcloud compute tpus queued-resources describe says why" ;;
        esac
        echo "tpu_vm.sh: $NAME is $now" >&2
        sleep "${POLL:-30}"
    done
    die "the state of $NAME cannot be read"
}

remove() {
    queued delete "$NAME" --force --quiet
}

# shellcheck disable=SC2016 # what is in single quotes is for the hosts
setup() {
    local script
    script='set -eu
export PATH="$HOME/.local/bin:$PATH" DEBIAN_FRONTEND=noninteractive
command -v uv >/dev/null || python3 -m pip install --user --quiet uv
[ -d beit-jax ] || git clone --quiet '"$(printf %q "$REPOSITORY")"' beit-jax
cd beit-jax
git fetch --quiet --tags origin
git checkout --quiet '"$(printf %q "$REVISION")"'
[ -x .venv/bin/python ] || uv venv --quiet --python '"$(printf %q "${PYTHON:-3.12}")"' .venv
uv pip install --quiet --python .venv/bin/python -c constraints.txt -e ".[train]" "jax[tpu]"'
    if [ -n "${BUCKET:-}" ]; then
        script+='
command -v gcsfuse >/dev/null || { echo "gcsfuse is not installed on $(hostname): docs/pods.md, Data" >&2; exit 2; }
dir='"$(printf %q "${DATA_DIR:-/mnt/data}")"'
mountpoint -q "$dir" || {
    sudo mkdir -p "$dir"
    sudo chown "$(id -u):$(id -g)" "$dir"
    gcsfuse -o ro --implicit-dirs --metadata-cache-ttl-secs=-1 --stat-cache-max-size-mb=-1 \
        '"$(printf %q "$BUCKET")"' "$dir"
}'
    fi
    if [ -n "${NFS:-}" ]; then
        script+='
dir='"$(printf %q "${RUNS_DIR:-/mnt/runs}")"'
mountpoint -q "$dir" || {
    command -v mount.nfs >/dev/null || { sudo apt-get update -qq; sudo apt-get install -y -qq nfs-common; }
    sudo mkdir -p "$dir"
    sudo mount -t nfs -o hard,lookupcache=positive '"$(printf %q "$NFS")"' "$dir"
}'
    fi
    everywhere "$script"
}

again() { # whether the same command goes on after this exit code
    case $1 in
    9 | 10 | 75 | 134 | 137 | 143 | 255) ;;
    *) return 1 ;;
    esac
}

deciding() { # of the exit codes of all processes the one that counts: those that ended for good come first
    local code found=0
    for code in "$@"; do
        if [ "$code" -ne 0 ]; then
            found=$code
            again "$code" || break
        fi
    done
    echo "$found"
}

train() {
    local line command log status=0 codes
    printf -v line '%q ' "$@"
    # Each host prints its code and ends with 0: gcloud returns the code of one host only, and takes 255 for a broken
    # connection and starts the command again.
    command="trap : TERM; code=0; \$HOME/beit-jax/.venv/bin/beit-jax train ${line% } || code=\$?; "
    command+="echo beit-jax exit code \$code on \$(hostname)"
    if [ -n "$dry" ]; then
        everywhere "$command"
        return
    fi
    log=$(mktemp)
    everywhere "$command" | tee "$log" || status=${PIPESTATUS[0]}
    codes=$(sed -n 's/.*beit-jax exit code \([0-9]*\) on .*/\1/p' "$log")
    rm -f "$log"
    # Words: the codes. A host that says nothing was lost. gcloud's own code says whether one was.
    # shellcheck disable=SC2086
    status=$(deciding ${codes:-255} "$([ "$status" -eq 0 ] && echo 0 || echo 255)")
    return "$status"
}

resume() {
    local code left=${RESTARTS:-100} now
    while :; do
        code=0
        train "$@" || code=$?
        again "$code" || return "$code"
        [ "$left" -gt 0 ] || return "$code"
        left=$((left - 1))
        echo "tpu_vm.sh: exit code $code; starting again, $left restarts are left" >&2
        sleep "${PAUSE:-30}"
        now=$(state) || die "the state of $NAME cannot be read"
        case $now in
        FAILED | SUSPENDING | SUSPENDED)
            remove || die "$NAME is $now and cannot be deleted"
            request || die "$NAME cannot be requested again"
            ;;
        esac
        await
        setup || die "setup failed on a host" # a repaired VM is a new one
    done
}

dry=
case ${1:-} in --dry-run) dry=yes && shift ;; esac
command=${1:-}
case $command in
-h | --help)
    usage
    exit 0
    ;;
"") usage >&2 && exit 2 ;;
esac
shift
need PROJECT ZONE NAME
case $command in create | resume) need ACCELERATOR RUNTIME ;; esac
case $command in setup | resume) need REPOSITORY REVISION ;; esac
case $command in
run | resume) [ $# -gt 0 ] || die "$command: name a recipe, as beit-jax train --help lists them" ;;
ssh) [ $# -eq 1 ] || die "ssh: expected one argument, the command" ;;
esac

case $command in
create) request && await ;;
setup) setup ;;
ssh) everywhere "$1" ;;
run) train "$@" ;;
resume) resume "$@" ;;
stop) queued ssh "$NAME" --node=0 --worker=0 --command="pkill -TERM -f '[p]ython.*/beit-jax train'" ;;
delete) remove ;;
*) die "no command $command; --help lists them" ;;
esac
