# Runs a script for one tenant at a time on each target: see docs/octopus.md. Needs bash, and dblock for its python3.
set -euo pipefail

parameter() { get_octopusvariable "Dblock.$1"; }

for name in Target Step; do
    case $(parameter "$name") in
    '' | *'#''{'*) # Octopus leaves a variable that it does not know as it is written, for all steps alike
        echo "Dblock.$name is empty, or a variable that Octopus does not know in this step: there is nothing to lock"
        exit 1 ;;
    esac
done

if ! command -v dblock >/dev/null; then
    echo "dblock is not installed here. For the python3 of this machine: pip install 'dblock[postgres]', or 'dblock[mssql]'"
    exit 1
fi

# By variables, so that no text of anybody's is an argument that another program would have to quote.
for name in Url Target Step Tenant Timeout; do
    export "DBLOCK_${name^^}=$(parameter "$name")"
done

options=()
[[ -z $(parameter Slots) ]] || options+=(--slots "$(parameter Slots)")
for name in Deployment.Id RunbookRun.Id Environment.Name Task.Id; do
    value=$(get_octopusvariable "Octopus.$name")
    [[ -z $value ]] || options+=(--label "$name=$value")
done

umask 077
script=$(mktemp)
trap 'rm -f "$script"' EXIT
parameter Script >"$script"

dblock run ${options[@]+"${options[@]}"} -- bash "$script"
