"""Chat templates: equal to transformers, and neither an escape nor a hang for those that try."""

import time

import pytest
from chat_templates import ALTERNATING, CONVERSATIONS, EXPECTED, PLAIN, SMOLLM2, TEMPLATES

from efftrain.errors import ConfigError, ModelFileError
from efftrain.interop.chat_template import render
from efftrain.interop.gguf_file import GgufFile
from efftrain.interop.gguf_tokenizer import read_tokenizer

USER = [{"role": "user", "content": "hi"}]


def rendered(template: str, messages=USER) -> str:
    return render(template, messages, bos="<s>", eos="</s>", add_generation_prompt=False)


@pytest.mark.parametrize("case", EXPECTED, ids=str)
def test_conversations_are_those_of_transformers(case):
    template, conversation, prompt = case
    found = render(
        TEMPLATES[template], CONVERSATIONS[conversation], bos="<s>", eos="</s>", add_generation_prompt=prompt
    )
    assert found == EXPECTED[case]


def test_tokens_that_a_model_lacks_are_not_defined():
    template = "{{ bos_token is defined }} {{ eos_token is defined }}"
    assert render(template, USER, eos="</s>", add_generation_prompt=False) == "False True"


def test_long_conversations_are_rendered():
    turn = {"role": "user", "content": "a word and another " * 50}
    answer = turn | {"role": "assistant"}
    found = rendered(ALTERNATING, [turn, answer] * 2000)
    assert found.count("[INST]") == 2000
    loop = "{% for m in messages %}{% set ns.x = ns.x + m.content %}{% endfor %}"
    accumulated = "{% set ns = namespace(x='') %}" + loop + "{{ ns.x }}"
    assert rendered(accumulated, [turn] * 500) == turn["content"] * 500


def test_refusal_by_the_template_is_about_the_messages():
    with pytest.raises(ConfigError, match="the chat template refuses the messages: Conversation roles must alternate"):
        rendered(ALTERNATING, [*USER, *USER])


def test_values_that_json_lacks_are_refused():
    with pytest.raises(ConfigError, match="messages has a value of the type object"):
        rendered(SMOLLM2, [{"role": "user", "content": object()}])


def doubled(step: str, times: int = 99, start: str = "'ab'", end: str = "{{ ns.x }}") -> str:
    """A template that makes something larger many times."""
    loop = f"{{% for i in range({times}) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}{end}"


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{% if messages.__class__ %}{% endif %}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ range.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{% for i in [1] %}{{ loop._iterable }}{% endfor %}",
    "{% macro f() %}{% endmacro %}{{ f._func }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
    "{% extends 'other' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
]
ENDLESS = [
    "{% for x in range(10**9) %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{{ 'a' * 10**10 }}",
    "{{ [1] * 10**10 }}",
    "{{ 10 ** (10 ** 10) }}",
    doubled("ns.x ~ ns.x"),
    doubled("ns.x + ns.x"),
    doubled("[ns.x, ns.x]"),
    doubled("(ns.x, ns.x)"),
    doubled("{'a': ns.x, 'b': ns.x}", end="{{ ns.x|tojson }}"),
    doubled("[ns.x, ns.x]", end="{{ ns.x == ns.x }}"),
    doubled("ns.x * ns.x", start="3"),
    doubled("[ns.x]", times=2000),
    doubled("ns.x.replace('a', ns.x)", start="'a' * 1000"),
    doubled("ns.x|replace('a', ns.x)", start="'a' * 1000"),
    "{{ 'aa'" + "|replace('a', 'aaaaaaaaaaaa')" * 30 + " }}",
    "{% set b = 'a' * 100000 %}{{ ([b] * 1000)|join(b) }}",
    "{% set b = 'a' * 100000 %}{{ b.join([b] * 1000) }}",
    "{% set b = 'a' * 900000 %}{{ ''.join(range(9999)|map('replace', '1', b)) }}",
    "{% set b = 'a' * 99999 %}{% for i in range(99999) %}{{ b }}{% endfor %}",
    "{% set b = 'a' * 99999 %}{% set x %}{% for i in range(99999) %}{{ b }}{% endfor %}{% endset %}",
    "{% set b = 'a' * 900000 %}{% for i in range(99999) %}{% set c = b[1:] %}{% endfor %}",
    "{% for i in range(99999) %}{% for c in 'abc' %}" + "x" * 100_000 + "{% endfor %}{% endfor %}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ 1.5|round(10**10, 'ceil') }}",
    "{{ [1]|batch(10**10, 0)|list }}",
    "{{ [[1]]|tojson(indent=10**10) }}",
    "{{ 'a'|indent(10**10, true) }}",
    "(" * 300_000,
]
BROKEN = ["{% if %}", "{{ a.b.c }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"]


@pytest.mark.parametrize("template", [*ESCAPES, *ENDLESS, *BROKEN], ids=lambda template: template[:70])
def test_templates_that_try_more_than_to_render_end_at_once_in_one_sentence(template):
    start = time.perf_counter()
    with pytest.raises(ModelFileError, match="the chat template cannot be rendered: ") as caught:
        rendered(template)
    assert time.perf_counter() - start < 10
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_namespace_that_holds_itself_can_be_printed():
    assert rendered("{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}{{ [ns] }}") == "<namespace>[<namespace>]"


@pytest.mark.pretrained
def test_published_template_is_the_one_tested_here(smollm2):
    found = read_tokenizer(smollm2, GgufFile.open(smollm2).metadata)
    assert found.chat_template == SMOLLM2
    text = render(found.chat_template, PLAIN, add_generation_prompt=True)
    ids = found.tokenizer.encode(text).ids
    assert ids[0] == found.bos
    assert ids.count(found.eos[0]) == 4  # the system's turn and the three given
    assert found.tokenizer.decode(ids, skip_special_tokens=False) == text
