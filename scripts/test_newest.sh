#!/usr/bin/env bash
# Run the tests with the newest release of everything that pyproject.toml allows: test_newest.sh [PYTEST-ARGUMENT...]
#
# The environment .venv-newest lies on top of .venv: it sees what is there, and installs only what has a newer release.
# So it costs little while the pins are fresh, and up to as much as .venv (3 GB to download, 7 GB on disk) when torch has
# moved on. .venv keeps what constraints.txt pins.
set -euo pipefail

venv=.venv-newest
python=$venv/bin/python
log=$venv/install.log

pinned=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -rf $venv
.venv/bin/python -m venv --without-pip $venv
echo "$pinned" >"$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pinned.pth"

echo "installing what is newer than constraints.txt into $venv (details: $log)"
$python -m pip install --disable-pip-version-check --progress-bar off --upgrade --upgrade-strategy eager --editable '.[dev]' >$log 2>&1 || {
    tail -n 15 $log >&2
    echo "make: the newest releases cannot be installed together; all of it is in $log" >&2
    exit 1
}
echo "newer: $(sed -n 's/^Successfully installed //p' $log)"
$python -m pytest "$@"
