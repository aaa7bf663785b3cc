"""Templates of well-known chat formats, in the Jinja that Hugging Face tokenizers read."""

from typing import Final

TEMPLATES: Final = {
    "alpaca": """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '### Instruction:\\n' + message['content'].strip() + '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '### Response:\\n' + message['content'].strip() + (eos_token or '') + '\\n\\n' -}}
{%- else -%}
{{- message['content'].strip() + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
""",
    "chatml": """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
    "exaone": """\
{%- if messages and messages[0]['role'] != 'system' -%}{{- '[|system|][|endofturn|]\\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '[|' + message['role'] + '|]' + message['content'] -}}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}
""",
    "llama3": """\
{{- bos_token or '' -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'].strip() + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
""",
    "mistral": """\
{{- bos_token or '' -}}
{%- set turn = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set turn.system = message['content'].strip() + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + turn.system + message['content'].strip() + ' [/INST]' -}}
{%- set turn.system = '' -%}
{%- else -%}
{{- ' ' + message['content'].strip() + (eos_token or '') -}}
{%- endif -%}
{%- endfor -%}
""",
}
"""Templates by the names that recipes have for them."""
