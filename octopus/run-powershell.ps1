# Runs a script for one tenant at a time on each target: see docs/octopus.md. Needs PowerShell, and dblock for its Python.
$ErrorActionPreference = 'Stop'

function Parameter([string] $name) { [string] $OctopusParameters["Dblock.$name"] }

if (-not (Get-Command dblock -ErrorAction SilentlyContinue)) {
    throw "dblock is not installed here. For the Python of this machine: pip install 'dblock[postgres]', or 'dblock[mssql]'"
}

# By variables, so that no text of anybody's is an argument that another program would have to quote.
foreach ($name in 'Url', 'Target', 'Step', 'Tenant', 'Timeout') {
    [Environment]::SetEnvironmentVariable("DBLOCK_$($name.ToUpperInvariant())", (Parameter $name))
}

$options = @()
if (Parameter 'Slots') { $options += '--slots', (Parameter 'Slots') }
foreach ($name in 'Deployment.Id', 'RunbookRun.Id', 'Environment.Name', 'Task.Id') {
    $value = $OctopusParameters["Octopus.$name"]
    if ($value) { $options += '--label', "$name=$value" }
}

$script = Join-Path ([IO.Path]::GetTempPath()) "dblock-$([Guid]::NewGuid()).ps1"
try {
    [IO.File]::WriteAllText($script, (Parameter 'Script'), [Text.UTF8Encoding]::new($true))
    $shell = (Get-Process -Id $PID).Path
    & dblock run @options -- $shell -NoProfile -NonInteractive -File $script
    $code = $LASTEXITCODE
}
finally {
    Remove-Item -Force -ErrorAction SilentlyContinue $script
    Remove-Item Env:DBLOCK_URL -ErrorAction SilentlyContinue
}
exit $code
