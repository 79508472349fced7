"""The template language: what it means, what it refuses, and that nothing in it can run for ever or reach outside."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from mail_pipelines.messages.compiled import Pieces, Script
from mail_pipelines.messages.content import ContentError
from mail_pipelines.messages.language import always_shows, check, cut, environment

FIELDS: Mapping[str, str] = {"first_name": "text", "city": "text", "points": "number", "vip": "boolean", "born": "date"}


def render(source: str, **values: Any) -> str:
    check(source, "body", FIELDS)
    return cut(source, False, FIELDS).render(values)


@pytest.mark.parametrize(
    ("source", "values", "expected"),
    [
        ("Hi {{ first_name }}!", {"first_name": "Ada"}, "Hi Ada!"),
        ("Hi {{ first_name }}!", {"first_name": None}, "Hi !"),
        ("Hi {{ first_name }}!", {}, "Hi !"),
        ("{{ first_name|default('friend') }}", {}, "friend"),
        ("{{ first_name|default('friend') }}", {"first_name": ""}, "friend"),
        ("{{ first_name|default('friend', true) }}", {"first_name": "Ada"}, "Ada"),
        ("{{ first_name|trim|default('friend')|upper }}", {"first_name": " "}, "FRIEND"),
        ("{{ first_name|default(city) }}", {"city": "Rome"}, "Rome"),
        ("{{ first_name|upper }}{{ first_name|lower }}", {"first_name": "Jürgen"}, "JÜRGENjürgen"),
        ("{{ first_name|title }}", {"first_name": "mary-ann o'NEIL (the 2nd)"}, "Mary-Ann O'neil (The 2nd)"),
        ("{{ first_name|escape }}", {"first_name": "A & B"}, "A & B"),
        ("{{ points }}", {"points": 0}, "0"),
        ("{{ points|default('none') }}", {"points": 0}, "0"),
        ("{{ points }}", {"points": 5.0}, "5"),
        ("{{ points }}", {"points": 5.25}, "5.25"),
        ("{{ vip }}", {"vip": True}, "true"),
        ("{% if vip %}A{% elif points|default(0) > 5 %}B{% else %}C{% endif %}", {"points": 9}, "B"),
        ("{% if city in ['Rome', 'Paris'] %}yes{% endif %}", {"city": "Rome"}, "yes"),
        ("{% if born and born >= '2000-01-01' %}young{% endif %}", {"born": "2003-05-05"}, "young"),
        ("{% for n in range(3) %}{{ loop.index }}{{ first_name }} {% endfor %}", {"first_name": "x"}, "1x 2x 3x "),
        ("{% for c in ['a', 'b'] %}{{ c }}{% if not loop.last %}, {% endif %}{% endfor %}", {}, "a, b"),
        ("{% set name = first_name|default('friend') %}{{ name }}", {}, "friend"),
        ("{{ 'gold' if vip else 'grey' }}", {"vip": False}, "grey"),
        ("{# a note #}x{{- city -}} y", {"city": "Rome"}, "xRomey"),
        ("{% raw %}{{ city }}{% endraw %}", {}, "{{ city }}"),
    ],
)
def test_templates_mean_what_they_say(source: str, values: dict[str, Any], expected: str) -> None:
    assert render(source, **values) == expected


@pytest.mark.parametrize(
    ("source", "line", "variable", "message"),
    [
        ("Hi\n{{ frist_name }}", 2, "frist_name", "unknown variable 'frist_name'; did you mean 'first_name'"),
        ("{{ first_name }}\n\n{{ unsubscribe }}", 3, "unsubscribe", "unknown variable"),
        ("a\n{{ first_name|uper }}", 2, None, "did you mean 'upper'"),
        ("{{ first_name|upper('x') }}", 1, None, "takes no arguments"),
        ("a\n\n{% if points > 5 %}x{% endif %}", 3, "points", "when 'points' is empty"),
        ("{% if 'x' in city %}x{% endif %}", 1, "city", "when 'city' is empty"),
        ("{% if vip is odd %}x{% endif %}", 1, "vip", "when 'vip' is empty"),
        ("a\n{{ first_name", 2, None, "unexpected end"),
        ("a\n{% if vip %}\nb", 2, None, "Unexpected end"),
        ("{{ contact.first_name }}", 1, "contact", "attribute 'first_name' is not available"),
        ("{{ points + 1 }}", 1, "points", "operator '\\+' is not available"),
        ("{{ 'x' if vip }}", 1, None, "needs an `else`"),
        ("{% if first_name is defined %}x{% endif %}", 1, None, "write {% if field %}"),
        ("{% if vip %}{% set a = 1 %}{% endif %}\n{{ a }}", 2, "a", "unknown variable 'a'"),
        ("{{ loop.index }}", 1, "loop", "not available"),
        ("{% if vip %}\n{{ 'a\\r\\nb' }}{% endif %}", 2, None, "control character"),
        ("{{ city|default('\\ud800') }}", 1, None, "control character"),
    ],
)
def test_an_error_names_line_and_variable(source: str, line: int, variable: str | None, message: str) -> None:
    with pytest.raises(ContentError, match=message) as caught:
        check(source, "text", FIELDS)
    assert (caught.value.part, caught.value.line, caught.value.variable) == ("text", line, variable)
    assert f"text, line {line}: " in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ first_name.__class__ }}",
        "{{ first_name['__class__'] }}",
        "{{ first_name|attr('__class__') }}",
        "{{ self }}",
        "{{ self.__init__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ namespace() }}",
        "{{ range.__class__ }}",
        "{{ range }}",
        "{{ first_name.format(points) }}",
        "{{ _link_7 }}",
        "{% for c in [1] %}{{ loop.__class__ }}{% endfor %}",
        "{% for c in [1] %}{{ loop['__class__'] }}{% endfor %}",
        "{% for c in [1] %}{{ loop.cycle(1) }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'x' as x %}",
        "{% extends 'x' %}",
        "{% macro m() %}{% endmacro %}",
        "{% block b %}{% endblock %}",
        "{% call x() %}{% endcall %}",
        "{% autoescape false %}{{ first_name }}{% endautoescape %}",
        "{% filter upper %}x{% endfilter %}",
        "{% set x %}y{% endset %}",
        "{% set a.b = 1 %}",
        "{% with a = 1 %}{% endwith %}",
        "{% do x %}",
    ],
)
def test_nothing_leads_out_of_the_sandbox(source: str) -> None:
    with pytest.raises(ContentError):
        check(source, "body", FIELDS)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(999999999999) %}{% endfor %}",
        "{% for a in range(0, -999999999999, -1) %}{% endfor %}",
        "{% for a in range(1000) %}{% for b in range(1000) %}{% for c in range(1000) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in range(points) %}{% endfor %}",
        "{% for a in first_name %}{% endfor %}",
        "{% for a in range(9000) %}" + "x" * 500 + "{% endfor %}",
        "{% for a in range(10000) %}{{ first_name }}{{ city }}{% endfor %}",
        "{% for a in [1, 2] recursive %}{{ loop([3]) }}{% endfor %}",
        "{% for a in range(1, 9, 0) %}{% endfor %}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'a' * 9999999999 }}",
        "{{ 'a' ~ first_name }}",
        "{{ '%999999999d' % 1 }}",
        "{{ " + "(" * 3000 + "city" + ")" * 3000 + " }}",
        "{% if vip %}" * 300 + "{% endif %}" * 300,
        "{{ city" + "|upper" * 3000 + " }}",
    ],
)
def test_a_template_that_would_not_end_is_refused_at_once(source: str) -> None:
    begin = time.thread_time()
    with pytest.raises(ContentError):
        check(source, "body", FIELDS)
    assert time.thread_time() - begin < 2


def test_only_conditions_and_loops_cost_a_script() -> None:
    assert isinstance(cut("{{ city|default('x')|upper }} {# c #} y", True, FIELDS), Pieces)
    script = cut("{% if vip %}{{ city }}{% endif %}", True, FIELDS)
    assert isinstance(script, Script)
    assert script.variables == ("city", "vip")


def test_values_are_escaped_in_html_only() -> None:
    source = "{% if vip is none %}{{ city }}{{ city|escape }}{{ '<b>' }}<i>{% endif %}"
    assert cut(source, True, FIELDS).render({"city": "<&>"}) == "&lt;&amp;&gt;&lt;&amp;&gt;&lt;b&gt;<i>"
    assert cut(source, False, FIELDS).render({"city": "<&>"}) == "<&><&><b><i>"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("{{ city }}", True),
        ("<a href='{{ city|trim }}'>", True),
        ("{% if vip %}{{ city }}{% else %}x{{ city }}{% endif %}", True),
        ("{% if vip %}{{ city }}{% elif points %}{{ city }}{% else %}{{ city }}{% endif %}", True),
        ("{% if vip %}{{ city }}{% elif points %}{% else %}{{ city }}{% endif %}", False),
        ("{% if vip %}{{ city }}{% endif %}", False),
        ("{% for a in [] %}{{ city }}{% endfor %}", False),
        ("{{ city if vip else '' }}", False),
        ("{# {{ city }} #}", False),
        ("{% raw %}{{ city }}{% endraw %}", False),
    ],
)
def test_a_variable_counts_as_shown_only_if_every_recipient_sees_it(source: str, shown: bool) -> None:
    assert always_shows(source, "city") is shown


names = st.sampled_from(["first_name", "city", "points", "vip"])
filters = st.sampled_from(["|upper", "|lower", "|title", "|trim", "|escape", "|default('x & \"y\"')", "|default(7)"])
expressions = st.builds(lambda name, chain: f"{{{{ {name}{''.join(chain)} }}}}", names, st.lists(filters, max_size=3))
literals = st.text(st.characters(exclude_characters="{}#%\r", exclude_categories=["Cs"]), max_size=20)
templates = st.lists(expressions | literals, max_size=8).map("".join)
anything = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.integers() | st.floats(allow_nan=False) | st.booleans()


@given(templates, st.dictionaries(names, anything))
def test_slots_render_as_the_sandbox_does(source: str, values: dict[str, Any]) -> None:
    check(source, "body", FIELDS)
    pieces = cut(source, False, FIELDS)
    assert isinstance(pieces, Pieces)
    assert pieces.render(values) == environment(html=False).from_string(source).render({name: values.get(name) for name in FIELDS})


@given(templates, st.dictionaries(names, anything))
def test_escaping_each_slot_is_escaping_by_the_sandbox(source: str, values: dict[str, Any]) -> None:
    pieces = cut(source, True, FIELDS)
    assert isinstance(pieces, Pieces)
    slots = [str(escape(slot.text(values))) for slot in pieces.slots]
    escaped = "".join(text for pair in zip(pieces.literals, [*slots, ""], strict=True) for text in pair)
    assert escaped == environment(html=True).from_string(source).render({name: values.get(name) for name in FIELDS})
