"""What chat templates may compute: what transformers lets them, as long as it stays small."""

import time

import pytest

from engine.chat import ChatTemplate
from engine.errors import DamagedFile, InputError

USER = [{"role": "user", "content": "Who?\nMe"}]
TOOL = {"name": "add", "parameters": {"a": [1, 2]}}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ '%s is %05.2f' % ('x', 2.5) }}", "x is 02.50"),
        ("{{ '%(a)s-%(a)s' | format(a='y') }}", "y-y"),
        ("{{ '%s %d' | format('n', 7) }}", "n 7"),
        ("{{ '{:>4}|{a}'.format('x', a=1) }}", "   x|1"),
        ("{{ messages[0].content | indent(2) }}", "Who?\n  Me"),
        ("{{ messages[0].content | indent(2, first=true) }}", "  Who?\n  Me"),
        ("{{ 'a'.ljust(3) ~ '7'.zfill(3) ~ 'b'.rjust(3) ~ 'c'.center(3) }}", "a  007  b c "),
        ("{{ 'c' | center(5) }}", "  c  "),
        ("{{ 'a\tb'.expandtabs(4) }}", "a   b"),
        ("{{ '-' * 5 ~ 2 ** 8 ~ 3 * 4 }}", "-----25612"),
        ("{{ 'abc'.replace('b', 'xx') ~ ', '.join(['a', 'b']) ~ [1, 2] | join('-') }}", "axxca, b1-2"),
        ("{{ [1, 2, 3] | batch(2) | list }}", "[[1, 2], [3]]"),
        ("{{ tools | tojson(indent=4) }}",
         '[\n    {\n        "name": "add",\n        "parameters": {\n            "a": '
         "[\n                1,\n                2\n            ]\n        }\n    }\n]"),
        ("{{ tools[0].parameters | tojson(separators=(',', ':')) }}", '{"a":[1,2]}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(sort_keys=true, ensure_ascii=true) }}", '{"a": 1, "b": "\\u00e9"}'),
        ("{% set ns = namespace(x='') %}{% for i in range(3) %}{% set ns.x = ns.x + 'ab' %}{% endfor %}{{ ns.x }}",
         "ababab"),
    ],
)  # fmt: skip
def test_what_transformers_lets_templates_compute_is_there(source, text):
    assert ChatTemplate(source).render(USER, tools=[TOOL]) == text


GROW = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x = "


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%.1000000000f' % 1.5 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=1000000000) }}",
        "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ 'x'.rjust(1000000000) }}",
        "{{ 'x'.zfill(1000000000) }}",
        "{{ 'x'.center(1000000000) }}",
        "{{ '\t'.expandtabs(1000000000) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'a\nb' | indent(10**9) }}",
        "{{ 'a\nb' | indent(width=10**9) }}",
        "{{ [1] | batch(1000000000, 0) | list }}",
        "{{ (1).to_bytes(1000000000, 'big') }}",
        "{{ 1.5 | round(1000000000, 'ceil') }}",
        "{{ [1, [2]] | tojson(indent=1000000000) }}",
        "{{ [1] * 1000000000 }}",
        GROW + "ns.x ~ ns.x %}{% endfor %}",
        GROW + "ns.x + ns.x %}{% endfor %}",
        GROW + "ns.x.replace('a', ns.x) %}{% endfor %}",
        GROW + "ns.x | replace('a', ns.x) %}{% endfor %}",
        GROW + "ns.x.join(ns.x) %}{% endfor %}",
        GROW + "range(1000) | map('string') | join(ns.x) %}{% endfor %}",
        GROW + "'%s%s' % (ns.x, ns.x) %}{% endfor %}",
        GROW + "'{0}{0}'.format(ns.x) %}{% endfor %}",
        "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}",
        "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + GROW + "m(ns.x) %}{% endfor %}",
    ],
)
def test_nothing_grows_without_bounds(source):
    began = time.process_time()
    with pytest.raises((DamagedFile, InputError), match=r"makes|writes more"):
        ChatTemplate(source).render(USER)
    assert time.process_time() - began < 10


PAIRS = "{% set ns = namespace(a=['x'], b=['x']) %}{% for i in range(20) %}"


def pairs(grown: str, then: str = "ns.a | length") -> str:
    """What holds one thing twice, and that twice, and so on: a few lists that take millions of characters to write."""
    return f"{PAIRS}{{% set ns.a = {grown} %}}{{% endfor %}}{{{{ {then} }}}}"


BOTH = PAIRS + "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
BIG = "{% set x = 'a' * 900000 %}"


