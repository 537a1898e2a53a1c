#!/usr/bin/env bash
# Runs on a worker of a TPU; the scripts beside it call it through ssh. Each verb ends with one line that confirms it:
# "efftrain-worker: HOST WORD", and nothing else on the machine is touched than ~/efftrain.
#
#   worker.sh install            put the new checkout in place and its packages into ~/efftrain/venv
#   worker.sh start COMMAND...   run a command in ~/efftrain/work, which no install touches; it outlives the ssh session
#   worker.sh status             none | running | finished CODE | stopped CODE | lost (the machine restarted)
#   worker.sh stop SECONDS       SIGTERM: the job saves, then ends; waits so long for that
#   worker.sh log LINES          the end of ~/efftrain/train.log
#   worker.sh follow LINES       the same, and what comes

set -euo pipefail

home=$HOME/efftrain
job=$home/job

confirm() { echo "efftrain-worker: $(hostname) $*"; }

fail() {
    echo "error: $(hostname): $1" >&2
    exit 1
}

boot() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo same; }

alive() { [[ -s $1 ]] && kill -0 "$(<"$1")" 2>/dev/null; }

# A process id of before a restart of the machine means nothing. The supervisor outlives the job until it has written
# the exit code.
running() {
    [[ -e $job/boot && ! -e $job/exit-code && $(<"$job/boot") == "$(boot)" ]] &&
        { alive "$job/supervisor" || alive "$job/pid"; }
}

status() {
    if running; then
        echo running
    elif [[ -e $job/exit-code ]]; then
        if [[ -e $job/stopped ]]; then echo "stopped $(<"$job/exit-code")"; else echo "finished $(<"$job/exit-code")"; fi
    elif [[ -e $job/boot ]]; then
        echo lost
    else
        echo none
    fi
}

install() {
    ! running || fail "a job is running; stop it first with stop.sh"
    # Earlier versions started jobs in the checkout: what they left there becomes the folder where jobs start.
    [[ -e $home/work || ! -e $home/src ]] || mv "$home/src" "$home/work"
    mkdir -p "$home/work"
    rm -rf "$home/src" "$job"
    mv "$home/src.new" "$home/src"
    export PATH=$home/bin:$PATH
    # The images bring Python 3.10; uv brings a newer one.
    if ! command -v uv >/dev/null; then
        curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$home/bin" UV_NO_MODIFY_PATH=1 sh
    fi
    [[ -x $home/venv/bin/python ]] || uv venv --quiet --python 3.12 "$home/venv"
    uv pip install --quiet --python "$home/venv/bin/python" --editable "$home/src[tpu]"
    "$home/venv/bin/python" -c 'import efftrain'
    confirm installed
}

start() {
    ! running || fail "a job is running already; stop it first with stop.sh"
    [[ -x $home/venv/bin/python ]] || fail "efftrain is not installed; run install.sh"
    rm -rf "$job"
    mkdir -p "$job"
    boot >"$job/boot"
    mkdir -p "$home/work"
    cd "$home/work"
    PATH=$home/venv/bin:$PATH nohup setsid bash "$home/src/tpu/worker.sh" supervise "$@" \
        >>"$home/train.log" 2>&1 </dev/null &
    for _ in {1..100}; do
        if [[ -s $job/pid ]]; then
            confirm started
            return
        fi
        sleep 0.1
    done
    fail "the job did not start within 10 s; see ~/efftrain/train.log"
}

supervise() { # what runs detached: the job, and then its exit code
    local code=0
    echo $$ >"$job/supervisor"
    echo "== $(date -u +%Y-%m-%dT%H:%M:%SZ) $(hostname): $*"
    "$@" &
    echo $! >"$job/pid"
    wait $! || code=$?
    echo "== $(date -u +%Y-%m-%dT%H:%M:%SZ) $(hostname): exit code $code"
    echo "$code" >"$job/exit-code.new"
    mv "$job/exit-code.new" "$job/exit-code"
}

stop() {
    if running; then
        touch "$job/stopped"
        kill -TERM "$(<"$job/pid")" 2>/dev/null || true # it may have ended just now
        for ((waited = 0; waited < $1 * 5; waited++)); do
            running || break
            sleep 0.2
        done
        ! running || fail "the job still runs $1 s after SIGTERM; it may be saving a checkpoint; look at logs.sh and call stop.sh again"
    fi
    confirm "$(status)"
}

case ${1:-} in
    install) install ;;
    start | supervise | stop) "$@" ;;
    status) confirm "$(status)" ;;
    log) tail -n "$2" "$home/train.log" | sed "s/^/[$(hostname)] /" && confirm shown ;;
    follow) tail -n "$2" -F "$home/train.log" ;;
    *) fail "worker.sh knows install, start, status, stop, log and follow, not '${1:-}'" ;;
esac
