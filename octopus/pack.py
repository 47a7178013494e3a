"""Put the scripts into the step templates: ``make templates``, after a change of a script here or in sql/.

Octopus imports a template as one JSON file. Its script stands beside it under the same name, to be read; in that,
``{{sql/…}}`` stands for one of the raw scripts. A test fails where a template is older than its parts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
TEMPLATES = sorted(HERE.glob("*.json"))
_SUFFIXES = {"Bash": ".sh", "PowerShell": ".ps1"}
_BODY = "Octopus.Action.Script.ScriptBody"


def packed(template: Path) -> str:
    """The text of a template with all that belongs into it."""
    content = json.loads(template.read_text(encoding="utf-8"))
    properties = content["Properties"]
    script = template.with_suffix(_SUFFIXES[properties["Octopus.Action.Script.Syntax"]])
    properties[_BODY] = re.sub(
        r"\{\{(.+)\}\}\n",
        lambda found: (HERE.parent / found[1]).read_text(encoding="utf-8"),
        script.read_text(encoding="utf-8"),
    )
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for each in TEMPLATES:
        each.write_text(packed(each), encoding="utf-8")
