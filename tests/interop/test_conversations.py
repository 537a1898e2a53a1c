"""Conversations for fine-tuning: the loss is on what the assistant says and on what ends it, and on nothing else."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from chat_runs import CHATML, INSTRUCT, LENGTH, MARKED, chat_tokenizer, write_chat_run

from efftrain.data.tasks.rows import TaskBatches
from efftrain.errors import ConfigError
from efftrain.interop.conversations import ConversationFields, encode_conversations, read_conversations, rows_once
from efftrain.interop.run_tokenizer import RunTokenizer, read_run_tokenizer

ANSWERS = ["beta gamma", "\n über 数据 ", "delta"]
CHATS = [
    [{"role": "user", "content": "alpha?"}, {"role": "assistant", "content": ANSWERS[0]}],
    [
        {"role": "system", "content": "the alpha"},
        {"role": "user", "content": "assistant <|im_end|>"},
        {"role": "assistant", "content": ANSWERS[1]},
        {"role": "user", "content": "gamma"},
        {"role": "assistant", "content": ANSWERS[2]},
    ],
]
LINES = [{"messages": messages, "id": number} for number, messages in enumerate(CHATS)]


@pytest.fixture(scope="module", params=["byte_level", "sentence_piece"])
def run(request, tmp_path_factory) -> Path:
    return write_chat_run(tmp_path_factory.mktemp(request.param) / "run", chat_tokenizer(request.param), bos_token_id=1)


def opened(run: Path, template: str) -> RunTokenizer:
    (run / "chat_template.jinja").write_text(template)
    return read_run_tokenizer(run)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spans(inside: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside.astype(int), [0]])))
    return list(pairwise(edges.tolist()))[::2]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_are_what_the_assistant_says_and_its_end(run, template):
    tokenizer = opened(run, template)
    found = tokenizer.encode_answers(CHATS[1])
    assert found.ids.tolist() == tokenizer.encode_chat(CHATS[1], add_generation_prompt=False)
    pieces = [tokenizer.tokenizer.decode(found.ids[a:b], skip_special_tokens=False) for a, b in spans(found.inside)]
    # A token over the end of the prompt and the beginning of an answer belongs to the answer, as in transformers.
    assert [piece.removeprefix("\n").lstrip() for piece in pieces] == [f"{a.lstrip()}<|im_end|>" for a in ANSWERS[1:]]
    assert found.inside.sum() < len(found.ids) / 2


def test_the_prompts_of_a_model_lead_to_its_answers(run):
    """The tokens before an answer are those that a model is asked with; what follows its end is not learnt."""
    tokenizer = opened(run, CHATML)
    chat = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b c"), ("user", "d"))] + [CHATS[0][1]]
    found = tokenizer.encode_answers(chat)
    for number, (start, stop) in zip((1, 3), spans(found.inside), strict=True):
        assert found.ids[:start].tolist() == tokenizer.encode_chat(chat[:number])
        assert found.ids[stop - 1] in tokenizer.eos


@pytest.mark.parametrize("template", [MARKED, INSTRUCT])
def test_positions_are_those_of_transformers(run, template):
    """Of the tag ``generation`` itself, and of INSTRUCT with the tag put around what prefixes say is the answer."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(run / "tokenizer.json"))
    theirs.bos_token, theirs.eos_token = theirs.convert_ids_to_tokens(1), "<|im_end|>"
    answer = "{{ ' ' + message.content + eos_token }}"
    marked = template.replace(answer, "{% generation %}" + answer + "{% endgeneration %}")
    chats = [CHATS[0], [m | {"content": m["content"].replace("<|im_end|>", "")} for m in CHATS[1]]]
    for chat in chats:
        expected = theirs.apply_chat_template(
            chat, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        found = opened(run, template).encode_answers(chat)
        assert found.ids.tolist() == expected["input_ids"]
        assert found.inside.astype(int).tolist() == expected["assistant_masks"]


REFUSED = [
    (CHATML, [{"role": "user", "content": "a"}], "no message has the role assistant"),
    (CHATML, [{"role": "assistant", "content": "a"}], "the first message is an answer"),
    ("{{ messages | length }}" + CHATML, CHATS[1], "writes another prompt before message 3 than without it"),
    (CHATML + "{{ '(' ~ messages | length ~ ')' if not add_generation_prompt }}", CHATS[1], "changes message 3 when"),
    (CHATML.replace("<|im_end|>", "<end>"), CHATS[1], "message 3 with none of the tokens <|im_end|>, so that a model"),
]


@pytest.mark.parametrize(("template", "chat", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_answers_without_a_place_of_their_own_are_refused(run, tmp_path, template, chat, message):
    chats = read_conversations(write(tmp_path / "chats.jsonl", [{"messages": chat}]))
    with pytest.raises(ConfigError, match=rf"chats\.jsonl, line 1: .*{re.escape(message)}"):
        encode_conversations(opened(run, template), chats, length=LENGTH)


def test_every_answer_is_a_target_once_and_has_its_bytes(run, tmp_path):
    tokenizer = opened(run, MARKED)
    found = encode_conversations(tokenizer, read_conversations(write(tmp_path / "a", LINES)), length=LENGTH)
    ends = len(ANSWERS)
    batches = list(rows_once(found.items, length=LENGTH, batch_size=2))
    targets = np.concatenate([batch["targets"][batch["mask"]] for batch in batches])
    assert len(targets) == found.n_targets
    assert (targets == tokenizer.eos[0]).sum() == ends
    # Where a token begins in the prompt, its character there is counted too.
    n_bytes = sum(len(answer.encode()) for answer in ANSWERS)
    assert n_bytes <= found.token_bytes[targets].sum() <= n_bytes + ends
    parts = [list(rows_once(found.items, length=LENGTH, batch_size=2, part=(i, 2))) for i in (0, 1)]
    for batch, one, other in zip(batches, *parts, strict=True):
        for name, whole in batch.items():
            np.testing.assert_array_equal(whole, np.concatenate([one[name], other[name]]))


@pytest.mark.parametrize(("per_row", "segments"), [(None, {1, 2}), (1, {1})])
def test_rows_hold_several_conversations_or_one(run, tmp_path, per_row, segments):
    chats = read_conversations(write(tmp_path / "a", [LINES[0]] * 9))
    items = encode_conversations(opened(run, CHATML), chats, length=LENGTH).items
    batches = TaskBatches(items, length=LENGTH, batch_size=2, seed=0, n_labels=0, per_row=per_row)
    batch = next(batches)
    assert batch.keys() == {"tokens", "targets", "segments", "positions", "mask"}
    assert set(batch["segments"].ravel().tolist()) - {0} >= segments
    assert per_row is None or batch["segments"].max() == 1
    for row in range(2):
        for segment in set(batch["segments"][row].tolist()) - {0}:
            here = batch["segments"][row] == segment
            expected = items[0].sequence
            np.testing.assert_array_equal(batch["tokens"][row][here], expected[:-1])
            np.testing.assert_array_equal(batch["targets"][row][here], expected[1:])
            np.testing.assert_array_equal(batch["mask"][row][here], items[0].counted[1:])
            np.testing.assert_array_equal(batch["positions"][row][here], np.arange(len(items[0])))


def test_long_conversations_are_left_out_and_said(run, tmp_path, capfd):
    tokenizer, long = (
        opened(run, CHATML),
        LINES[0] | {"messages": [{"role": "user", "content": "x" * 999}, CHATS[0][1]]},
    )
    chats = read_conversations(write(tmp_path / "a", [long, LINES[0]]))
    found = encode_conversations(tokenizer, chats, length=LENGTH)
    assert (len(found.items), found.too_long) == (1, 1)
    said = " ".join(capfd.readouterr().err.split())
    assert f"warning: 1 of 2 conversations have more than training.length {LENGTH} tokens and are left out" in said
    with pytest.raises(ConfigError, match="all 1 of 1 conversations have more than"):
        encode_conversations(tokenizer, chats[:1], length=LENGTH)


def test_questions_and_answers_are_conversations(tmp_path):
    path = write(tmp_path / "a", [{"question": "1 + 1?", "answer": "2"}])
    fields = ConversationFields(question="question", answer="answer", system="Count.")
    (found,) = read_conversations(path, fields)
    assert [(m["role"], m["content"]) for m in found.messages] == [
        ("system", "Count."),
        ("user", "1 + 1?"),
        ("assistant", "2"),
    ]
    (plain,) = read_conversations(path, ConversationFields(question="question", answer="answer"))
    assert [m["role"] for m in plain.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "it has no list of messages in 'messages'; its fields are 'text'"),
        ({"messages": []}, "it has no list of messages"),
        ({"messages": ["a"]}, "message 1 has no role"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1, of the role user, has no text"),
        ({"messages": [CHATS[0][0], CHATS[0][1] | {"weight": 0}]}, "message 2 has the weight 0"),
        ({"messages": CHATS[0], "tools": [{}]}, "it has 'tools', which is not written into conversations"),
    ],
)
def test_lines_that_are_no_conversation_are_named(tmp_path, row, message):
    with pytest.raises(ConfigError, match=rf"a, line 2: {re.escape(message)}"):
        read_conversations(write(tmp_path / "a", [LINES[0], row]))


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a").write_text('{"messages": [\n')
    with pytest.raises(ConfigError, match="a, line 1 is not valid JSON"):
        read_conversations(tmp_path / "a")
    (tmp_path / "a").write_text("\n")
    with pytest.raises(ConfigError, match="has no conversations"):
        read_conversations(tmp_path / "a")
    with pytest.raises(ConfigError, match="gone cannot be read"):
        read_conversations(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"fields\.question is 'q' and fields\.answer is None; give both"):
        ConversationFields(question="q")
    with pytest.raises(ConfigError, match=r"fields\.system has no effect"):
        ConversationFields(system="s")
