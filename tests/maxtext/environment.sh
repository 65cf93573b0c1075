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

python=$("${requirements%/*}/../../.ci/python" 3.12)
hash=$("$python" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()[:12])' "$requirements")
environment=${MAXCONV_MAXTEXT_ENV_ROOT:-$HOME/.cache/maxconv}/maxtext-$hash
marker=$environment/complete

# uv takes a fifth of pip's time, but does not know of every mirror that pip is configured for.
install() {
    "$environment/bin/python" -m uv pip install --quiet --compile-bytecode --python "$environment/bin/python" "$@" ||
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
