"""Conversations whose answers somebody else wrote, tokenised as the base model would meet them.

A line is a JSON object with one of:

    messages             list of {"role", "content"}: system (first only), user and assistant
    prompt, completion   two strings: a user's message and its answer

Every answer is tokenised behind the prompt that `distill` would have asked with: the messages
before it, rendered by the chat template with the beginning of an assistant's turn. It ends with the
token by which the model ends a turn; what the template writes after that is left out.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from server.errors import InvalidRequestError
from server.tokenizer import Tokenizer
from training.data.dataset import TokenizedConversation
from training.data.jsonl import Row
from training.data.prompts import category_of, given_id

_ROLES = ("system", "user", "assistant")
_MESSAGE_FIELDS = {"role", "content"}
# What fine-tuning files of others may have, and what would change the prompts.
_UNSUPPORTED = ("tools", "functions", "parallel_tool_calls")
_REMEDY = "give answers, or have the model write them: `python -m training distill`"


def tokenize_row(row: Row, tokenizer: Tokenizer) -> TokenizedConversation:
    """Read and tokenise one line.

    A line without an id is named by what it holds, so equal ones are held out together.

    Raises:
        DataError: If the line is in neither form, has no answer, or the chat template rejects it or
            hides where its answers begin.
    """
    for name in _UNSUPPORTED:
        if row.value.get(name):
            raise row.error(f"{name} is not supported; leave out conversations with it")
    messages = _messages(row)
    if not tokenizer.has_chat_template:
        raise row.error("the base model has no chat template to write messages with; give another")
    try:
        turns = tuple(
            _turn(messages, index, row, tokenizer)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        )
    except InvalidRequestError as error:
        raise row.error(str(error)) from error
    name = given_id(row) or hashlib.sha256(json.dumps(messages).encode()).hexdigest()
    return TokenizedConversation(name, category_of(row), turns, row.where)


def _messages(row: Row) -> list[dict[str, str]]:
    if "messages" in row.value:
        messages = row.value["messages"]
    elif "completion" in row.value:
        messages = [
            {"role": "user", "content": row.value.get("prompt")},
            {"role": "assistant", "content": row.value["completion"]},
        ]
    else:
        found = ", ".join(row.value) or "no field"
        raise row.error(
            f"has no answer: give messages, or prompt and completion; it has {found}; {_REMEDY}"
        )
    if not isinstance(messages, list) or not messages:
        raise row.error(f"messages is {messages!r:.80}; give a list of objects")
    for index, message in enumerate(messages):
        _check(message, index, row)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise row.error(f"has no assistant's message; {_REMEDY}")
    if "user" not in roles[: roles.index("assistant")]:
        raise row.error("begins with the assistant; give what the user said before")
    return messages


def _check(message: Any, index: int, row: Row) -> None:
    if not isinstance(message, dict):
        raise row.error(f"message {index} is {message!r:.80}; give an object with role and content")
    unknown = sorted(message.keys() - _MESSAGE_FIELDS)
    if unknown:
        raise row.error(f"message {index} has {unknown[0]!r}, which is not supported; leave it out")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES or (role == "system" and index > 0):
        raise row.error(
            f"message {index} has role {role!r}; give user and assistant, and system only first"
        )
    if not isinstance(content, str) or (role != "system" and not content.strip()):
        raise row.error(f"message {index} has the content {content!r:.80}; give a non-empty string")


def _turn(
    messages: Sequence[dict[str, str]], index: int, row: Row, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """The prompt of an answer and the answer."""
    if _end_of_turn(tokenizer.encode(messages[index]["content"], False), tokenizer) is not None:
        raise row.error(f"message {index} holds the text of a token that ends the answer; cut it")
    prompt = tokenizer.chat_text(messages[:index])
    text = tokenizer.chat_text(messages[: index + 1], add_generation_prompt=False)
    if not text.startswith(prompt):
        raise row.error(
            f"the chat template writes answer {index} without the beginning {prompt[-40:]!r} that "
            "it prompts with, so its tokens are not known; use `python -m training distill`"
        )
    prompt_ids = tokenizer.encode(prompt, False)
    token_ids = tokenizer.encode(text, False)
    answer_ids = token_ids[len(prompt_ids) :]
    if token_ids[: len(prompt_ids)] != prompt_ids:
        # A token reaches over the border; the model never does, it answers behind a whole prompt.
        answer_ids = tokenizer.encode(text[len(prompt) :], False)
    end = _end_of_turn(answer_ids, tokenizer)
    if end is not None:
        return prompt_ids, answer_ids[: end + 1]
    if len(tokenizer.eos_token_ids) != 1:
        raise row.error(
            f"the chat template ends answer {index} with none of the tokens "
            f"{sorted(tokenizer.eos_token_ids)}, by one of which the model does; use `python -m "
            "training distill`"
        )
    return prompt_ids, [*answer_ids, *tokenizer.eos_token_ids]


def _end_of_turn(token_ids: Sequence[int], tokenizer: Tokenizer) -> int | None:
    """Where the first token stands that ends a text."""
    ends = (i for i, token_id in enumerate(token_ids) if token_id in tokenizer.eos_token_ids)
    return next(ends, None)
