"""Chat templates: the text that transformers 5.23 makes of them, and what none of them may do."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

import zoo
from zoo.published_folder import PretrainedError

LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=1) }}
    {%- endfor %}
{%- endif %}
{{- system }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
CHAT_ML = """{% set seen = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'skipped' %}{% continue %}{% endif %}
    {% set seen.count = seen.count + 1 %}
    {{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{ message.content }}{% endgeneration %}
    {{- '<|im_end|>\\n' }}
{% endfor %}
{{ seen.count }}{{ pad_token is defined }}{{ documents is none }}
"""
MESSAGES = [
    {"role": "system", "content": " Be <brief> & kind. "},
    {"role": "user", "content": "héllo\n  there "},
    {"role": "skipped", "content": "x"},
]


def folder(path: Path, template: Any = None, **files: str) -> Path:
    """A tokenizer whose tokens are single letters."""
    letters = {letter: i for i, letter in enumerate(["<s>", "</s>", "?", *map(chr, range(32, 127))])}
    made = Tokenizer(models.BPE(letters, [], unk_token="?"))
    made.save(str(path / "tokenizer.json"))
    told = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(told))
    for name, text in files.items():
        (path / f"{name}.jinja").write_text(text)
    return path


def test_the_text_of_a_llama_template(tmp_path) -> None:
    found = zoo.tokenizer(folder(tmp_path, LLAMA))
    told = "<s><|start|>system<|end|>\n\n{}Be <brief> & kind.<|start|>user<|end|>\n\nhéllo\n  there</s>"
    end = "<|start|>skipped<|end|>\n\nx</s>"
    assert found.chat_text(MESSAGES) == told.format("") + end
    assert found.chat_text(MESSAGES, add_generation_prompt=True).endswith(end + "<|start|>assistant<|end|>\n\n")
    tools = [{"name": "é<"}]
    assert found.chat_text(MESSAGES, tools=tools) == told.format('{\n "name": "é<"\n}') + end
    assert found.chat(MESSAGES) == found.encode([found.chat_text(MESSAGES)], special=False)[0]
    assert found.chat(MESSAGES)[0] == 0


def test_the_text_of_a_chat_ml_template(tmp_path) -> None:
    found = zoo.tokenizer(folder(tmp_path, LLAMA, chat_template=CHAT_ML))  # the file wins
    first = "<|im_start|>system\n Be <brief> & kind. <|im_end|>\n\n"
    second = "<|im_start|>user\nhéllo\n  there <|im_end|>\n\n"
    assert found.chat_text(MESSAGES) == first + second + "2FalseTrue"


def test_templates_by_purpose_and_what_they_read(tmp_path) -> None:
    named = [{"name": "default", "template": "plain {{ x }}"}, {"name": "tool_use", "template": "{{ tools|length }}"}]
    found = zoo.tokenizer(folder(tmp_path, named))
    assert found.chat_text(MESSAGES, x=3) == "plain 3"
    assert found.chat_text(MESSAGES, tools=[{}, {}]) == "2"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__ }}", "does what no template may (access to '__class__' of a str)"),
        ("{{ ''['__class__'].__mro__ }}", "access to '__class__' of a str"),
        ("{{ ''|attr('__class__') }}", "access to '__class__' of a str"),
        ("{{ '{0.__class__}'.format(1) }}", "access to '__class__' of a int"),
        ("{{ raise_exception.__globals__ }}", "access to '__globals__' of a function"),
        ("{{ dict.__globals__ }}", "access to '__globals__' of a function"),
        ("{{ cycler.__init__.__globals__.os }}", "access to '__init__' of a type"),
        ("{{ namespace(__class__=1) }}", "namespace with the name '__class__'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "namespace with the name '_x'"),
        ("{{ messages.append(1) }}", "does what no template may"),
        ("{{ messages[0].update(role='x') }}", "does what no template may"),
        ("{{ messages[0].pop('role') }}", "does what no template may"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "cannot be rendered (Range too big"),
        ("{{ 'x' * 10 ** 9 }}", "does what no template may (* with a result of more than 1000000 parts)"),
        ("{{ 10 ** 1000000 }}", "does what no template may (** with a result of more than"),
        ("{{ '%9999d' % 1 }}", "does what no template may (a format of any width)"),
        ("{{ '%*d'|format(9999, 1) }}", "a format of any width"),
        ("{{ '{:9999}'.format(1) }}", "a format of any width"),
        ("{{ '{:{}}'.format(1, 9999) }}", "a format of any width"),
        ("{{ messages|tojson(indent=999) }}", "an indent of more than 64"),
        ("{{ 'x'|indent(999) }}", "an indent of more than 64"),
        ("{{ 'x'|indent(width=999) }}", "an indent of more than 64"),
        ("{{ lipsum(n=999) }}", "cannot be rendered ('lipsum' is undefined)"),
        ("{% include 'config.json' %}", "cannot be rendered (no loader for this environment specified)"),
        ("{{ open('config.json') }}", "cannot be rendered ('open' is undefined)"),
        ("{{ raise_exception('no\n system') }}", "cannot be rendered (no system)"),
        ("{{ raise_exception('') }}", "cannot be rendered (TemplateError)"),
        ("{% if %}", "cannot be rendered (Expected an expression"),
        ("{{ 1 / 0 }}", "cannot be rendered (division by zero)"),
        ("{{ messages[0].content + 1 }}", "cannot be rendered (can only concatenate str"),
        (7, "has no chat template"),
        (None, "has no chat template, neither chat_template.jinja nor one in tokenizer_config.json"),
    ],
)
def test_what_a_template_may_not_do_is_refused_in_a_line(tmp_path, template: Any, words: str) -> None:
    found, before = zoo.tokenizer(folder(tmp_path, template)), json.dumps(MESSAGES)
    with pytest.raises(PretrainedError) as error:
        found.chat_text(MESSAGES)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert json.dumps(MESSAGES) == before


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "'hello' is no chat"),
        ([], "[] is no chat"),
        ({"role": "user"}, "is no chat: give a list of"),
        (["hello"], "is no chat: give a list of"),
        ([{"role": "user", "content": Path("x")}], "messages[0].content of a chat is a PosixPath: give text"),
        ([{"role": "user", 3: "x"}], "messages[0] of a chat is a dict"),
    ],
)
def test_what_is_no_chat_is_told(tmp_path, messages: Any, words: str) -> None:
    with pytest.raises(PretrainedError) as error:
        zoo.tokenizer(folder(tmp_path, LLAMA)).chat(messages)
    assert words in str(error.value) and "\n" not in str(error.value)
