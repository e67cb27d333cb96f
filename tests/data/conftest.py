"""Chat templates of the kinds found in the wild, and the real tokenizers they are put on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|start_header_id|>assistant<|end_header_id|>\n\n'}}{% endif %}"
)
NO_GENERATION_PROMPT = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
)
TRIMS = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'].strip() + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{'<|im_start|>system\nYou are helpful.<|im_end|>\n'}}{% endif %}" + CHATML
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)
#: The generation prompt opens a thought that the history of a conversation does not show.
THINKING = CHATML.replace("assistant\n'}}{% endif %}", "assistant\n<think>\n'}}{% endif %}")
#: Takes the thoughts out of every answer but the last, as Qwen3 does.
FORGETS_THOUGHTS = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n'}}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
#: The instruction brackets of Llama 2 and Mistral, which insist on the order of roles.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + eos_token }}"
    "{% endfor %}"
)
#: Closes the whole conversation with the end token, as Phi-3 does.
CLOSES = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
#: Writes no end token at all.
ENDLESS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
#: Hides what came before: nobody can tell where the answer starts.
REWRITES = (
    "{% for m in messages %}{{ m['content'] if loop.last else m['content'] | upper }}"
    "{{ loop.length }}{% endfor %}"
)
TOOLS = (
    "{% if tools %}{{'<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n'}}{% endif %}"
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content']}}"
    "{% for call in m.tool_calls or [] %}{{'<call>' + (call.function | tojson) + '</call>'}}{% endfor %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)

MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "no generation prompt": NO_GENERATION_PROMPT,
    "trims": TRIMS,
    "default system": DEFAULT_SYSTEM,
    "no system": NO_SYSTEM,
    "thinking": THINKING,
    "forgets thoughts": FORGETS_THOUGHTS,
    "brackets": BRACKETS,
    "closes": CLOSES,
    "endless": ENDLESS,
    "rewrites": REWRITES,
    "tools": TOOLS,
}


@pytest.fixture(scope="session")
def tokenizer_of(shared: Path) -> Callable[..., Any]:
    """`tokenizer_of(model, template)`: a real tokenizer, with one of `TEMPLATES` and its marks added."""

    def make(name: str = "stories260K", template: str | None = None) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
        if template is not None:
            tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
            tokenizer.chat_template = TEMPLATES[template]
        return tokenizer

    return make
