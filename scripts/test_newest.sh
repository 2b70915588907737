#!/usr/bin/env bash
# Run the tests with the newest release of everything that pyproject.toml allows: test_newest.sh [PYTEST-ARGUMENT...]
#
# The environment .venv-newest extends .venv and installs only packages with a newer release: little while the pins are
# fresh, and up to as much as .venv (3 GB to download, 7 GB on disk) with a new torch. .venv keeps the pinned versions.
set -euo pipefail

venv=.venv-newest
python=$venv/bin/python
log=$venv/install.log

pinned=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -rf $venv
.venv/bin/python -m venv --without-pip $venv
echo "$pinned" >"$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pinned.pth"

echo "installing releases newer than constraints.txt into $venv (details: $log)"
$python -m pip install --disable-pip-version-check --progress-bar off --upgrade --upgrade-strategy eager --editable '.[dev]' >$log 2>&1 || {
    tail -n 15 $log >&2
    echo "make: the newest releases cannot be installed together; see $log" >&2
    exit 1
}
echo "newer: $(sed -n 's/^Successfully installed //p' $log)"
# What was not renewed has its programs in .venv: weed, uvicorn.
PATH=$PWD/$venv/bin:$PWD/.venv/bin:$PATH $python -m pytest "$@"
