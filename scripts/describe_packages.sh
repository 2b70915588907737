#!/usr/bin/env bash
# For Dockerfile: clear the Python of the image of what nobody needs, then write which packages it has, with licenses.
set -euo pipefail

folder=/usr/local/share/doc/ncsn
# The packages' own tests and static libraries, which nothing imports or links.
find /usr/local -depth \( -type d -name tests -o -name '*.a' \) -exec rm -rf {} +
mkdir -p $folder
cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file $folder/sbom.json /usr/local/bin/python
pip-licenses --python /usr/local/bin/python --from mixed --with-urls --format csv --output-file $folder/licenses.csv
