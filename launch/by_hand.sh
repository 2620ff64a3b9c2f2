#!/usr/bin/env bash
# A run of several processes without a scheduler: on this machine, or by ssh on others. See docs/pods.md.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/by_hand.sh N RECIPE ...               beit-jax train RECIPE ... in N processes on this machine
       launch/by_hand.sh HOST,HOST,... RECIPE ...   one process on each of these, by ssh; the first coordinates

It starts again until the run is done, fails for good, or RESTARTS are used up. Ctrl-C or SIGTERM: the run saves and
ends with exit code 75; once more: it ends at once.

Environment:
  BEIT_JAX=beit-jax      the program, on every host
  PORT=8476              of the coordinator, on the first host: open to the others, used by nobody
  RESTARTS=100 PAUSE=10  how often, and seconds between attempts
END
}

die() {
    echo "by_hand.sh: $*" >&2
    exit 2
}

again() { # whether the same command goes on after this exit code
    case $1 in
    9 | 10 | 75 | 134 | 137 | 143) ;;
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

start() { # process $1, in the background
    local number=$1 line command
    shift
    command=("${BEIT_JAX:-beit-jax}" train "$@" --hosts.coordinator "$address:${PORT:-8476}"
        --hosts.processes "$count" --hosts.process "$number")
    if [ "${#hosts[@]}" -eq 0 ]; then
        "${command[@]}" &
    else
        printf -v line '%q ' "${command[@]}"
        # By a shell that stays: ssh says 255 where a signal ended the program itself.
        ssh -o BatchMode=yes "${hosts[number]}" "${line% }; exit \$?" </dev/null &
    fi
    pids+=($!)
}

stop() { # one process is enough: it tells the others
    stopping=yes
    if [ "${#hosts[@]}" -eq 0 ]; then
        kill -TERM "${pids[0]}" || true
    else
        ssh -o BatchMode=yes "${hosts[0]}" "pkill -TERM -f '[p]ython.*/beit-jax train'" </dev/null || true
    fi
}

train() {
    local number pid code codes=()
    pids=()
    for ((number = 0; number < count; number++)); do
        start "$number" "$@"
    done
    for pid in "${pids[@]}"; do
        while :; do
            code=0
            wait "$pid" || code=$?
            kill -0 "$pid" 2>/dev/null || break # otherwise a signal to this script ended the waiting
        done
        codes+=("$code")
    done
    return "$(deciding "${codes[@]}")"
}

case ${1:-} in
-h | --help)
    usage
    exit 0
    ;;
"") usage >&2 && exit 2 ;;
esac
hosts=()
if [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    count=$1 address=localhost
else
    IFS=, read -ra hosts <<<"$1"
    count=${#hosts[@]} address=${hosts[0]#*@}
fi
shift
[ $# -gt 0 ] || die "name a recipe, as beit-jax train --help lists them"

stopping='' left=${RESTARTS:-100}
trap stop INT TERM
while :; do
    code=0
    train "$@" || code=$?
    if [ -n "$stopping" ] || ! again "$code" || [ "$left" -le 0 ]; then
        exit "$code"
    fi
    left=$((left - 1))
    echo "by_hand.sh: exit code $code; starting again, $left restarts are left" >&2
    sleep "${PAUSE:-10}"
done
