from pathlib import Path
from random import Random
from typing import Any

import pytest

from server.model.loading import LoadedModel
from server.tokenizer import Tokenizer
from tests.support.tiny_models import EOS_TOKEN, tiny_tokenizer
from training.data.dataset import Document, TokenizedConversation, conversation_documents
from training.data.distilled import read_distilled
from training.data.jsonl import Row, read_rows
from training.data.supervised import tokenize_row
from training.errors import DataError

# Like ChatML: a line break follows the end of a turn. The markers let transformers make a mask.
MARKED_TEMPLATE = (
    "{% for message in messages %}"
    "{{ bos_token + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)
WORDS = ("tree", "Wurzel", "你好", "  ", "\n", "42", "def f():", "ça", "root?", "assistant", "🌳")


def tokenizer(template: str | None = None, eos_token_ids: tuple[int, ...] = (2,)) -> Tokenizer:
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return Tokenizer(tokenizer, eos_token_ids)


def row(**value: Any) -> Row:
    return Row("d.jsonl, line 3", 3, value)


def say(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant take turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for index, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[index % 2], "content": content})
    return messages


def answers(document: Document) -> list[list[int]]:
    return [document.token_ids_T[span.start : span.end].tolist() for span in document.spans]


def random_messages(seed: int) -> list[dict[str, str]]:
    random = Random(seed)
    texts = ["x" + " ".join(random.choices(WORDS, k=random.randint(1, 9))) for _ in range(6)]
    system = "Be brief." if seed % 3 == 0 else None
    return say(*texts[: 2 * random.randint(1, 3)], system=system)


@pytest.mark.parametrize("seed", range(20))
def test_the_mask_is_the_one_that_transformers_makes_of_a_marked_template(seed: int) -> None:
    theirs = tiny_tokenizer()
    theirs.chat_template = MARKED_TEMPLATE
    messages = random_messages(seed)
    expected: Any = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (document,) = conversation_documents(
        tokenize_row(row(messages=messages), tokenizer(MARKED_TEMPLATE))
    )
    mask = [0] * len(expected["input_ids"])
    for span in document.spans:
        mask[span.start : span.end] = [1] * (span.end - span.start)
    assert mask == expected["assistant_masks"]
    # What the template writes after the last end of turn is left off: nobody writes it.
    ids = document.token_ids_T.tolist()
    assert ids == expected["input_ids"][: len(ids)]
    assert theirs.decode(expected["input_ids"][len(ids) :]) == "\n"


@pytest.mark.parametrize("seed", range(20))
def test_answers_stand_behind_the_prompts_that_distill_asks_with(seed: int) -> None:
    ours, messages = tokenizer(), random_messages(seed)
    found = tokenize_row(row(messages=messages), ours)
    expected = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            answer = ours.encode(message["content"] + EOS_TOKEN)
            expected.append((ours.apply_chat_template(messages[:index]), answer))
    assert list(found.turns) == expected


def test_a_token_over_the_border_of_prompt_and_answer_is_cut_there() -> None:
    template = "{% for m in messages %}{{ m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    ours = tokenizer(template + "{% if add_generation_prompt %}{{ 'assistant>th' }}{% endif %}")
    # The whole text has the token "the" where the prompt ends in "th".
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "the"}]
    ((prompt_ids, answer_ids),) = tokenize_row(row(messages=messages), ours).turns
    whole = ours.apply_chat_template(messages, add_generation_prompt=False)
    assert whole[: len(prompt_ids)] != prompt_ids
    assert prompt_ids == ours.apply_chat_template(messages[:1])
    assert answer_ids == ours.encode(f"e{EOS_TOKEN}")


def test_a_template_that_forgets_earlier_turns_gives_a_document_per_answer() -> None:
    ours = tokenizer(
        "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
        "{{ last['content'] + eos_token + 'assistant:\\n' }}"
        "{% if messages[-1]['role'] == 'assistant' %}"
        "{{ messages[-1]['content'] + eos_token }}{% endif %}"
    )
    messages = say("One?", "First.", "Two?", "Second.")
    first, second = conversation_documents(tokenize_row(row(messages=messages), ours))
    assert answers(first) == [ours.encode(f"First.{EOS_TOKEN}")]
    assert answers(second) == [ours.encode(f"Second.{EOS_TOKEN}")]


