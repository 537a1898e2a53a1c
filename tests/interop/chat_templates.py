"""Chat templates and conversations, with what transformers makes of them."""

SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

# Blocks on lines of their own, a first message that is set aside, a namespace, filters and a refusal.
ALTERNATING = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- set ns = namespace(last=-1) %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant!') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set ns.last = loop.index0 %}
        {%- set before = system ~ '\\n\\n' if loop.first and system else '' %}
        {{- '[INST] ' ~ before ~ message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if not add_generation_prompt %}
    {{- '(' ~ ns.last ~ '/' ~ loop_messages | length ~ ')' }}
{%- endif %}
"""

# White space that trim_blocks and lstrip_blocks take away, a macro, loop controls, JSON, and the tag generation.
TOOLS = """\
{% macro call(name, arguments) %}
<call>{{ {'name': name, 'arguments': arguments} | tojson }}</call>
{% endmacro %}
{% if tools is not none and tools %}
tools: {{ tools | tojson(indent=2) }}
{% endif %}
{% for message in messages %}
    {% if message.role == 'note' %}
        {% continue %}
    {% endif %}
<{{ message.role | upper }}>
    {% if message.role == 'assistant' %}
{% generation %}
{{ message.content or '' }}
        {% for tool_call in message.tool_calls or [] %}
{{ call(tool_call.name, tool_call.arguments) -}}
        {% endfor %}
{% endgeneration %}
    {% elif message.content is string %}
{{ message.content.replace('<', '&lt;').split('\\n') | join(' | ') }}
    {% else %}
{{ message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') }}
    {% endif %}
{% if loop.index >= 4 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<ASSISTANT>
{% endif %}
"""

PLAIN = [
    {"role": "user", "content": " What is 1 < 2?\n"},
    {"role": "assistant", "content": "It is \u201ctrue\u201d. "},
    {"role": "user", "content": "日本語\nのテキスト"},
]
WITH_SYSTEM = [{"role": "system", "content": "  Be brief.  "}, *PLAIN]
WITH_TOOLS = [
    {"role": "note", "content": "left out"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Rain in "}, {"type": "image"}, {"type": "text", "text": "Köln?"}],
    },
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "weather", "arguments": {"city": "Köln", "days": [1, 2], "now": True, "html": "<b>"}}],
    },
    {"role": "tool", "content": "a<b\nc"},
    {"role": "user", "content": "left out, because of the break"},
]
TEMPLATES = {"smollm2": SMOLLM2, "alternating": ALTERNATING, "tools": TOOLS}
CONVERSATIONS = {"plain": PLAIN, "with_system": WITH_SYSTEM, "with_tools": WITH_TOOLS}

# transformers 5.24.0: tokenizer.apply_chat_template(CONVERSATIONS[conversation], chat_template=TEMPLATES[template],
#   tokenize=False, add_generation_prompt=prompt), where the tokenizer has bos_token="<s>" and eos_token="</s>".
EXPECTED = {
    ("smollm2", "plain", False): (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n"
        " What is 1 < 2?\n"
        "<|im_end|>\n"
        "<|im_start|>assistant\n"
        "It is “true”. <|im_end|>\n"
        "<|im_start|>user\n"
        "日本語\n"
        "のテキスト<|im_end|>\n"
    ),
    ("smollm2", "plain", True): (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n"
        " What is 1 < 2?\n"
        "<|im_end|>\n"
        "<|im_start|>assistant\n"
        "It is “true”. <|im_end|>\n"
        "<|im_start|>user\n"
        "日本語\n"
        "のテキスト<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    ("smollm2", "with_system", False): (
        "<|im_start|>system\n"
        "  Be brief.  <|im_end|>\n"
        "<|im_start|>user\n"
        " What is 1 < 2?\n"
        "<|im_end|>\n"
        "<|im_start|>assistant\n"
        "It is “true”. <|im_end|>\n"
        "<|im_start|>user\n"
        "日本語\n"
        "のテキスト<|im_end|>\n"
    ),
    ("smollm2", "with_system", True): (
        "<|im_start|>system\n"
        "  Be brief.  <|im_end|>\n"
        "<|im_start|>user\n"
        " What is 1 < 2?\n"
        "<|im_end|>\n"
        "<|im_start|>assistant\n"
        "It is “true”. <|im_end|>\n"
        "<|im_start|>user\n"
        "日本語\n"
        "のテキスト<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    ("alternating", "plain", False): (
        "<s>[INST] What is 1 < 2? [/INST] It is “true”.</s>[INST] 日本語\nのテキスト [/INST](2/3)"
    ),
    ("alternating", "plain", True): (
        "<s>[INST] What is 1 < 2? [/INST] It is “true”.</s>[INST] 日本語\nのテキスト [/INST]"
    ),
    ("alternating", "with_system", False): (
        "<s>[INST] Be brief.\n\nWhat is 1 < 2? [/INST] It is “true”.</s>[INST] 日本語\nのテキスト [/INST](2/3)"
    ),
    ("alternating", "with_system", True): (
        "<s>[INST] Be brief.\n\nWhat is 1 < 2? [/INST] It is “true”.</s>[INST] 日本語\nのテキスト [/INST]"
    ),
    ("tools", "plain", False): (
        "<USER>\n What is 1 &lt; 2? | \n<ASSISTANT>\nIt is “true”. \n<USER>\n日本語 | のテキスト\n"
    ),
    ("tools", "plain", True): (
        "<USER>\n What is 1 &lt; 2? | \n<ASSISTANT>\nIt is “true”. \n<USER>\n日本語 | のテキスト\n<ASSISTANT>\n"
    ),
    ("tools", "with_tools", False): (
        "<USER>\n"
        "Rain in Köln?\n"
        "<ASSISTANT>\n"
        "\n"
        '<call>{"name": "weather", "arguments": {"city": "Köln", "days": [1, 2], "now": true, "html": "<b>"}}</call>\n'
        "<TOOL>\n"
        "a&lt;b | c\n"
    ),
    ("tools", "with_tools", True): (
        "<USER>\n"
        "Rain in Köln?\n"
        "<ASSISTANT>\n"
        "\n"
        '<call>{"name": "weather", "arguments": {"city": "Köln", "days": [1, 2], "now": true, "html": "<b>"}}</call>\n'
        "<TOOL>\n"
        "a&lt;b | c\n"
        "<ASSISTANT>\n"
    ),
}
