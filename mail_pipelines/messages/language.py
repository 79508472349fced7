"""The template language: the part of Jinja2 that mails need, checked before it runs, run in Jinja2's sandbox.

What belongs here: what a template may say, and the cutting of a simple one into literals and slots. What does not: HTML
(`markup`) and MIME (`compiled`).

Allowed are `{{ variable }}` with the filters of `values.FILTERS`, `{% if %}`, `{% for %}` over `range(…)` of numbers or over a list written in
the template, and `{% set %}`. There is no arithmetic, no call, no attribute besides `loop.…`, no inclusion: therefore every
template ends, and how often its loops run and how much it writes is known before it runs (`MAX_ITERATIONS`, `MAX_LENGTH`).
A field without a value is null: it renders as nothing, `default` replaces it, `{% if field %}` is false.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import escape

from mail_pipelines.errors import nearest
from mail_pipelines.messages.compiled import Pieces, Script, Slot, Template
from mail_pipelines.messages.content import ContentError
from mail_pipelines.messages.values import FILTERS, body_text, text_of

MAX_ITERATIONS = 10_000
MAX_LENGTH = 1_000_000
# What one `{{ … }}` is taken to write when the length is estimated.
_VALUE_LENGTH = 100
_TESTS = ("none", "odd", "even")
_NODES = (
    nodes.And, nodes.Assign, nodes.Compare, nodes.CondExpr, nodes.Const, nodes.Filter, nodes.For, nodes.If, nodes.List, nodes.Name, nodes.Neg, nodes.Not,
    nodes.Operand, nodes.Or, nodes.Output, nodes.Template, nodes.TemplateData, nodes.Test, nodes.Tuple,
)  # fmt: skip
_SAMPLES: Mapping[str, Any] = {"number": 1, "boolean": True, "date": "2026-01-31", "datetime": "2026-01-31T12:00:00+00:00"}


@functools.cache
def environment(html: bool) -> ImmutableSandboxedEnvironment:
    """The sandbox for HTML (values are escaped) or for subject and text (they are not)."""
    made = ImmutableSandboxedEnvironment(autoescape=html, undefined=StrictUndefined, finalize=text_of, keep_trailing_newline=True)
    made.filters = dict(FILTERS)
    made.tests = {name: made.tests[name] for name in _TESTS}
    made.globals = {"range": range}
    return made


def check(source: str, part: str, variables: Mapping[str, str]) -> None:
    """Check a template of `part` that may read `variables` (name → field type).

    Raises `ContentError` with line and variable for what does not parse, is not allowed, reads an unknown variable, may write
    too much, or fails when a field is empty.
    """
    try:
        tree = environment(html=False).parse(source)
        length = _Walk(part, variables).visit(tree, frozenset(), 1)
    except TemplateSyntaxError as error:
        raise ContentError(part, f"{error.message}", line=error.lineno) from error
    except RecursionError as error:
        raise ContentError(part, "expressions or conditions are nested too deeply") from error
    if length > MAX_LENGTH:
        raise ContentError(part, f"it may write {length:,} characters; at most {MAX_LENGTH:,} are allowed")
    _try(source, part, {name: variables[name] for name in names_in(tree) & variables.keys()})


def names_in(tree: nodes.Node) -> set[str]:
    """Every name a tree reads, those it sets itself included."""
    return {name.name for name in tree.find_all(nodes.Name) if name.ctx == "load"}


def always_shows(source: str, variable: str) -> bool:
    """Whether a template writes `{{ variable }}` whichever way its conditions go. Raises `jinja2.TemplateSyntaxError`."""
    return _always_shows(environment(html=False).parse(source).body, variable)


def _always_shows(body: Collection[nodes.Node], variable: str) -> bool:
    for node in body:
        if isinstance(node, nodes.Output) and any(slot.name == variable for slot in map(_slot, node.nodes) if slot):
            return True
        if isinstance(node, nodes.If) and node.else_ and all(_always_shows(branch, variable) for branch in _branches(node)):
            return True
    return False


def cut(source: str, html: bool, fields: Collection[str]) -> Template:
    """A checked template as literals and slots if it has only `{{ variable|filter… }}`, else as a script. Raises `jinja2.TemplateSyntaxError`."""
    tree = environment(html).parse(source)
    literals = [""]
    slots: list[Slot] = []
    for node in tree.body:
        for output in node.nodes if isinstance(node, nodes.Output) else (node,):
            if isinstance(output, nodes.TemplateData):
                literals[-1] += output.data
            elif isinstance(output, nodes.Const):
                literals[-1] += str(escape(text_of(output.value))) if html else text_of(output.value)
            elif slot := _slot(output):
                slots.append(slot)
                literals.append("")
            else:
                return Script(source, html, tuple(sorted(names_in(tree) & set(fields))))
    return Pieces(tuple(literals), tuple(slots))


def _branches(node: nodes.If) -> Iterator[list[nodes.Node]]:
    yield node.body
    for other in node.elif_:
        yield other.body
    yield node.else_


def _slot(node: nodes.Node) -> Slot | None:
    """The slot a simple expression is: a variable and filters whose arguments are written out."""
    filters: list[tuple[str, tuple[Any, ...]]] = []
    while isinstance(node, nodes.Filter) and node.node is not None:
        if not all(isinstance(argument, nodes.Const) for argument in node.args):
            return None
        filters.append((node.name, tuple(argument.value for argument in node.args if isinstance(argument, nodes.Const))))
        node = node.node
    return Slot(node.name, tuple(reversed(filters))) if isinstance(node, nodes.Name) else None


class _Walk:
    """Visits a tree, refuses what is not allowed, and adds up how much the template may write."""

    def __init__(self, part: str, variables: Collection[str]) -> None:
        self._part = part
        self._variables = variables

    def _refuse(self, node: nodes.Node, problem: str, variable: str | None = None) -> ContentError:
        return ContentError(self._part, problem, line=node.lineno, variable=variable)

    def visit(self, node: nodes.Node, own: frozenset[str], repeats: int) -> int:
        """Characters `node` may write when it runs `repeats` times. `own` are the names the template has set before it."""
        match node:
            case nodes.TemplateData():
                return len(node.data) * repeats
            case nodes.Name():
                if node.name not in self._variables and node.name not in own:
                    raise self._refuse(node, f"unknown variable {node.name!r}; {nearest(node.name, {*self._variables, *own})}", node.name)
            case nodes.Const(value=str(text)) if body_text(text) != text:
                raise self._refuse(node, f"the text {text!r} holds a control character")
            case nodes.Filter():
                self._check_filter(node)
            case nodes.Test():
                if node.name not in _TESTS:
                    raise self._refuse(node, f"unknown test {node.name!r}; {nearest(node.name, _TESTS)}; for an empty field write {{% if field %}}")
            case nodes.Getattr(node=nodes.Name(name="loop")) if "loop" in own and not node.attr.startswith("_"):
                return 0
            case nodes.For():
                return self._visit_loop(node, own, repeats)
            case nodes.CondExpr(expr2=None):
                raise self._refuse(node, "`… if …` needs an `else`")
            case nodes.Assign():
                if not isinstance(node.target, nodes.Name):
                    raise self._refuse(node, "{% set %} takes one name")
            case _ if not isinstance(node, _NODES):
                raise self._refuse(node, f"{_describe(node)} is not available in templates", next((name.name for name in node.find_all(nodes.Name)), None))
        length = 0
        if isinstance(node, nodes.Output):
            length = _VALUE_LENGTH * repeats * sum(not isinstance(output, nodes.TemplateData) for output in node.nodes)
        for child in node.iter_child_nodes():
            if not (isinstance(child, nodes.Name) and child.ctx == "store"):
                length += self.visit(child, own, repeats)
            if isinstance(child, nodes.Assign) and isinstance(child.target, nodes.Name):
                own |= {child.target.name}
        return length

    def _check_filter(self, node: nodes.Filter) -> None:
        if node.name not in FILTERS:
            raise self._refuse(node, f"unknown filter {node.name!r}; {nearest(node.name, FILTERS)}")
        most = 2 if node.name == "default" else 0
        if len(node.args) > most or node.kwargs or node.dyn_args or node.dyn_kwargs:
            raise self._refuse(node, f"filter {node.name!r} takes {'one value' if most else 'no arguments'}")

    def _visit_loop(self, node: nodes.For, own: frozenset[str], repeats: int) -> int:
        if node.recursive or not isinstance(node.target, nodes.Name):
            raise self._refuse(node, "a loop has one variable and does not call itself")
        repeats *= max(1, self._loop_count(node, own))
        if repeats > MAX_ITERATIONS:
            raise self._refuse(node, f"the loop would run {repeats:,} times; at most {MAX_ITERATIONS:,} are allowed")
        inner = own | {node.target.name, "loop"}
        children = [*node.body, *node.else_, *([node.test] if node.test else [])]
        return sum(self.visit(child, inner, repeats) for child in children)

    def _loop_count(self, node: nodes.For, own: frozenset[str]) -> int:
        match node.iter:
            case nodes.List(items=items) | nodes.Tuple(items=items):
                for item in items:
                    self.visit(item, own, 1)
                return len(items)
            case nodes.Call(node=nodes.Name(name="range"), args=[*args], kwargs=[], dyn_args=None, dyn_kwargs=None) if 1 <= len(args) <= 3:
                bounds = [argument.value for argument in args if isinstance(argument, nodes.Const)]
                if len(bounds) == len(args) and all(type(bound) is int for bound in bounds) and 0 not in bounds[2:]:
                    return len(range(*bounds))
        raise self._refuse(node, "a loop goes over range(…) of written numbers or over a list written in the template")


def _describe(node: nodes.Node) -> str:
    match node:
        case nodes.Getattr():
            return f"attribute {node.attr!r}"
        case nodes.BinExpr() | nodes.UnaryExpr():
            return f"operator {node.operator!r}"
        case nodes.Call(node=nodes.Name(name=name)):
            return f"call of {name!r}"
        case _:
            return type(node).__name__.lower()


def _try(source: str, part: str, used: Mapping[str, str]) -> None:
    """Render with sample values, with none at all, and with each one missing: a comparison may fail on an empty field."""
    template = environment(html=False).from_string(source)
    sample = {name: _SAMPLES.get(kind, "sample") for name, kind in used.items()}
    cases: list[tuple[str | None, dict[str, Any]]] = [(None, sample), *((name, sample | {name: None}) for name in used), (None, dict.fromkeys(used))]
    for missing, values in cases:
        try:
            template.render(values)
        except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            line = next((frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename == "<template>"), None)
            hint = f" when {missing!r} is empty; test it first, or give it a default" if missing else ""
            raise ContentError(part, f"fails{hint}: {error}", line=line, variable=missing) from error
