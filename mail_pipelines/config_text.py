"""The settings written out: the commented `config.toml` of a new home, and the reference page of the documentation."""

from __future__ import annotations

import json
from typing import Any

from mail_pipelines.config import CONFIG_FILE, SECTIONS, is_secret, variable

PAGE = f"""# Configuration

*Written by `mail-pipelines config reference`; do not edit.*

Every setting has a default. `{CONFIG_FILE}` in the home folder changes it, and an environment variable changes it again; `{{home}}` in a
value is the home folder, which is `MAIL_PIPELINES_HOME` or else `.mail_pipelines/` beside `workspace.yaml`. A secret may also be given by
the path of a file: `name_file` in `{CONFIG_FILE}`, or the variable with `_FILE` behind it. An unknown key or variable is an error that
names the nearest known one. `mail-pipelines config show` prints the values in force, each with its origin.

What is done for one dispatch server (`MAIL_PIPELINES_SERVER`) is done by these settings and, before all others, those in `servers/NAME.toml` of the home
folder, if that is there: so one host may be [several servers](production.md#a-host-with-several-addresses).
"""


def _toml(value: Any) -> str:
    """JSON's form of strings, numbers, booleans and lists of strings is also TOML's."""
    return json.dumps(value, ensure_ascii=False)


def template(given: dict[str, str]) -> str:
    """A `config.toml` in which every key stands as a comment with its default; `given` maps `section.name` to lines that are set."""
    lines = ["# Settings of this home. A key in a comment shows its default. `mail-pipelines config show` prints what is in force."]
    for section, model in SECTIONS.items():
        lines += ["", f"[{section}]"]
        for name, field in model.model_fields.items():
            lines.append(f"# {field.description}")
            if line := given.get(f"{section}.{name}"):
                lines.append(line)
            else:
                lines.append(f'# {name}_file = "/path/of/a/file"' if is_secret(section, name) else f"# {name} = {_toml(field.default)}")
    return "\n".join(lines) + "\n"


def reference() -> str:
    """The reference page, Markdown."""
    lines = [PAGE]
    for section, model in SECTIONS.items():
        lines += [f"## [{section}]", "", "| key | default | environment variable | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            default = "(secret)" if is_secret(section, name) else f"`{_toml(field.default)}`"
            meaning = (field.description or "").replace("|", "\\|")
            lines.append(f"| `{name}` | {default} | `{variable(section, name)}` | {meaning} |")
        lines.append("")
    return "\n".join(lines)