def test_a_template_that_answers_otherwise_than_it_prompts_is_an_error() -> None:
    ours = tokenizer(
        "{% for m in messages %}{{ m['role'] + ':\\n' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\\n<think>' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"writes answer 1 without the beginning .*<think>'"):
        tokenize_row(row(messages=say("Why?", "Because.")), ours)


def test_a_prompt_with_its_completion_is_a_question_with_its_answer() -> None:
    ours = tokenizer()
    pair = tokenize_row(row(prompt="Why?", completion="Because."), ours)
    assert pair.turns == tokenize_row(row(messages=say("Why?", "Because.")), ours).turns


def test_an_end_that_the_template_does_not_write_is_added() -> None:
    template = "{% for m in messages %}{{ m['role'] + ':\\n' + m['content'] + '\\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    ours = tokenizer(template)
    ((_, answer),) = tokenize_row(row(messages=say("Why?", "Because.")), ours).turns
    assert answer == [*ours.encode("Because.\n"), 2]
    ambiguous = tokenizer(template, (1, 2))
    with pytest.raises(DataError, match=r"ends answer 1 with none of the tokens \[1, 2\]"):
        tokenize_row(row(messages=say("Why?", "Because.")), ambiguous)


def test_a_conversation_without_id_is_named_by_what_it_holds() -> None:
    def name(**value: Any) -> str:
        return tokenize_row(row(**value), tokenizer()).id

    same = name(messages=say("Why?", "Because."))
    assert same == name(prompt="Why?", completion="Because.", category="qa")
    assert same != name(messages=say("Why?", "For no reason."))
    assert name(messages=say("Why?", "Because."), id=7) == "7"
    assert name(messages=say("Why?", "Because."), task_id="t") == "t"


def test_a_line_keeps_its_category_and_place() -> None:
    found = tokenize_row(row(messages=say("Why?", "Because."), category="qa"), tokenizer())
    assert (found.category, found.where) == ("qa", "d.jsonl, line 3")


def test_distilled_messages_give_the_prompts_that_they_were_answered_with(
    distilled_file: Path, loaded: LoadedModel
) -> None:
    for line, distilled in zip(
        read_rows(distilled_file), read_distilled(distilled_file), strict=True
    ):
        messages = line.value["messages"][:2]
        supervised: TokenizedConversation = tokenize_row(row(messages=messages), loaded.tokenizer)
        assert supervised.turns[0][0] == distilled.turns[0][0]


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": "Hi"}, "has no answer: give messages, or prompt and completion; it has prompt"),
        ({"messages": [USER]}, "has no assistant's message; .*python -m training distill"),
        ({"messages": []}, r"messages is \[\]"),
        ({"messages": "Hi"}, "messages is 'Hi'"),
        ({"messages": ["Hi"]}, "message 0 is 'Hi'; give an object"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "begins with the assistant"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "message 1 has role 'tool'"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "message 1 has role 'system'"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": []}]},
            "message 1 has 'tool_calls', which is not supported",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "message 1 has the content None"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 1 has the content"),
        ({"completion": "Hi"}, "message 0 has the content None"),
        ({"prompt": ["Hi"], "completion": "x"}, r"message 0 has the content \['Hi'\]"),
        ({"messages": say("Hi", "x"), "tools": [{}]}, "tools is not supported"),
        ({"messages": say("Hi", "x"), "category": 3}, "category is 3"),
        (
            {"messages": say("Hi", f"x{EOS_TOKEN}y")},
            "message 1 holds the text of a token that ends",
        ),
        ({"turns": ["Hi"]}, "has no answer"),
    ],
)
def test_a_line_that_cannot_be_learned_from_is_an_error_with_line_and_value(
    value: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"d.jsonl, line 3: {message}"):
        tokenize_row(row(**value), tokenizer())


def test_messages_that_the_template_rejects_are_named_by_line() -> None:
    picky = tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"line 3: the model's chat template refuses.*no system"):
        tokenize_row(row(messages=say("Why?", "Because.")), picky)


def test_a_model_without_chat_template_is_an_error() -> None:
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(DataError, match="line 3: the base model has no chat template"):
        tokenize_row(row(messages=say("Why?", "Because.")), Tokenizer(plain, [2]))
