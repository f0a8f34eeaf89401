"""Training data: rows from files, the tokens that are learned of each form, samples, the part that validates."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_training_builders import FORGETFUL, MARKED, TEMPLATE, Log, texts, tokenizer, write_rows, write_texts

from engram_core import InputError
from engram_llm.data import (
    Collator,
    Documents,
    pack_documents,
    read_documents,
    read_rows,
    split_documents,
    tokenize_rows,
    truncate_documents,
)
from engram_llm.data.samples import IGNORED

END = "<|endoftext|>"
QUESTION = {"role": "user", "content": "Who sleeps?"}
ANSWER = {"role": "assistant", "content": "The otter."}
MORE = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In the bog."}]


def learned_text(documents, words):
    """Return the learned text of each document, its runs separated by bars."""
    shown = []
    for number in range(len(documents)):
        part = slice(documents.offsets[number], documents.offsets[number + 1])
        ids, learns = documents.ids[part], documents.learns[part]
        runs, last = [], False
        for token, learned in zip(ids, learns, strict=True):
            if learned and not last:
                runs.append([])
            if learned:
                runs[-1].append(int(token))
            last = learned
        shown.append("|".join(words.decode(run) for run in runs))
    return shown


def whole_text(documents, words):
    bounds = zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    return [words.decode(documents.ids[first:last].tolist()) for first, last in bounds]


# Files


def test_jsonl_is_read_line_by_line_with_its_places(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b\\u2028c"}')
    rows = list(read_rows(path))
    assert [row.values for row in rows] == [{"text": "a"}, {"text": "b\u2028c"}]
    assert [row.place for row in rows] == [f"{path}:1", f"{path}:4"]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"text": text} for text in texts()[:5]]
    plain = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, row in enumerate(rows):
        (folder / f"{number}.txt").write_text(row["text"], encoding="utf-8")
    found = [[row.values for row in read_rows(path)] for path in (*sorted(tmp_path.glob("?.*")), folder)]
    assert found == [rows] * 4
    assert [row.place for row in read_rows(tmp_path / "c.parquet")][1] == f"{tmp_path / 'c.parquet'}, row 2"


def test_a_folder_is_read_in_the_order_of_its_names_and_tells_what_it_leaves(tmp_path):
    for name in ("b", "a", "c"):
        write_texts(tmp_path / f"{name}.jsonl", [name])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("no data")
    notes = []
    assert [row.values["text"] for row in read_rows(tmp_path, note=notes.append)] == ["a", "b", "c"]
    assert notes == [f"{tmp_path}: files of other kinds are not read: README.md"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("data.json", b"{}", "data.json: is of no known kind, expected .jsonl.*write one object a line into a .jsonl"),
        ("data.csv", b"a,b", "data.csv: is of no known kind"),
        ("data.jsonl.gz", b"no gzip", "data.jsonl.gz: cannot be read: Not a gzipped file"),
        (
            "data.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99)[:40],
            "data.jsonl.gz: cannot be read: Compressed file",
        ),
        ("data.parquet", b"no parquet", "data.parquet: cannot be read: Parquet"),
        ("data.jsonl", b"", "data.jsonl: holds no rows"),
        ("data.jsonl", b"\n\n", "data.jsonl: holds no rows"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, told):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=told):
        read_documents(path, tokenizer())


def test_what_does_not_exist_and_empty_folders_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none: does not exist"):
        read_documents(tmp_path / "none", tokenizer())
    with pytest.raises(
        InputError, match=r"holds no data; expected files that end in .jsonl, .jsonl.gz, .parquet, .txt"
    ):
        read_documents(tmp_path, tokenizer())


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "a"', r"data.jsonl:2 is not JSON: Expecting ',' delimiter at column 13"),
        (b"nonsense", r"data.jsonl:2 is not JSON: Expecting value at column 1"),
        (b'["a"]', r"data.jsonl:2 is list, expected an object"),
        (b'{"text": "\xff"}', r"data.jsonl:2 byte 11, 0xff, is not UTF-8"),
        (b"[" * 100_000, r"data.jsonl:2 is not usable JSON: it nests too deeply"),
        (b'{"txt": "a", "n": 1}', r"data.jsonl:2 lacks text; it has txt, n"),
        (b'{"text": " \\n "}', r"data.jsonl:2 text is empty"),
        (b'{"text": null}', r"data.jsonl:2 text is None, expected text"),
        (b'{"text": 5}', r"data.jsonl:2 text is 5, expected text"),
        (b'{"text": "a\\ud800"}', r"data.jsonl:2 text has half a character at place 2"),
    ],
)
def test_a_corrupt_line_is_named_with_file_and_line(tmp_path, line, told):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(InputError, match="data.jsonl: 1 of 3 rows cannot be used: .*" + told):
        read_documents(path, tokenizer())


def test_all_faults_are_counted_and_the_first_ones_named(tmp_path):
    rows = [{"prompt": "a", "completion": "b" if number % 2 else " "} for number in range(12)]
    path = write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(InputError) as caught:
        read_documents(path, tokenizer())
    message = str(caught.value)
    assert message.startswith(f"{path}: 6 of 12 rows cannot be used: {path}:1 completion is empty; {path}:3 ")
    assert message.endswith("; and 3 more; correct or remove them")
    assert "\n" not in message


def test_unknown_columns_are_told_with_those_that_would_do(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"question": "a", "answer": "b"}, {"story": "c"}])
    told = "columns question, answer, story; expected messages; or prompt and completion; or instruction and output; or"
    with pytest.raises(InputError, match=told):
        read_documents(path, tokenizer())
    assert len(read_documents(write_rows(path, [{"story": "c"}]), tokenizer(), text_column="story")) == 1


def test_rows_before_the_first_whole_one_are_faults_too(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}, {"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match=r"1 of 2 rows cannot be used: .*:1 has the columns prompt;"):
        read_documents(path, tokenizer())


# Forms: what is learned of each


def test_a_text_is_learned_as_a_whole_and_so_is_its_end():
    words = tokenizer()
    documents = tokenize_rows([{"text": "The otter of the bog."}], words)
    assert learned_text(documents, words) == whole_text(documents, words) == [f"The otter of the bog.{END}"]


def test_of_a_completion_the_prompt_is_given():
    words = tokenizer()
    rows = [{"prompt": "The otter", "completion": " sleeps."}, {"prompt": "", "completion": "The"}]
    documents = tokenize_rows(rows, words)
    assert learned_text(documents, words) == [f" sleeps.{END}", f"The{END}"]
    assert whole_text(documents, words) == [f"The otter sleeps.{END}", f"The{END}"]
    # The prompt's tokens are those of the prompt alone, as when a model is asked to go on.
    prompt = words("The otter")["input_ids"]
    assert documents.ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_of_a_conversation_the_answers_are_learned(template):
    words = tokenizer(template)
    documents = tokenize_rows([{"messages": [QUESTION, ANSWER, *MORE]}], words)
    after = "<|im_end|>" + ("\n" if template == TEMPLATE else "")
    assert learned_text(documents, words) == [f"The otter.{after}|In the bog.{after}"]
    assert whole_text(documents, words)[0].startswith(
        "<|im_start|>user\nWho sleeps?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_follows_the_last_answer_is_left_out():
    words = tokenizer()
    documents = tokenize_rows([{"messages": [QUESTION, ANSWER, QUESTION]}], words)
    assert whole_text(documents, words)[0].endswith("The otter.<|im_end|>\n")


def test_an_instruction_becomes_system_user_and_assistant():
    words = tokenizer()
    rows = [
        {"instruction": "Answer.", "input": "Who sleeps?", "output": "The otter."},
        {"instruction": "Who sleeps?", "input": "", "output": "The newt."},
        {"instruction": "Who sleeps?", "output": "The wren."},
    ]
    documents = tokenize_rows(rows, words)
    asked = "<|im_start|>user\nWho sleeps?<|im_end|>\n<|im_start|>assistant\n"
    assert whole_text(documents, words) == [
        f"<|im_start|>system\nAnswer.<|im_end|>\n{asked}The otter.<|im_end|>\n",
        f"{asked}The newt.<|im_end|>\n",
        f"{asked}The wren.<|im_end|>\n",
    ]
    assert learned_text(documents, words) == [f"The {name}.<|im_end|>\n" for name in ("otter", "newt", "wren")]


def test_a_conversation_in_prompt_and_completion_learns_the_completion_alone():
    words = tokenizer()
    documents = tokenize_rows([{"prompt": [QUESTION, ANSWER, MORE[0]], "completion": [MORE[1]]}], words)
    assert learned_text(documents, words) == ["In the bog.<|im_end|>\n"]


def test_a_template_that_rewrites_earlier_answers_gives_a_document_for_each():
    words, log = tokenizer(FORGETFUL), Log()
    documents = tokenize_rows([{"messages": [QUESTION, ANSWER, *MORE]}], words, watcher=log)
    thought = "<think>\n\n</think>\n\n"
    assert learned_text(documents, words) == [
        f"{thought}The otter.<|im_end|>\n",
        f"{thought}In the bog.<|im_end|>\n",
    ]
    # What is given is the very text that the model sees when it is asked.
    asked = words.apply_chat_template([QUESTION, ANSWER, MORE[0]], tokenize=False, add_generation_prompt=True)
    assert whole_text(documents, words)[1].startswith(asked)
    assert len(set(documents.keys.tolist())) == 1
    assert any("one for each answer" in note for note in log.notes)


def test_parquet_fills_in_columns_that_do_not_count(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]},
        {"messages": [QUESTION, ANSWER]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    found = read_documents(tmp_path / "data.parquet", tokenizer())
    assert np.array_equal(found.ids, tokenize_rows(rows, tokenizer()).ids)


def test_conversations_come_before_texts_but_a_named_column_first():
    words = tokenizer()
    row = {"text": "rendered", "story": "told", "messages": [QUESTION, ANSWER], "prompt": "a", "completion": "b"}
    assert "otter" in learned_text(tokenize_rows([row], words), words)[0]
    assert learned_text(tokenize_rows([row], words, text_column="story"), words) == [f"told{END}"]


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], r"messages is \[\], expected a list of messages"),
        ("hi", "messages is 'hi', expected a list of messages"),
        (["hi"], "message 1 is 'hi', expected an object with role and content"),
        ([{"content": "a"}], "message 1 is .*, expected an object with role and content"),
        ([QUESTION, {"role": "assistant", "content": ""}], "the answer in message 2 is empty"),
        ([QUESTION, {"role": "assistant"}], "the answer in message 2 is None, expected text"),
        ([QUESTION, {"role": "assistant", "content": [{"type": "text"}]}], "the answer in message 2 is .*, expected"),
        ([QUESTION], "no message is the assistant's; the roles are user"),
    ],
)
def test_conversations_that_cannot_be_used_are_told(messages, told):
    with pytest.raises(InputError, match=rf"1 of 1 rows cannot be used: row 1 {told}"):
        tokenize_rows([{"messages": messages}], tokenizer())


def test_a_template_that_refuses_a_conversation_is_quoted():
    strict = TEMPLATE + "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(InputError, match="row 1 the chat template refuses it: no system"):
        tokenize_rows([{"messages": [QUESTION, ANSWER]}], tokenizer(strict))


def test_a_template_that_asks_otherwise_than_it_answers_is_refused():
    odd = TEMPLATE.replace(
        "{% if add_generation_prompt %}<|im_start|>assistant", "{% if add_generation_prompt %}<|go|>"
    )
    with pytest.raises(
        InputError, match="text before the answer in message 2 is not the beginning of its text with it"
    ):
        tokenize_rows([{"messages": [QUESTION, ANSWER]}], tokenizer(odd))


def test_conversations_need_a_chat_template():
    with pytest.raises(InputError, match="the tokenizer has no chat template, which conversations need"):
        tokenize_rows([{"messages": [QUESTION, ANSWER]}], tokenizer(None))
    assert len(tokenize_rows([{"text": "a"}], tokenizer(None))) == 1


# Samples


def make_documents(lengths, *, taught=None):
    """Return documents of these lengths, whose tokens count upwards; all are learned."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    learns = np.ones(offsets[-1], np.bool_) if taught is None else np.array(taught, np.bool_)
    keys = np.arange(len(lengths), dtype=np.uint64)
    return Documents(ids=np.arange(offsets[-1], dtype=np.int32), learns=learns, offsets=offsets, keys=keys)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.integers(2, 20))
