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
