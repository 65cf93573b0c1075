#!/usr/bin/env bash
# Converts a model on slices of a GKE cluster that xpk made. See launch/README.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
launch/xpk.sh --project=P --project-number=N --zone=Z --cluster=C --image=I
              (--tpu-type=v5p-64 | --device-type=n2-standard-32-8)
              [--num-slices=1] [--num-nodes=1] [--secret=NAME] [--max-restarts=3]
              [--manifest=FILE] [--dry-run]
              -- model_name=... base_output_directory=gs://... [any arguments of maxconv convert]
TEXT
}

fail() {
    echo "xpk.sh: $*" >&2
    exit 2
}

num_slices=1 num_nodes=1 max_restarts=3 dry_run=false
project='' project_number='' zone='' cluster='' image='' secret='' manifest=''
tpu_type='' device_type=''
while (($#)); do
    word=$1
    shift
    case $word in
    --help) usage && exit ;;
    --dry-run) dry_run=true ;;
    --) break ;;
    --project=* | --project-number=* | --zone=* | --cluster=* | --image=* | --secret=* | \
        --manifest=* | --tpu-type=* | --device-type=* | --num-slices=* | --num-nodes=* | \
        --max-restarts=*)
        name=${word%%=*}
        name=${name#--}
        printf -v "${name//-/_}" %s "${word#*=}"
        ;;
    *) fail "no option $word; --help lists them, and the arguments of maxconv follow --" ;;
    esac
done
# xpk takes what is missing for None, and goes on.
for name in project project_number zone cluster image; do
    [[ -n ${!name} ]] || fail "missing --${name//_/-}="
done
[[ -n $tpu_type || -n $device_type ]] || fail "give --tpu-type= or --device-type="
(($#)) || fail "no arguments for maxconv: give what to convert after --"

model=model
command='maxconv convert'
for word in "$@" --resume; do
    [[ $word != *$'\n'* ]] || fail "a line break in $word would break the manifest"
    [[ $word != hf_access_token=* ]] || fail "no token on a command line: give --secret="
    [[ $word != model_name=* ]] || model=${word#*=}
    command+=" $(printf %q "$word")"
done
# Kubernetes wants lower-case letters, digits and dashes; xpk less than 40 of them.
slug=$(printf %s "$model" | tr '[:upper:]' '[:lower:]' | tr -c 'a-z0-9' '-')
slug=${slug:0:20}
workload=maxconv-${slug%%-}-$(date +%m%d%H%M)

if [[ -n $tpu_type ]]; then
    machines=(--tpu-type "$tpu_type" --num-slices "$num_slices")
else
    machines=(--device-type "$device_type" --num-nodes "$num_nodes")
    command+=' hardware=cpu'
fi
if [[ -z $manifest ]]; then
    manifest=$(mktemp)
    trap 'rm -f "$manifest"' EXIT
fi

# xpk writes the manifest; the secret is put in by its name, which xpk has no option for.
xpk workload create --dry-run --output-manifest-file "$manifest" \
    --project "$project" --project-number "$project_number" --zone "$zone" --cluster "$cluster" \
    --workload "$workload" --docker-image "$image" "${machines[@]}" \
    --max-restarts "$max_restarts" --command "$command" >&2
if [[ -n $secret ]]; then
    awk -v secret="$secret" '
        { print }
        /^ *env: *$/ {
            match($0, /^ */)
            pad = substr($0, 1, RLENGTH)
            print pad "- name: HF_TOKEN"
            print pad "  valueFrom:"
            print pad "    secretKeyRef: {name: " secret ", key: HF_TOKEN}"
        }' "$manifest" >"$manifest.new"
    mv "$manifest.new" "$manifest"
    grep -q secretKeyRef "$manifest" || fail "xpk's manifest has no env: to put the secret in"
fi

if $dry_run; then
    cat "$manifest"
else
    kubectl apply -f "$manifest"
    echo "Its logs: kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$workload"
fi