def test_packing_keeps_every_token_once_and_documents_whole(lengths, max_length):
    documents = make_documents(lengths)
    samples = pack_documents(documents, max_length)
    pieces = []
    for index in range(len(samples)):
        sample = samples[index]
        assert len(sample["input_ids"]) <= max_length
        starts = np.flatnonzero(sample["position_ids"] == 0)
        for piece in np.split(np.arange(len(sample["input_ids"])), starts[1:]):
            assert np.array_equal(sample["position_ids"][piece], np.arange(len(piece)))
            assert sample["labels"][piece[0]] == IGNORED
            assert np.array_equal(sample["labels"][piece[1:]], sample["input_ids"][piece[1:]])
            pieces.append(sample["input_ids"][piece].tolist())
    expected = []
    for number, length in enumerate(lengths):
        first = int(documents.offsets[number])
        cuts = [range(first + begin, first + min(begin + max_length, length)) for begin in range(0, length, max_length)]
        expected += [list(cut) for cut in cuts if len(cut) > 1]
    assert sorted(pieces) == sorted(expected)
    assert samples.n_cut == sum(length > max_length for length in lengths)
    assert samples.count_tokens() == sum(len(piece) - 1 for piece in expected)


def test_packing_fills_samples_well():
    rng = np.random.default_rng(0)
    samples = pack_documents(make_documents(rng.integers(2, 200, 2000).tolist()), 256)
    filled = sum(len(samples[index]["input_ids"]) for index in range(len(samples)))
    assert filled / (256 * len(samples)) > 0.98


