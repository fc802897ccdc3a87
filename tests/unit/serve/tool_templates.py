"""Chat templates that take tools, in the three forms that are known; written for these tests."""

from __future__ import annotations

import json
from pathlib import Path

from outcrop.data.records import Tool

WEATHER = Tool(
    "get_weather",
    "Tells the weather of a city.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
HERMES = """
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}Functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer with <tool_call>{"name": name, "arguments": object}</tool_call>.<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role != 'system' %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = """
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>ipython
{{ {"output": message.content} | tojson }}<|im_end|>
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception("One call at a time.") }}{% endif %}
{%- set call = message.tool_calls[0].function %}<|im_start|>assistant
{{ '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}}<|im_end|>
{%- else %}<|im_start|>{{ message.role }}
{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson(indent=2) }}
{% endfor %}{% endif %}{{ message.content }}<|im_end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MISTRAL = """
{%- for message in messages %}
{%- if message.tool_calls is defined %}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("An id has nine characters.") }}{% endif %}
{%- endfor %}[TOOL_CALLS] {{ message.tool_calls | tojson }}<|im_end|>
{%- elif message.role == 'tool' %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- elif message.role == 'assistant' %}{{ message.content }}<|im_end|>
{%- else %}
{%- if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{{- '[INST]' + message.content + '[/INST]' }}
{%- endif %}
{%- endfor %}"""
BY_NAME = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL}


def give_template(folder: Path, template: str | None) -> Path:
    """Write the template into the folder of a tiny model."""
    config = {"eos_token": "<|im_end|>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
