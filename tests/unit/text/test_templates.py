"""A chat template out of a stranger's file can neither run code nor stall the program."""

import pytest

from groundup.base.errors import UserError
from groundup.text import templates
from groundup.text.templates import render_template

MESSAGES = [{"role": "user", "content": "hi"}]


def render(template: str) -> str:
    return render_template(template, MESSAGES, add_generation_prompt=True, special={"bos_token": "<s>"})


def test_renders_what_templates_expect() -> None:
    template = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- generation %}{{ m['content'] | trim | upper }}{% endgeneration %}
{%- endfor %}
{%- macro twice(x) %}{{ x * 2 }}{% endmacro %}
{{- twice('ab') }}{{ 3 * 4 }}{{ tools is none }}{% if strftime_now is defined %}!{% endif %}"""
    assert render(template) == "<s>HIabab12True"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch /tmp/x') }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__.time }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ''|attr('__class__')|attr('__mro__')|attr('pop')() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 'a' * 100000000 }}",
        "{{ [0] * 100000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ range(100000000) | list }}",
        "{{ messages[7].content.x }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in messages %}",
        "{{ " + "(" * 2000 + ")" * 2000 + " }}",
        "x" * 1_000_001,
    ],
)
def test_hostile_templates_are_refused(template: str) -> None:
    with pytest.raises(UserError, match="chat template"):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% for a in range(90000) -%} {%- for b in range(90000) -%} x {%- endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_endless_templates_are_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_MAX_CPU_SECONDS", 0.2)
    with pytest.raises(UserError, match="ran for more than"):
        render(template)


def test_long_output_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_MAX_RENDERED_CHARACTERS", 1000)
    with pytest.raises(UserError, match="wrote more than"):
        render("{% for a in range(90000) %}" + "x" * 100 + "{% endfor %}")
