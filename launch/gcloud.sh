#!/usr/bin/env bash
# Converts a model on a TPU VM slice: makes it if it is not there, installs maxconv on every
# worker, runs it on all of them, brings their logs here. See launch/README.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
launch/gcloud.sh --name=NAME --zone=Z [--project=P]
                 [--type=v5p-64 --version=v2-alpha-tpuv5 [--spot] [--queued]]
                 [--logs=maxconv-logs] [--dry-run]
                 -- model_name=... base_output_directory=gs://... [any arguments of maxconv convert]

Without --type the slice NAME must be there. --queued asks for it as a queued resource and waits.
A token for Hugging Face is read from HF_TOKEN, and goes to the workers as a file.
TEXT
}

fail() {
    echo "gcloud.sh: $*" >&2
    exit 2
}

name='' zone='' project='' type='' version='' logs=maxconv-logs
spot=() queued=false dry_run=false
while (($#)); do
    word=$1
    shift
    case $word in
    --help) usage && exit ;;
    --dry-run) dry_run=true ;;
    --spot) spot=(--spot) ;;
    --queued) queued=true ;;
    --) break ;;
    --name=* | --zone=* | --project=* | --type=* | --version=* | --logs=*)
        option=${word%%=*}
        printf -v "${option#--}" %s "${word#*=}"
        ;;
    *) fail "no option $word; --help lists them, and the arguments of maxconv follow --" ;;
    esac
done
[[ -n $name && -n $zone ]] || fail "give --name= and --zone="
[[ -z $type || -n $version ]] || fail "give --version=, the runtime version for --type=$type"
(($#)) || fail "no arguments for maxconv: give what to convert after --"

command='.maxconv/bin/maxconv convert'
for word in "$@"; do
    [[ $word != hf_access_token=* ]] || fail "no token on a command line: set HF_TOKEN"
    command+=" $(printf %q "$word")"
done
where=(--zone="$zone" ${project:+--project="$project"})
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

run() {
    if $dry_run; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

on_all() {
    local text=$1
    shift
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$text" "$@"
}

send() {
    run gcloud compute tpus tpu-vm scp "$1" "$name:$2" "${where[@]}" --worker=all
}

state() {
    gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)' 2>/dev/null
}

if [[ -n $type ]] && { $dry_run || ! state >/dev/null; }; then
    machine=(--accelerator-type="$type" --scopes=cloud-platform "${spot[@]}" "${where[@]}")
    if $queued; then
        run gcloud compute tpus queued-resources create "$name" --node-id="$name" \
            --runtime-version="$version" "${machine[@]}"
        until $dry_run || [[ $(state) == READY ]]; do sleep 30; done
    else
        run gcloud compute tpus tpu-vm create "$name" --version="$version" "${machine[@]}"
    fi
fi

archive=$scratch/maxconv.tar.gz
tar -czf "$archive" --exclude=__pycache__ -C "$root" pyproject.toml README.md LICENSE configs maxconv
send "$archive" maxconv.tar.gz
# The workers' own Python may be too old: uv brings one.
on_all "rm -rf maxconv-source && mkdir maxconv-source && tar -xzf maxconv.tar.gz -C maxconv-source \
&& python3 -m pip install -q --user uv && python3 -m uv venv -q --clear --python 3.12 .maxconv \
&& python3 -m uv pip install -q --python .maxconv/bin/python './maxconv-source[tpu]'"
if [[ -n ${HF_TOKEN:-} ]]; then
    (umask 077 && printf %s "$HF_TOKEN" >"$scratch/token")
    send "$scratch/token" .maxconv/token
    command="HF_TOKEN_PATH=.maxconv/token $command"
fi
$dry_run || mkdir -p "$logs"
on_all "$command" --output-directory="$logs"
echo "The logs of all workers: $logs"
