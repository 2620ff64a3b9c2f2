#!/usr/bin/env bash
# A run on a GKE cluster that xpk has made: docs/pods.md. The JobSet starts it again; nothing has to stay running here.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/gke_xpk.sh [--dry-run] run RECIPE ...   beit-jax train RECIPE ... on every host
       launch/gke_xpk.sh [--dry-run] delete           end it

--dry-run prints the xpk command instead.

Environment:
  PROJECT ZONE CLUSTER WORKLOAD   always; WORKLOAD is the name of the run for xpk
  TPU_TYPE IMAGE                  run: v5litepod-16, v6e-16 ...; a container image with beit-jax in it
  SLICES=1                        more than one: multislice
  STORAGES='NAME NAME'            storages of the cluster (xpk storage attach), mounted where they say
  RESTARTS=100                    times that the JobSet starts it again
  GRACE=120                       seconds between SIGTERM and SIGKILL
END
}

die() {
    echo "gke_xpk.sh: $*" >&2
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

run() {
    local line name flags=()
    printf -v line '%q ' "$@"
    for name in ${STORAGES:-}; do
        flags+=(--storage="$name")
    done
    # exec: xpk passes SIGTERM to the process it started, which must not be a shell. xpk restarts after 42 and 127 to
    # 255 by itself, and ends the job at every other code.
    act xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$WORKLOAD" \
        --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" "${flags[@]}" \
        --max-restarts="${RESTARTS:-100}" --restart-on-exit-codes=9,10,75 \
        --termination-grace-period-seconds="${GRACE:-120}" --command="exec beit-jax train ${line% }"
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
need PROJECT ZONE CLUSTER WORKLOAD
case $command in
run)
    need TPU_TYPE IMAGE
    [ $# -gt 0 ] || die "run: name a recipe, as beit-jax train --help lists them"
    run "$@"
    ;;
delete) act xpk workload delete --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$WORKLOAD" ;;
*) die "no command $command; --help lists them" ;;
esac
