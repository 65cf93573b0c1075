#!/usr/bin/env bash
# Makes the environment of xpk, unless it is there, and prints the directory of its command.
#
#     PATH=$(tests/launch/environment.sh):$PATH
#
# It lies outside the checkout, named after the version, beside that of the MaxText oracle.
set -euo pipefail

version=1.16.0
environment=${MAXCONV_XPK_ENV_ROOT:-$HOME/.cache/maxconv}/xpk-$version
if [[ ! -e $environment/complete ]]; then
    {
        rm -rf "$environment"
        python3 -m venv "$environment"
        "$environment/bin/python" -m pip install --quiet "xpk==$version"
        touch "$environment/complete"
    } >&2
fi
echo "$environment/bin"
