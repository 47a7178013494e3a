# Runs SQL for one tenant at a time on each target: see docs/octopus.md. Needs bash and psql, and nothing of dblock's.
set -euo pipefail

parameter() { get_octopusvariable "Dblock.$1"; }

for name in Target Step; do
    case $(parameter "$name") in
    '' | *'#''{'*) # Octopus leaves a variable that it does not know as it is written, for all steps alike
        echo "Dblock.$name is empty, or a variable that Octopus does not know in this step: there is nothing to lock"
        exit 1 ;;
    esac
done

umask 077
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

parameter Script >"$folder/step.sql"

cat >"$folder/wishes.sql" <<'DBLOCK_END'
SELECT set_config('dblock.target', :'target', false), set_config('dblock.step', :'step', false),
       set_config('dblock.tenant', :'tenant', false), set_config('dblock.timeout', :'timeout', false),
       set_config('dblock.slots', :'slots', false)
\g /dev/null
DBLOCK_END

cat >"$folder/acquire.sql" <<'DBLOCK_END'
{{sql/postgres/acquire.sql}}
DBLOCK_END

cat >"$folder/release.sql" <<'DBLOCK_END'
{{sql/postgres/release.sql}}
DBLOCK_END

PGHOST=$(parameter Host) PGPORT=$(parameter Port) PGDATABASE=$(parameter Database)
PGUSER=$(parameter User) PGPASSWORD=$(parameter Password) PGCLIENTENCODING=UTF8
PGOPTIONS='-c client_connection_check_interval=1s -c tcp_keepalives_idle=15 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3'
export PGHOST PGPORT PGDATABASE PGUSER PGPASSWORD PGCLIENTENCODING PGOPTIONS

# All of it in one session, which acquire.sql ends where it fails; the first error ends psql too. What psql says on stderr
# would fail the step, so it is a part of the log, and whoever waits says so at the level that Octopus has for that.
psql -X -q -v ON_ERROR_STOP=1 \
    -v target="$(parameter Target)" -v step="$(parameter Step)" -v tenant="$(parameter Tenant)" \
    -v timeout="$(parameter Timeout)" -v slots="$(parameter Slots)" \
    -f "$folder/wishes.sql" -f "$folder/acquire.sql" -f "$folder/step.sql" -f "$folder/release.sql" 2>&1 |
    while IFS= read -r line; do
        case $line in
        *'NOTICE:  dblock: waiting for '*)
            printf '##octopus[stdout-wait]\n%s\n##octopus[stdout-default]\n' "${line#*NOTICE:  }" ;;
        *'ERROR:  dblock: '*)
            printf '%s\n' "$line"
            printf "##octopus[resultMessage message='%s']\n" "$(printf %s "${line#*ERROR:  }" | base64 | tr -d '\n')" ;;
        *) printf '%s\n' "$line" ;;
        esac
    done
