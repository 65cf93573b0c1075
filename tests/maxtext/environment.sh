#!/usr/bin/env bash
# Makes the environment of the MaxText oracle, unless it is there, and prints its python.
#
#     python=$(tests/maxtext/environment.sh)
#
# It lies outside the checkout, in a directory named after a hash of requirements.txt, so that
# checkouts share it and a change of the requirements makes a new one. Only the path goes to
# standard output.
set -euo pipefail

requirements=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/requirements.txt

# Prints the path of a Python 3.12, wherever one is found first.
find_python() {
    local candidate
    local candidates=(python3.12)
    if command -v pyenv >/dev/null; then
        candidates+=("$(pyenv root)"/versions/3.12*/bin/python)
    fi
    for candidate in "${candidates[@]}"; do
        # A name is not enough: pyenv's shims exist for versions that are not selected.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    echo "The MaxText oracle needs Python 3.12: no python3.12 on PATH, and none in pyenv." >&2
    return 1
}

python=$(find_python)
hash=$("$python" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()[:12])' "$requirements")
environment=${MAXCONV_MAXTEXT_ENV_ROOT:-$HOME/.cache/maxconv}/maxtext-$hash
marker=$environment/complete

# uv takes a fifth of pip's time, but does not know of every mirror that pip is configured for.
install() {
    "$environment/bin/python" -m uv pip install --quiet --python "$environment/bin/python" "$@" ||
        "$environment/bin/python" -m pip install --quiet "$@"
}

if [[ ! -e $marker ]]; then
    {
        rm -rf "$environment"
        "$python" -m venv "$environment"
        "$environment/bin/python" -m pip install --quiet uv
        mapfile -t packages < <(grep '^[a-z]' "$requirements" | grep -v '^maxtext==')
        install "${packages[@]}"
        install --no-deps "$(grep '^maxtext==' "$requirements")"
        touch "$marker"
    } >&2
fi
echo "$environment/bin/python"
