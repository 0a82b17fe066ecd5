#!/usr/bin/env bash
# On a machine with a GPU and the official vLLM wheel: exactness in float32 on each model runner (the tests marked
# `gpu`), then times per token and step, written to docs/results/gpu.json and printed as a table. Both run, whatever the
# first finds. Arguments go to the second: `python -m vllm_wanspec.lab.target.gpu --help` lists them.
#
# Takes the checkout's .venv (`make install` makes it with the official wheel where there is a GPU), or the Python that
# PYTHON names, which must have vLLM, this package and its extras lab and test. Wants six small servers' memory on a
# GPU, about 24 GB, and nothing else running there; a second GPU adds tensor parallelism.
#
# Exit status: 0; 1 where a text was wrong, a bar was missed or something failed; 2 without a GPU or vLLM for it.
set -euom pipefail   # m: what is started in the background keeps its way of taking signals
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
EXACT_LIMIT_S=${WANSPEC_GPU_EXACT_LIMIT_S:-5400}
TIMES_LIMIT_S=${WANSPEC_GPU_TIMES_LIMIT_S:-10800}
GRACE_S=${WANSPEC_GPU_GRACE_S:-60}   # for servers to be stopped; the kernel ends those of a starter that is killed
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

say() { printf 'gpu_check: %s\n' "$*"; }
lacking() { printf 'gpu_check: %s\n' "$*" >&2; exit 2; }

child=
# End what runs, by its process id: interrupted, it stops the servers that it has started, each by its process group.
stop() { # STATUS
    trap - INT TERM
    if [ -n "$child" ]; then
        kill -INT "$child" 2>/dev/null || true
        wait "$child" || true
    fi
    say "interrupted; everything is stopped"
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

# Run a command for a bounded time; it is interrupted when that is over, and killed where it does not end then.
bounded() { # SECONDS COMMAND...
    local limit_s=$1 rc=0
    shift
    timeout --foreground --signal=INT --kill-after="$GRACE_S" "$limit_s" "$@" </dev/null &
    child=$!
    wait "$child" || rc=$?
    child=
    [ "$rc" -ne 124 ] || say "ended after $limit_s s: $*"
    return "$rc"
}

# The official wheel has no local version, or that of its CUDA; the CPU build has "cpu".
usable() {
    timeout 180 "$PYTHON" - <<'PY'
import sys
from importlib.metadata import version
import torch
sys.exit("cpu" in version("vllm") or not torch.cuda.is_available())
PY
}

main() {
    local started=$SECONDS exact=0 times=0
    timeout 30 nvidia-smi -L 2>/dev/null | grep -q '^GPU ' || lacking "no GPU here (nvidia-smi lists none)"
    [ -x "$PYTHON" ] || lacking "no $PYTHON: run \`make install\`, or set PYTHON"
    usable 2>/dev/null || lacking "$PYTHON has no vLLM that can use the GPU: run \`make install\`, or set PYTHON"
    mkdir -p docs/results build/gpu-check   # results; the servers' logs

    say "exactness, at most $EXACT_LIMIT_S s"
    bounded "$EXACT_LIMIT_S" "$PYTHON" -m pytest -m gpu -s tests/gpu || exact=$?
    say "times, at most $TIMES_LIMIT_S s"
    bounded "$TIMES_LIMIT_S" "$PYTHON" -m vllm_wanspec.lab.target.gpu --check --json docs/results/gpu.json \
        --markdown docs/results/gpu.md --keep-log build/gpu-check "$@" || times=$?

    say "exactness: $([ "$exact" -eq 0 ] && echo held || echo "FAILED (status $exact)")"
    say "times: $([ "$times" -eq 0 ] && echo "held" || echo "FAILED (status $times)"); $((SECONDS - started)) s in all"
    if [ "$exact" -ne 0 ] || [ "$times" -ne 0 ]; then exit 1; fi
}

main "$@"
