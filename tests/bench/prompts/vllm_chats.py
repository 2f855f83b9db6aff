"""Chats as vLLM's server makes text of them: JSON on stdin and stdout, run with -m."""

from __future__ import annotations

import json
import sys
from typing import Any


def rendered(target: str, case: dict[str, Any]) -> str:
    """One chat, as `HfRenderer.render_messages` puts it together for a request."""
    from vllm.config import ModelConfig
    from vllm.renderers.chat_utils import parse_chat_messages
    from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template
    from vllm.tokenizers import get_tokenizer

    config = ModelConfig(model=target, dtype="float32")
    tokenizer: Any = get_tokenizer(target)
    template, tools = case["template"], case["tools"]
    content = resolve_chat_template_content_format(
        template, tools, "auto", tokenizer, model_config=config
    )
    messages, _, _ = parse_chat_messages(case["messages"], config, content)
    return str(
        safe_apply_chat_template(
            config,
            tokenizer,
            messages,
            chat_template=template,
            tools=tools,
            tokenize=False,
            add_generation_prompt=True,
            **case["kwargs"],
        )
    )


if __name__ == "__main__":
    given = json.load(sys.stdin)
    found = [rendered(given["target"], case) for case in given["cases"]]
    print("\n" + json.dumps(found))