@pytest.mark.parametrize(
    "source",
    [
        pairs("[ns.a, ns.a]", "ns.a ~ ''"),
        pairs("[ns.a, ns.a]", "ns.a | string | length"),
        pairs("[ns.a, ns.a]", "ns.a | tojson | length"),
        pairs("[ns.a, ns.a]", "ns.a | pprint | length"),
        pairs("[ns.a, ns.a]", "('%s' % ns.a) | length"),
        BOTH + "{{ ns.a == ns.b }}",
        BOTH + "{{ ns.a < ns.b }}",
        BOTH + "{{ ns.a in [ns.b] }}",
        pairs("(ns.a, ns.a)"),
        pairs("(ns.a, ns.a)", "{(ns.a, ): 1} | length"),
        pairs("{'x': ns.a, 'y': ns.a}"),
        pairs("dict(x=ns.a, y=ns.a)"),
        pairs("dict([('x', ns.a)], y=ns.a)"),
        pairs("[ns.a] * 2"),
        pairs("[ns.a] + [ns.a]"),
        pairs("range(2) | map(attribute='none', default=ns.a) | list"),
        pairs("[ns.a] | batch(2, ns.a) | list"),
        pairs("['x', ns.a, ns.a] | slice(2) | list"),
        pairs("[[1, ns.a], [1, ns.a]] | groupby(0)"),
        pairs("{'x': ns.a, 'y': ns.a} | dictsort"),
        pairs("{'x': ns.a, 'y': ns.a}.items()"),
        pairs("[ns.a, ns.a].copy()"),
        pairs("[ns.a, ns.a] | sort"),
        pairs("[[ns.a], [ns.a]] | sum(start=[])"),
        pairs("cycler(ns.a, ns.a).items"),
        "{% macro m(n) %}{% set n.b = varargs %}{% endmacro %}" + pairs("[m(ns, ns.a, ns.a), ns.b]"),
        "{% macro m() %}{{ kwargs }}{% endmacro %}" + BIG + "{{ m(a=x, b=x) | length }}",
        BIG + "{{ ([x, x] | string) | length }}",
        BIG + "{% for part in [1] | batch(90, x) %}{{ part | length }}{% endfor %}",
        BIG + "{{ range(90) | map(attribute='none', default=x) | join | length }}",
        "{{ range(1000) | map('center', 90000) | list | length }}",
        "{{ ([2 ** 4500] * 9000) | length }}",
        "{{ ([[1]] * 100000) | sum(start=[]) | length }}",
        "{{ (['a'] * 150000) | tojson(indent=32) | length }}",
        "{% set ns = namespace(a=1) %}{% for i in range(150) %}{% set ns.a = [ns.a] %}{% endfor %}",
        "{% set ns = namespace(a=1) %}{% for i in range(150) %}{% set ns.a = (ns.a,) %}{% endfor %}",
        "{% set ns = namespace(a=1) %}{% for i in range(150) %}{% set ns.a = {'a': ns.a} %}{% endfor %}",
        "{% set ns = namespace(a=1) %}{{ ns }}",
        "{% set ns = namespace(a=1) %}{% set ns.a = [ns, ns] %}{{ ns.a | string | length }}",
        "{{ strftime_now('%c' * 100000) | length }}",
    ],
)
def test_what_is_held_twice_counts_twice(source):
    began = time.process_time()
    with pytest.raises((DamagedFile, InputError), match=r"makes|writes"):
        ChatTemplate(source).render(USER)
    assert time.process_time() - began < 10


def test_blocks_too_deep_for_python_are_refused():
    with pytest.raises(DamagedFile, match="indentation"):
        ChatTemplate("{% if 1 %}" * 150 + "{% endif %}" * 150).render(USER)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% set a, (b, c) = 1, [2, 3] %}{{ a }}{{ b }}{{ c }}", "123"),
        ("{{ [1, (2,), {'a': [3]}, ()] }}", "[1, (2,), {'a': [3]}, ()]"),
        ("{% set g = [1, 2, 3] | map('string') %}{{ g | first }}{{ g | first }}{{ g | list }}", "12['3']"),
        ("{{ [[1, 2], [3]] | sum(start=[]) }}", "[1, 2, 3]"),
        ("{{ 'a-b' | replace('-', '+') ~ ([3, 1] | sort) ~ (1, ) }}", "a+b[1, 3](1,)"),
        ("{% set ns = namespace(m=[]) %}{% for i in range(300) %}{% set ns.m = ns.m + [messages[0]] %}{% endfor %}"
         "{{ ns.m | length }}", "300"),
        ("{% set ns = namespace({'a': 1}, b=2) %}{% set ns.a = ns.b + 1 %}{{ ns.a }}", "3"),
        ("{{ range(3) | list }}{{ range(99999) | list | length }}", "[0, 1, 2]99999"),
    ],
)  # fmt: skip
def test_what_is_small_is_written_as_jinja_writes_it(source, text):
    assert ChatTemplate(source).render(USER) == text
