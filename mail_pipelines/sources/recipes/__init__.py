"""Recipes: declarations of well-known services but for what is each user's own. One YAML file a service; a declaration names it by `recipe`.

A declaration is laid over its recipe: mappings are merged name by name, anything else takes the recipe's place, and null takes it away. Of the recipe's
sections (`contacts`, `suppressions`, `write_back`) only those are used that the declaration has, so nothing is read or told that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml

from mail_pipelines.errors import nearest
from mail_pipelines.sources.errors import DeclarationError

_SECTIONS = ("contacts", "suppressions", "write_back")


def names() -> list[str]:
    """All recipes."""
    return sorted(file.name.removesuffix(".yaml") for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml"))


def complete(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A declaration with what its recipe says; as it is if it names none. Raises `DeclarationError`."""
    if "recipe" not in tree:
        return tree
    name = tree["recipe"]
    if name not in names():
        raise DeclarationError(f"recipe: {name!r} is not known; {nearest(str(name), names())}")
    recipe = yaml.safe_load(resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    used = {key: value for key, value in recipe.items() if key not in _SECTIONS or tree.get(key) is not None}
    return _laid_over(used, {key: value for key, value in tree.items() if key != "recipe"})


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        beneath = merged.get(name)
        merged[name] = _laid_over(beneath, value) if isinstance(value, Mapping) and isinstance(beneath, Mapping) else value
    return {name: value for name, value in merged.items() if value is not None or name not in above}
