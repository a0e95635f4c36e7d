"""Chat templates: the model's own, from every kind of file, in a sandbox with limits."""

import sys
import time

import pytest
import tiny_files

from engine import Model, load_model
from engine.chat import MOST_SOURCE, ChatTemplate, template_from
from engine.errors import DamagedFile, InputError
from engine.library import byte_level

USER = [{"role": "user", "content": "Who?"}]
TURNS = [*USER, {"role": "assistant", "content": "Me."}, {"role": "user", "content": "Why?"}]

CHATML = """\
{{ bos_token }}{% for message in messages %}
    {%- if loop.first and message.role == 'user' -%}
<|im_start|>system
Be brief.<|im_end|>
    {%- endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
"""After a fashion of several published ones: blocks are trimmed, and so are the lines they stand on."""


def test_turns_become_the_text_the_template_writes():
    told = ChatTemplate(CHATML, {"bos_token": "<s>"}).render(TURNS)
    assert told == (
        "<s><|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nMe.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "Who?"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Who?"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 * 3 %}{% endfor %}{{ ns.n }}",
            "18",
        ),
        ("{{ messages[0].role.upper() ~ messages | length }}", "USER3"),
        ("{{ eos_token }}{% if tools %}tools{% endif %}{{ 7 % 4 }}", "</s>3"),
    ],
)
def test_what_templates_of_real_models_use_is_there(source, text):
    assert ChatTemplate(source, {"eos_token": "</s>"}).render(TURNS) == text


def test_the_day_is_todays():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(USER) == time.strftime("%Y")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ 'a' * 1000000000 }}",
        "{{ 9 ** 999999 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 'a'.zfill(1000000000) }}",
        "{{ 'a' | center(1000000000) }}",
        "{% for",
        "{{ nothing.at.all }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_a_template_that_reaches_out_or_is_broken_is_named_as_unusable(source):
    with pytest.raises(DamagedFile, match="chat template cannot be used"):
        ChatTemplate(source).render(USER)


def test_a_templates_own_refusal_is_an_error_of_the_input():
    with pytest.raises(InputError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(USER)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "longer than"),
        ("{% for i in range(90000) %}{{ 'a lot of text, again and again' }}{% endfor %}", "more than"),
    ],
)
def test_a_template_that_does_not_end_is_stopped(source, why):
    before = sys.gettrace()
    with pytest.raises(InputError, match=why):
        ChatTemplate(source).render(USER)
    assert sys.gettrace() is before


def test_an_endless_source_is_not_read():
    with pytest.raises(DamagedFile, match="characters"):
        template_from({"default": "x" * (MOST_SOURCE + 1)}, {})


def test_a_model_without_a_template_says_so():
    with pytest.raises(InputError, match="no chat template"):
        byte_level().encode_chat(USER)


@pytest.mark.parametrize("write", [tiny_files.hf_directory, tiny_files.gguf_file])
def test_a_converted_model_reads_the_template_of_its_files(write, tmp_path, monkeypatch):
    from engine import converted, load

    monkeypatch.setattr(load, "LEAST", 0)
    monkeypatch.setattr(converted, "directory", lambda: tmp_path / "converted")
    path = write(tmp_path / "tiny.gguf")
    first, second = load_model(str(path)), load_model(str(path))
    assert (first.conversion, second.conversion) == ("made", "used")
    assert first.tokenizer.chat_template == second.tokenizer.chat_template


@pytest.mark.real
def test_smollm2_reads_what_transformers_gives_it(smollm2: Model):
    ids = smollm2.encode_chat("What is the capital of France?")
    assert smollm2.tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == 1, "<|im_start|> is one token, and BOS comes once"
    assert smollm2.encode_chat([{"role": "user", "content": "What is the capital of France?"}]) == ids
