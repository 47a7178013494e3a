# Runs T-SQL for one tenant at a time on each target: see docs/octopus.md. Needs PowerShell with the module SqlServer, and
# nothing of dblock's.
$ErrorActionPreference = 'Stop'

function Parameter([string] $name) { [string] $OctopusParameters["Dblock.$name"] }
function Quoted([string] $text) { "N'" + $text.Replace("'", "''") + "'" }
function Value([string] $text) { '"' + $text.Replace('"', '""') + '"' }

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

# Of two settings of one name the later one counts. A driver that connects anew by itself would go on in another session,
# without the lock, and a pool would keep the session, with the lock.
$login = 'Integrated Security=True'
if (Parameter 'User') { $login = "User ID=$(Value (Parameter 'User'));Password=$(Value (Parameter 'Password'))" }
$connection = @(
    "Server=$(Value (Parameter 'Server'));Database=$(Value (Parameter 'Database'))"
    $login
    Parameter 'Options'
    'ConnectRetryCount=0;Pooling=False'
) -join ';'

# All of it in one session, which acquire.sql closes where it fails; the first error ends the call too. No time limit of the
# module's: a wait may be long. $(...) in the step's text is the step's own. What the server says beside the rows comes as
# verbose records; whoever waits says so at the level that Octopus has for that.
$batches = ($wishes -join "`n"), $acquire, (Parameter 'Script'), $release
try {
    Invoke-Sqlcmd -ConnectionString $connection -AbortOnError -DisableVariables -Verbose -Query ($batches -join "`nGO`n") 4>&1 |
        ForEach-Object {
            if ($_ -isnot [Management.Automation.VerboseRecord]) { $_ }
            elseif ($_.Message.StartsWith('dblock: waiting for ')) {
                Write-Host ('##octopus[stdout-wait]', $_.Message, '##octopus[stdout-default]' -join "`n")
            }
            else { Write-Host $_.Message }
        }
}
catch {
    $said = ($_.Exception.Message -split '\r?\n')[0]
    if ($said.StartsWith('dblock: ')) {
        $encoded = [Convert]::ToBase64String([Text.Encoding]::UTF8.GetBytes($said))
        Write-Host "##octopus[resultMessage message='$encoded']"
    }
    throw $_
}
