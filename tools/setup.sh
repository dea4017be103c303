#!/usr/bin/env bash
# Makes .venv from pyproject.toml and constraints.txt. Called by the Makefile: tools/setup.sh [PYTHON]
#
# `.venv/.building` marks a set-up that has not reached its end: packages may be half written then, so the next call
# begins anew (pip's cache keeps the downloads). `.venv/.stamp` is written last and holds the project's path, because a
# virtual environment does not survive being moved.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=${1:-}
venv=.venv

usable() { # a Python of a tested version that can make virtual environments
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${wanted:-python3.13 python3.12 python3.11 python3}; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    if [ -n "$wanted" ]; then
        echo "setup: PYTHON=$wanted is not a Python 3.11, 3.12 or 3.13 with the venv module" >&2
    else
        echo "setup: found no Python 3.11, 3.12 or 3.13 with the venv module (on Debian: apt install python3-venv)" >&2
    fi
    echo "  fix: install one, or name it: make setup PYTHON=/path/to/python3.12" >&2
    return 1
}

fits() { # the environment there is: whole, made here, and of a tested version
    [ ! -e "$venv/.building" ] && [ -f "$venv/pyvenv.cfg" ] && usable "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        { [ ! -s "$venv/.stamp" ] || [ "$(cat "$venv/.stamp")" = "$PWD" ]; }
}

trap 'echo "setup: interrupted; the next call begins anew" >&2; exit 130' INT TERM

if ! fits; then
    python=$(find_python)
    echo "setup: making $venv with $("$python" --version)$([ -e "$venv" ] && echo ' (anew: the one here is incomplete or was moved)' || true)"
    rm -rf "$venv.old"
    if [ -e "$venv" ]; then mv "$venv" "$venv.old"; fi # at once: a half deleted environment would look whole
    "$python" -m venv "$venv"
    rm -rf "$venv.old"
fi

touch "$venv/.building"
rm -f "$venv/.stamp"
log=$venv/setup.log
: >"$log"
echo "setup: installing vitkit and its tools (torch and, on Linux, its CUDA libraries are several GB; log: $log)"
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    -c constraints.txt -e '.[dev]' 2>&1 | tee "$log" | awk '
        /^(Collecting|Processing) /         { n++; if (n % 20 == 0) print "  " n " packages looked up"; fflush() }
        /Downloading .*\([0-9.]+ (MB|GB)\)/ { if ($0 ~ /\([0-9.]+ GB\)|\([0-9][0-9][0-9]+\.[0-9] MB\)/) print; fflush() }
        /^Installing collected packages/    { print "  unpacking"; fflush() }'; then
    echo "setup: pip failed; the end of $log:" >&2
    grep -v '^WARNING: Location' "$log" | tail -n 25 >&2
    exit 1
fi
# torchattacks asks for a `requests` of 2020 that contradicts the documentation's; nothing of it that is used here needs it.
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off --quiet \
    --no-deps -c constraints.txt torchattacks 2>&1 | tee -a "$log" >/dev/null; then
    echo "setup: pip failed on torchattacks; the end of $log:" >&2
    tail -n 25 "$log" >&2
    exit 1
fi
rm -f "$venv/.building"
printf '%s' "$PWD" >"$venv/.stamp"
echo "setup: done ($("$venv/bin/python" -c 'import platform, torch; print("Python", platform.python_version() + ", torch", torch.__version__)'))"
