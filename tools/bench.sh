#!/usr/bin/env bash
# Runs benchmarks/KIND/*.py, or the one that SYSTEM names: tools/bench.sh quality|speed SYSTEM [flags]
# Every one runs even when an earlier one fails; the exit status is non-zero when any did.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1
system=$2
shift 2

shopt -s nullglob
files=(benchmarks/"$kind"/[!_]*.py)
names=("${files[@]##*/}")
names=("${names[@]%.py}")
if [ -n "$system" ]; then
    if [ ! -f "benchmarks/$kind/$system.py" ]; then
        echo "$kind: there is no benchmark of '$system'" >&2
        echo "  fix: SYSTEM=... is one of: ${names[*]:-(there are none)}" >&2
        exit 2
    fi
    names=("$system")
elif [ ${#names[@]} -eq 0 ]; then
    echo "$kind: benchmarks/$kind holds no benchmark" >&2
    exit 2
fi

failed=()
for name in "${names[@]}"; do
    echo "== $kind: $name"
    .venv/bin/python -m "benchmarks.$kind.$name" "$@" || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "$kind: failed: ${failed[*]}" >&2
    exit 1
fi
