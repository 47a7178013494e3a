# Runs a script for one tenant at a time on each target: see docs/octopus.md. Needs PowerShell, and dblock for its Python.
$ErrorActionPreference = 'Stop'
$PSNativeCommandUseErrorActionPreference = $false # an exit code is the step's, and no error of this script's

function Parameter([string] $name) { [string] $OctopusParameters["Dblock.$name"] }

foreach ($name in 'Target', 'Step') {
    $value = Parameter $name
    # Octopus leaves a variable that it does not know as it is written, for all steps alike.
    if (-not $value -or $value.Contains('#' + '{')) {
        throw "Dblock.$name is empty, or a variable that Octopus does not know in this step: there is nothing to lock"
    }
}

if (-not (Get-Command dblock -ErrorAction SilentlyContinue)) {
    throw "dblock is not installed here. For the Python of this machine: pip install 'dblock[postgres]', or 'dblock[mssql]'"
}

# By variables, since before 7.3 PowerShell hands a " within an argument on as if it ended there.
foreach ($name in 'Url', 'Target', 'Step', 'Tenant', 'Timeout') {
    [Environment]::SetEnvironmentVariable("DBLOCK_$($name.ToUpperInvariant())", (Parameter $name))
}

$options = @()
if (Parameter 'Slots') { $options += '--slots', (Parameter 'Slots') }
foreach ($name in 'Deployment.Id', 'RunbookRun.Id', 'Environment.Name', 'Task.Id') {
    $value = $OctopusParameters["Octopus.$name"]
    if ($value -and -not $value.Contains('"')) { $options += '--label', "$name=$value" }
}

# As Octopus runs a script: the first error ends it, and the exit code of the last program that it ran is its own.
$run = '$ErrorActionPreference = ''Stop''; . $env:DBLOCK_SCRIPT; if (Test-Path variable:global:LASTEXITCODE) { exit $LASTEXITCODE }'

$script = Join-Path ([IO.Path]::GetTempPath()) "dblock-$([Guid]::NewGuid()).ps1"
try {
    [IO.File]::WriteAllText($script, (Parameter 'Script'), [Text.UTF8Encoding]::new($true))
    $env:DBLOCK_SCRIPT = $script
    $shell = (Get-Process -Id $PID).Path
    & dblock run @options -- $shell -NoProfile -NonInteractive -Command $run
    $code = $LASTEXITCODE
}
finally {
    Remove-Item -Force -ErrorAction SilentlyContinue $script
    Remove-Item Env:DBLOCK_URL -ErrorAction SilentlyContinue
}
exit $code
