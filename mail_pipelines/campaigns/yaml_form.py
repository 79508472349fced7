"""A campaign as a YAML file: the form in which it is imported and exported. The row in the database is the truth.

    name: Spring sale
    segments: {include: [buyers], exclude: [mailed-this-week]}
    unsubscribe: list news          # or: brand, all
    start_at: 2026-03-02T09:00:00+01:00
    window: {from: "09:00", until: "18:00", days: [mon, tue, wed, thu, fri], zone: Europe/Berlin}
    content:
      subject: Hello {{ first_name | default('friend') }}
      from_address: news@shop.example
      body: …

What belongs here: names, types and the way back. What does not: whether the things named exist (`store`) or can work (`check`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from mail_pipelines.campaigns.campaign import DEFAULT_POOL, CampaignError, Definition, OnUnknown, Priority, Unsubscribe
from mail_pipelines.campaigns.send_window import SendWindow, WindowError
from mail_pipelines.errors import nearest
from mail_pipelines.keys import InvalidKey, check_key, slug

if TYPE_CHECKING:
    from mail_pipelines.messages.content import Content

T = TypeVar("T")
_KEYS = (
    *("name", "key", "brand", "pool", "overflow_pool", "segments", "unsubscribe", "on_unknown", "priority"),
    *("start_at", "finish_by", "expire_at", "window", "content"),
)


class FormError(CampaignError):
    """A document that is no campaign; the message begins with the place in it, as in `segments.include[1]`."""


@dataclass(frozen=True)
class Document:
    """What a file says: the definition, and the content if there is one."""

    definition: Definition
    content: Content | None


def parse(text: str) -> Document:
    """Read a YAML text. Raises `FormError` for anything that is not as it should be, naming the place."""
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise FormError(f"{line}no valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormError(f"no valid YAML: {error}") from error
    return from_tree(tree)


def from_tree(tree: object) -> Document:
    """The campaign a document of plain values describes (YAML, JSON). Raises `FormError`."""
    document = _mapping(tree, "campaign", _KEYS)
    name = _required(document, "name", _text)
    if not name.strip() or len(name) > 200:
        raise FormError("name: expected 1 to 200 characters")
    segments = _mapping(_given(document, "segments"), "segments", ("include", "exclude"))
    unsubscribe, list_key = _unsubscribe(document.get("unsubscribe", Unsubscribe.BRAND.value))
    definition = Definition(
        name=name,
        key=_key(document["key"], "key") if "key" in document else _slug(name),
        include=_segment_keys(_given(segments, "include", "segments."), "segments.include"),
        exclude=_segment_keys(segments.get("exclude", []), "segments.exclude"),
        brand=_key(document.get("brand", "default"), "brand"),
        pool=_key(document.get("pool", DEFAULT_POOL), "pool"),
        overflow_pool=None if document.get("overflow_pool") is None else _key(document["overflow_pool"], "overflow_pool"),
        unsubscribe=unsubscribe,
        list=list_key,
        on_unknown=_choice(document.get("on_unknown", OnUnknown.HOLD.value), "on_unknown", {choice.value: choice for choice in OnUnknown}),
        priority=_choice(document.get("priority", "normal"), "priority", {choice.name.lower(): choice for choice in Priority}),
        start_at=_time(document, "start_at"),
        finish_by=_time(document, "finish_by"),
        expire_at=_time(document, "expire_at"),
        window=None if document.get("window") is None else _window(document["window"]),
    )
    return Document(definition, None if document.get("content") is None else _content(document["content"]))


def _mapping(tree: object, path: str, known: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping):
        raise FormError(f"{path}: expected a mapping of {', '.join(known)}, got {_shown(tree)}")
    prefix = "" if path == "campaign" else f"{path}."
    for key in tree:
        if key not in known:
            raise FormError(f"{prefix}{key}: unknown key; {nearest(str(key), known)}")
    return tree


def _given(tree: Mapping[str, Any], key: str, prefix: str = "") -> object:
    if tree.get(key) is None:
        raise FormError(f"{prefix}{key}: is missing")
    return tree[key]


def _required(tree: Mapping[str, Any], key: str, read: Callable[[object, str], T]) -> T:
    return read(_given(tree, key), key)


def _text(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise FormError(f"{path}: expected text, got {_shown(value)}")
    return value


def _slug(name: str) -> str:
    try:
        return slug(name, "campaign key")
    except InvalidKey as error:
        raise FormError(f"name: {error}; or give a key") from error


def _key(value: object, path: str) -> str:
    try:
        return check_key(_text(value, path))
    except InvalidKey as error:
        raise FormError(f"{path}: {error}") from error


def _segment_keys(value: object, path: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise FormError(f"{path}: expected a list of segment keys, got {_shown(value)}")
    keys = [_key(item, f"{path}[{number}]") for number, item in enumerate(value)]
    return tuple(dict.fromkeys(keys))


def _unsubscribe(value: object) -> tuple[Unsubscribe, str | None]:
    words = _text(value, "unsubscribe").split()
    if len(words) == 2 and words[0] == Unsubscribe.LIST:
        return Unsubscribe.LIST, _key(words[1], "unsubscribe")
    if len(words) == 1 and words[0] in (Unsubscribe.ALL, Unsubscribe.BRAND):
        return Unsubscribe(words[0]), None
    raise FormError(f"unsubscribe: expected all, brand, or list NAME, got {_shown(value)}")


def _choice(value: object, path: str, choices: Mapping[str, T]) -> T:
    if isinstance(value, str) and value in choices:
        return choices[value]
    raise FormError(f"{path}: expected {', '.join(choices)}, got {_shown(value)}")


def _time(document: Mapping[str, Any], key: str) -> dt.datetime | None:
    value = document.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        return parse_time(value, key)
    if not isinstance(value, dt.datetime) or value.tzinfo is None:
        raise FormError(f"{key}: expected a time with its zone, as in 2026-03-02T09:00:00+01:00 or 2026-03-02T08:00:00Z, got {_shown(value)}")
    return value.astimezone(dt.UTC)


def parse_time(text: str, path: str) -> dt.datetime:
    """An ISO 8601 time with its zone, in UTC. Raises `FormError`."""
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise FormError(f"{path}: expected a time with its zone, as in 2026-03-02T09:00:00+01:00 or 2026-03-02T08:00:00Z, got {_shown(text)}")
    return moment.astimezone(dt.UTC)


def _window(tree: object) -> SendWindow:
    try:
        return SendWindow.from_document(tree)
    except WindowError as error:
        raise FormError(f"window.{error}" if isinstance(tree, Mapping) else f"window: {error}, got {_shown(tree)}") from error


def _content(tree: object) -> Content:
    from mail_pipelines.messages.content import Content, ContentError

    if not isinstance(tree, Mapping):
        raise FormError(f"content: expected a mapping with subject, from_address and body, got {_shown(tree)}")
    try:
        return Content.from_document(tree)
    except ContentError as error:
        raise FormError(f"content.{error}") from error


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dt.datetime):
        return f"{value.isoformat()} without a zone"
    text = repr(value.isoformat() if isinstance(value, dt.date) else value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '…'}"


def to_tree(document: Document) -> dict[str, Any]:
    """The document as plain values; `from_tree` gives the same document back."""
    definition = document.definition
    tree: dict[str, Any] = {
        "name": definition.name,
        "key": definition.key,
        "brand": definition.brand,
        "pool": definition.pool,
        "overflow_pool": definition.overflow_pool,
        "segments": {"include": list(definition.include), "exclude": list(definition.exclude)},
        "unsubscribe": f"list {definition.list}" if definition.unsubscribe is Unsubscribe.LIST else definition.unsubscribe.value,
        "on_unknown": definition.on_unknown.value,
        "priority": definition.priority.name.lower(),
        "start_at": definition.start_at,
        "finish_by": definition.finish_by,
        "expire_at": definition.expire_at,
        "window": None if definition.window is None else definition.window.to_document(),
        "content": None if document.content is None else document.content.to_document(),
    }
    return {key: value for key, value in tree.items() if value is not None}


def render(document: Document) -> str:
    """The document as YAML text; `parse` gives the same document back."""
    return yaml.dump(to_tree(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Plain values only; a key given twice is an error, not the last one's silent victory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str):
                if key in seen:
                    raise yaml.constructor.ConstructorError(problem=f"{key} is given twice", problem_mark=key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, times in ISO 8601."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


def _represent_time(dumper: yaml.SafeDumper, moment: dt.datetime) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:timestamp", moment.isoformat())


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(dt.datetime, _represent_time)
