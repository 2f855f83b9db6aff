"""Prompts that `smollm2-draft` also learned from: `python tools/general_prompts.py DATA OUT`.

DATA is a folder as AFASPEC_DATA names one (docs/bench.md), with gsm8k/train.jsonl,
python_algorithms.jsonl.gz and rust_rfcs.jsonl.gz: 500 training questions of GSM8K, 300 functions to
write, 400 paragraphs to sum up, explain or translate. Of the suites only rust-rfcs has texts of
these.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from pathlib import Path

QUESTIONS, FUNCTIONS, PARAGRAPHS = 500, 300, 400
DOCUMENTED = re.compile(r'def (\w+)\([^)]*\)[^:]*:\s*\n\s*"""(.*?)(>>>|""")', re.S)
PROGRAM = (
    "Write a Python function `{name}`. {text}",
    "How would you write this in Python? {text}",
    "Implement `{name}` in Python and explain it. {text}",
)
PASSAGE = (
    "Summarize this in one or two sentences.\n\n{text}",
    "Rewrite this so that a beginner understands it:\n\n{text}",
    "{text}\n\nWhat is the main point?",
    "List the key points of the following text.\n\n{text}",
    "Translate into German: {first}",
    "Give three questions that this text answers.\n\n{text}",
)


def functions(programs: list[str]) -> list[tuple[str, str]]:
    """Name and docstring of a documented function of each program that has one."""
    found = []
    for program in programs:
        match = DOCUMENTED.search(program)
        if match and 40 < len(match[2].strip()) < 400:
            found.append((match[1], " ".join(match[2].split())))
    return found


def paragraphs(documents: list[str]) -> list[str]:
    """Paragraphs of plain text, of 350 to 800 characters."""
    texts = (" ".join(part.split()) for text in documents for part in text.split("\n\n"))
    return [t for t in texts if 350 < len(t) < 800 and t[0].isalpha() and "```" not in t]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    draw = random.Random(0)

    rows = (given.data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = draw.sample([json.loads(row)["question"] for row in rows], QUESTIONS)
    for name, text in draw.sample(functions(texts(given.data, "python_algorithms")), FUNCTIONS):
        prompts.append(draw.choice(PROGRAM).format(name=name, text=text))
    for text in draw.sample(paragraphs(texts(given.data, "rust_rfcs")), PARAGRAPHS):
        first = text.split(". ")[0] + "."
        prompts.append(draw.choice(PASSAGE).format(text=text, first=first))
    draw.shuffle(prompts)
    lines = (json.dumps({"messages": [{"role": "user", "content": text}]}) for text in prompts)
    given.out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"{given.out}: {len(prompts)} prompts")


def texts(data: Path, name: str) -> list[str]:
    """The `text` of each row of a packed file."""
    with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


if __name__ == "__main__":
    main()
