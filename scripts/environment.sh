#!/usr/bin/env bash
# Finds a Python that is new enough and hands over to environment.py.  PYTHON=... chooses another one.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        exec "$candidate" "$here/environment.py" "$@"
    fi
done
echo "error: no Python 3.11 or newer found; install one, or set PYTHON to its path" >&2
exit 2
