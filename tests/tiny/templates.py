"""Chat templates in the ways that real ones are written, and a tokenizer that knows their words."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

SPECIAL = (
    "<|begin|>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>",
    "<|user|>", "<|assistant|>", "<|endoftext|>",
)  # fmt: skip

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# BOS and the day; a turn ends with a token of its own and no line end.
DATED = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "<|header|>system<|/header|>\n\nToday: {{ date_string }}<|eot|>{% for m in messages %}"
    "<|header|>{{ m['role'] }}<|/header|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
# Reasoning is shown after the last user's message alone; enable_thinking false asks for none.
REASONING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% set content = m['content'] %}{% set reasoning = m['reasoning_content'] or '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last and reasoning %}"
    "<think>\n{{ reasoning }}\n</think>\n\n{% endif %}{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
    '<call>{"name": {{ c["function"]["name"] | tojson }}, '
    '"arguments": {{ c["function"]["arguments"] | tojson }}}</call>{% endfor %}<|im_end|>\n'
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As of vision models: content is a list of parts, and a plain text would be lost.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLOCK = (  # to the minute, so that no day has to pass
    "<|user|>Today: {{ strftime_now('%d %b %Y %H:%M') }}\n{% for m in messages %}"
    "{{ ('<|user|>' if m['role'] != 'assistant' else '<|assistant|>') + m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


def weather_call(arguments: Any = '{"town": "Lund"}') -> dict[str, Any]:
    return {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }


def chat_tokenizer(template: str | None, *, bos: bool = False, end: str = "<|im_end|>") -> Any:
    """A byte-level tokenizer that knows `SPECIAL` and says `template`; with `bos` it begins every
    plain text with <|begin|>, as Llama's does."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_words(bos),
        bos_token="<|begin|>",
        eos_token=end,
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL),
        chat_template=template,
    )


@lru_cache
def _words(bos: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([CHATML, DATED, REASONING, TOOLS] * 4, trainer)
    if bos:
        words.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", words.token_to_id("<|begin|>"))]
        )
    return words
