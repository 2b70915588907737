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
# uv takes hashes from a file of constraints, which pip does not; it is itself installed by its own.
sed -n '/^uv==/,/[^\\]$/p' constraints.txt >$venv/uv.txt
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
# It does not read pip's settings, and a mirror may first have to fetch a gigabyte itself.
export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$("${pip[@]}" config get global.index-url 2>/dev/null || true)}}
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300}
# A build of torch from another index, such as the CPU's, is kept. It has other files, so that one hash is missing; what
# has a hash is compared with it all the same.
hashes=--require-hashes
! $venv/bin/python -c 'from importlib.metadata import version; exit("+" not in version("torch"))' 2>/dev/null || hashes=
uv=("$venv/bin/uv" pip install --require-build-hashes --preview-features build-dependency-hashes --compile-bytecode
    --constraints constraints.txt --build-constraints constraints.txt --python "$venv/bin/python")
{
    "${pip[@]}" install --quiet --no-deps --require-hashes --requirement $venv/uv.txt &&
        "${uv[@]}" $hashes --requirement pyproject.toml --extra dev &&
        "${uv[@]}" --no-deps --editable .
} 2>&1 | tee $log | { grep -E '^ *(Resolved|Downloading|Prepared|Installed) ' || true; } || {
    tail -n 15 $log >&2
    fail "the installation failed; see the lines above, or all of them in $log"
}
rm -f $unfinished $venv/current-*
touch "$stamp"
