#!/usr/bin/env bash
# Bring .venv up to date: make_venv.sh PYTHON STAMP. The Makefile calls it when the file STAMP does not exist.
#
# An environment of another interpreter or folder, or with an interrupted installation, is made again: pip takes a
# half-copied package for an installed one. Only environments that this script made are removed; another one at .venv
# is completed if it has pip.
set -euo pipefail

python=$1
stamp=$2
venv=.venv
mark=$venv/made-by-make # its content names the interpreter and the folder
unfinished=$venv/installing
log=$venv/install.log

fail() {
    echo "make: $*" >&2
    exit 1
}

recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_environment() {
    mkdir $venv
    echo "$identity" >$mark
    touch $unfinished
    # Debian and Ubuntu ship venv without ensurepip unless python3-venv is installed; pip may still be there.
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv $venv
    elif "$python" -m pip --version >/dev/null 2>&1 && "$python" -m venv --without-pip $venv; then
        "$python" -m pip --python $venv/bin/python install --quiet pip
    else
        rm -rf $venv
        fail "$python cannot make an environment with pip; on Debian or Ubuntu: apt-get install python3-venv"
    fi
}

# pip prints hundreds of lines, and with --quiet nothing for minutes: show the progress in a few lines.
show_progress() {
    local line packages=0
    while IFS= read -r line; do
        case $line in
            "Collecting "*) ((++packages % 25)) || echo "  $packages packages resolved" ;;
            *Downloading*[0-9][0-9].[0-9]" MB)") echo "  ${line#"${line%%[![:space:]]*}"}" ;;
            "Installing collected packages:"*) echo "  installing the packages, a minute or more" ;;
        esac
    done
}

[ -n "$python" ] || fail "no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3"
recent "$python" || fail "$python is not Python 3.11 or newer; name one: make PYTHON=/path/to/python3"
identity="$("$python" -V) $python in $PWD"

if [ -e $mark ] && { [ -e $unfinished ] || [ "$(cat $mark)" != "$identity" ]; }; then
    echo "making $venv again: its installation was interrupted, or it is of another Python or folder"
    rm -rf $venv
fi
if [ ! -e $venv ]; then
    echo "making $venv with $("$python" -V)"
    make_environment
fi
recent $venv/bin/python && $venv/bin/python -m pip --version >/dev/null 2>&1 ||
    fail "$venv has no pip or no Python 3.11 or newer; remove it (rm -r $venv) and run make again"

echo "installing ncsn and its dependencies (details: $log)"
touch $unfinished
PYTHONUNBUFFERED=1 $venv/bin/python -m pip install --disable-pip-version-check --progress-bar off \
    --constraint constraints.txt --editable '.[dev]' 2>&1 | tee $log | show_progress || {
    tail -n 15 $log >&2
    fail "the installation failed; see the lines above, or all of them in $log"
}
rm -f $unfinished $venv/current-*
touch "$stamp"