def test_without_packing_each_document_is_cut_to_length():
    documents = make_documents([5, 9, 3])
    samples = truncate_documents(documents, 4)
    assert [samples[index]["input_ids"].tolist() for index in range(3)] == [[0, 1, 2, 3], [5, 6, 7, 8], [14, 15, 16]]
    assert samples.n_cut == 2


def test_pieces_without_an_answer_are_left_out_and_counted():
    taught = [0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0]
    documents = make_documents([6, 3, 3], taught=taught)
    assert (len(truncate_documents(documents, 4)), truncate_documents(documents, 4).n_dropped) == (1, 2)
    packed = pack_documents(documents, 4)
    assert packed.n_dropped == 2
    assert packed.count_tokens() == 1 + 2


def test_packed_rows_are_padded_with_a_document_of_their_own():
    documents = make_documents([3, 2, 4])
    batch = Collator(99, packed=True)([pack_documents(documents, 5)[0], truncate_documents(documents, 5)[1]])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"][1].tolist() == [3, 4, 99, 99]
    assert batch["labels"][1].tolist() == [IGNORED, 4, IGNORED, IGNORED]
    assert batch["position_ids"][1].tolist() == [0, 1, 0, 1]


def test_other_rows_have_an_attention_mask():
    documents = make_documents([3, 2])
    samples = truncate_documents(documents, 5)
    batch = Collator(99, packed=False)([samples[0], samples[1]])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"][1].tolist() == [IGNORED, 4, IGNORED]


