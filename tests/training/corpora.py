"""Prompts and hand-made documents for tests of training."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.support.tiny_models import VOCAB_SIZE
from training.data.dataset import Corpus, Document, Span

PROMPT_LINES: list[dict[str, Any]] = [
    {"id": "two", "category": "chat", "messages": [{"role": "user", "content": "How many arms?"}]},
    {
        "id": "long",
        "category": "chat",
        "messages": [
            {"role": "user", "content": "Tell me of a tree."},
            {"role": "user", "content": "And of its root?"},
        ],
    },
    {"id": "plain", "prompt": "The euryale is a jellyfish"},
    {"id": "turns", "category": "qa", "turns": ["At least one token", "or three?", "or four?"]},
    *(
        {"id": f"more-{i}", "category": "qa", "prompt": f"Question {i}: which token?"}
        for i in range(8)
    ),
]


def write_lines(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def document(
    length: int, *spans: tuple[int, int], seed: int = 0, name: str = "c", category: str = "x"
) -> Document:
    """Random tokens; spans are (start, end)."""
    token_ids = Random(seed).choices(range(3, VOCAB_SIZE), k=length)
    return Document(name, category, torch.tensor(token_ids), tuple(Span(*span) for span in spans))


def corpus(num_documents: int) -> Corpus:
    """Documents of different lengths, the odd ones with two answers."""
    documents = []
    for index in range(num_documents):
        spans = [(4, 10 + index)] if index % 2 == 0 else [(3, 8), (11, 15 + index)]
        documents.append(document(spans[-1][1] + 2, *spans, seed=index, name=f"c{index}"))
    return Corpus(tuple(documents))
