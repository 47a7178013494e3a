# Runs T-SQL for one tenant at a time on each target: see docs/octopus.md. Needs PowerShell with the module SqlServer, and
# nothing of dblock's.
$ErrorActionPreference = 'Stop'

function Parameter([string] $name) { [string] $OctopusParameters["Dblock.$name"] }
function Quoted([string] $text) { "N'" + $text.Replace("'", "''") + "'" }

foreach ($name in 'Target', 'Step') {
    $value = Parameter $name
    # Octopus leaves a variable that it does not know as it is written, for all steps alike.
    if (-not $value -or $value.Contains('#' + '{')) {
        throw "Dblock.$name is empty, or a variable that Octopus does not know in this step: there is nothing to lock"
    }
}

$wishes = foreach ($name in 'Target', 'Step', 'Tenant', 'Timeout', 'Slots') {
    "EXEC sp_set_session_context N'dblock.$($name.ToLowerInvariant())', $(Quoted (Parameter $name));"
}

$acquire = @'
{{sql/mssql/acquire.sql}}
'@

$release = @'
{{sql/mssql/release.sql}}
'@

$connection = @{ ServerInstance = (Parameter 'Server'); Database = (Parameter 'Database') }
if (Parameter 'User') {
    $connection.Username = Parameter 'User'
    $connection.Password = Parameter 'Password'
}

# All of it in one session, which acquire.sql closes where it fails; the first error ends the call too. No time limit of the
# module's: a wait may be long. $(...) in the step's text is the step's own.
$batches = ($wishes -join "`n"), $acquire, (Parameter 'Script'), $release
Invoke-Sqlcmd @connection -AbortOnError -DisableVariables -Query ($batches -join "`nGO`n")