# Validation


def keys_of(documents):
    return set(documents.keys.tolist())


def test_the_split_depends_on_what_documents_say_alone():
    rows = [{"text": text} for text in texts()]
    documents = tokenize_rows(rows, tokenizer())
    training, unseen = split_documents(documents, 0.2, 100)
    assert not keys_of(training) & keys_of(unseen)
    assert len(training) + len(unseen) == 100
    assert 8 <= len(unseen) <= 35
    _, again = split_documents(tokenize_rows(rows[::-1], tokenizer()), 0.2, 100)
    assert keys_of(again) == keys_of(unseen)
    _, part = split_documents(tokenize_rows(rows[:60], tokenizer()), 0.2, 100)
    assert keys_of(part) == keys_of(unseen) & keys_of(tokenize_rows(rows[:60], tokenizer()))


def test_the_limit_returns_documents_to_training():
    documents = tokenize_rows([{"text": text} for text in texts()], tokenizer())
    _, many = split_documents(documents, 0.5, 100)
    training, few = split_documents(documents, 0.5, 7)
    assert len(few) == 7
    assert len(training) == 93
    assert keys_of(few) == set(sorted(keys_of(many))[:7])


def test_equal_documents_go_together_and_one_is_always_found():
    rows = [{"text": text} for text in ("a", "b", "a", "a")]
    training, unseen = split_documents(tokenize_rows(rows, tokenizer()), 0.001, 100)
    assert len(set(unseen.keys.tolist())) == 1
    assert not keys_of(training) & keys_of(unseen)
    assert len(split_documents(tokenize_rows(rows, tokenizer()), 0.0, 100)[1]) == 0
    training, unseen = split_documents(tokenize_rows([{"text": "a"}] * 3, tokenizer()), 0.9, 100)
    assert (len(training), len(unseen)) == (3, 0)


def test_the_digest_tells_data_apart():
    rows = [{"text": text} for text in texts()[:9]]
    digests = {tokenize_rows(part, tokenizer()).digest() for part in (rows, rows[::-1], rows[:8])}
    digests.add(tokenize_rows([{"prompt": "", "completion": row["text"]} for row in rows], tokenizer()).digest())
    assert len(digests) == 3  # an empty prompt is no prompt


def test_a_row_is_the_same_whatever_the_order_of_its_fields():
    one = json.loads('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    two = json.loads('{"messages": [{"content": "a", "role": "user"}, {"content": "b", "role": "assistant"}]}')
    assert keys_of(tokenize_rows([one], tokenizer())) == keys_of(tokenize_rows([two], tokenizer()))
