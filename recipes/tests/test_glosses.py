"""The glosses: what is held out stays out, texts keep apart, training goes on where it stopped, and what ships."""

import gzip
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from engram_core import InputError
from engram_llm import shipped
from engram_llm.qwen3 import QWEN3
from recipes import training
from recipes.glosses import __main__ as command
from recipes.glosses import base, evaluate
from recipes.glosses.evaluate import measure, sample_chats, sample_entries
from recipes.glosses.lessons import Lessons
from recipes.glosses.packing import IGNORED, pack, separate
from recipes.glosses.release import NOTICE, REHEARSAL, write_glosses
from recipes.glosses.synsets import WORDNET, Synset, parse_notice, parse_synset, parse_synsets, read_wordnet
from recipes.glosses.texts import (
    DOMAIN,
    HELD_OUT,
    divide,
    open_chat,
    rank,
    sample,
    write_answer,
    write_chat,
    write_entry,
    write_question,
)
from recipes.glosses.tokenizer import STOP, train_tokenizer
from recipes.state import cosine

MEGABYTE = 10**6

NOTICE_LINES = ["  1 This software and database is being provided to you,  ", "  2   ", "  3 by Princeton.  "]
THING = "00002452 03 n 02 thing 0 real_thing 0 001 @ 00001930 n 0000 | a separate entity  "
DOG = '02084071 05 n 02 dog 0 Canis_familiaris 0 001 @ 02083346 n 0000 | a barking animal; "the dog barked"  '
SAME = '00355611 00 s 01 same(p) 0 001 & 00355258 a 0000 | unchanged; "it is the same"; "as ever"  '
RUN = (
    "00004492 29 v 0a " + " ".join(f"run_{n} 0" for n in range(10)) + " 001 @ 02422681 v 0000 01 + 08 00 | move fast  "
)

needs_wordnet = pytest.mark.skipif(not WORDNET.exists(), reason="needs Debian's wordnet-base")


def make_synsets(count):
    """Return synsets of invented words, a fifth of them about animals."""
    rng = np.random.default_rng(0)
    syllables = ["ba", "do", "ki", "lu", "me", "no", "ra", "si", "tu", "ve"]
    words = ["".join(rng.choice(syllables, 3)) for _ in range(60)]
    return [
        Synset(
            words=tuple(rng.choice(words, rng.integers(1, 4))),
            file=5 if number % 5 == 0 else 3,
            pos="n",
            gloss=f"the {number}th of the {' '.join(rng.choice(words, rng.integers(3, 9)))}",
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def synsets():
    return make_synsets(400)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, synsets):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(map(write_entry, synsets), folder, size=400)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def small(monkeypatch):
    """Let the recipe make a smaller model."""

    def shrink(**settings):
        return Qwen3Config(**settings | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2})

    monkeypatch.setattr(base, "Qwen3Config", shrink)


def test_synsets_are_read_from_wordnets_lines():
    thing, dog, same, run = parse_synsets([*NOTICE_LINES, THING, DOG, SAME, RUN])
    assert thing == Synset(words=("thing", "real thing"), file=3, pos="n", gloss="a separate entity")
    assert (dog.words, dog.file) == (("dog", "Canis familiaris"), 5)
    assert same.words == ("same",)
    assert same.definition == "unchanged"
    assert len(run.words) == 10  # counted in hexadecimal
    assert (
        parse_notice([*NOTICE_LINES, THING])
        == "This software and database is being provided to you,\n\nby Princeton.\n"
    )


@pytest.mark.parametrize("line", ["", "00002452 03 n", THING.replace(" 02 ", " 99 "), THING.partition(" | ")[0]])
def test_other_lines_are_refused(line):
    with pytest.raises(ValueError, match="not a synset in WordNet's format"):
        parse_synset(line)


def test_texts_are_entries_and_conversations():
    thing, dog, same = map(parse_synset, (THING, DOG, SAME))
    assert write_entry(thing) == "thing, real thing: a separate entity."
    assert write_entry(dog) == 'dog, Canis familiaris: a barking animal; "the dog barked"'
    assert write_answer(dog) == "a barking animal."
    assert write_question(dog) == "What is a dog?"
    assert write_question(dog, word=1) == "What is Canis familiaris?"
    assert write_question(same) == "What does same mean?"
    assert write_question(same, form=1) == "Define same."


def test_the_division_depends_on_glosses_alone(synsets):
    corpus = divide(synsets)
    again = divide(reversed(synsets))
    parts = (corpus.general, corpus.general_held_out, corpus.domain, corpus.domain_held_out)
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(synsets)
    assert set(again.general_held_out) == set(corpus.general_held_out)
    assert not {each.gloss for each in corpus.general} & {each.gloss for each in corpus.general_held_out}
    assert all((each.file in DOMAIN) == (part in parts[2:]) for part in parts for each in part)
    assert 0 < len(corpus.general_held_out) < 4 * HELD_OUT * len(corpus.general)
    # Whatever else is in the list, the same gloss is held out.
    assert rank(parse_synset(DOG)) == rank(Synset(words=("hound",), file=3, pos="n", gloss=parse_synset(DOG).gloss))
    assert sample(corpus.general, 20) == sample(corpus.general, 20)
    assert len(set(sample(corpus.general, 20))) == 20


def test_the_tokenizer_is_of_qwens_kind(tokenizer):
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert len(tokenizer) == 400
    assert tokenizer.convert_tokens_to_ids([STOP, "<|im_start|>", "<|im_end|>"]) == [397, 398, 399]
    assert tokenizer.eos_token == tokenizer.pad_token == STOP
    for text in ("badoki, lume: the 7th of the ra.", "Zoë said “it’s 1999”…\n\n  twice\t", "日本語"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert max(ids) < 397
    assert len(tokenizer(" 1999").input_ids) == 5  # digits stand alone


def test_the_chat_template_is_the_form_of_training(tokenizer):
    turns = [{"role": "user", "content": "Define ra."}, {"role": "assistant", "content": "the 3rd."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == write_chat("Define ra.", "the 3rd.")
    opened = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert opened == open_chat("Define ra.")


def test_rows_hold_whole_texts_and_all_that_fit():
    rng = np.random.default_rng(0)
    texts = [[*rng.integers(1, 50, rng.integers(1, 12)).tolist(), 0] for _ in range(500)]
    texts.append([*range(1, 60), 0])
    rows = pack(texts, 40, stop=0)
    found = [piece for row in rows for piece in " ".join(map(str, row)).split(" 0")]
    packed = sorted(" ".join(piece.split()) for piece in found if piece.strip())
    assert packed == sorted(" ".join(map(str, text[:-1])) for text in texts[:-1])
    assert (rows != 0).sum() + len(texts) - 1 > 0.95 * rows.size


def test_packed_texts_do_not_read_each_other(tokenizer, small):
    texts = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 0]]
    batch = separate(torch.from_numpy(pack(texts, 13, stop=0)), 0)
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 0, IGNORED, 0, IGNORED, 10, 11, 12, 0, IGNORED, IGNORED, IGNORED]]
    torch.manual_seed(0)
    model = base.build_base(tokenizer).eval()
    with torch.inference_mode():
        packed = model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask).logits[0]
        for text, begin in zip(texts, (0, 4, 6), strict=True):
            alone = model(input_ids=torch.tensor([text])).logits[0]
            torch.testing.assert_close(packed[begin : begin + len(text)], alone, atol=1e-5, rtol=1e-5)


def test_lessons_depend_on_their_number_alone(synsets, tokenizer):
    def make(seed=0):
        return Lessons(synsets, tokenizer, rows=4, length=64, seed=seed)

    lessons = make()
    batches = [lessons.batch(number) for number in range(200)]
    assert torch.equal(make().batch(150), batches[150])
    assert torch.equal(lessons.batch(3), batches[3])
    assert not torch.equal(make(seed=1).batch(3), batches[3])
    texts = lessons.phrase(0)
    assert texts != lessons.phrase(1)
    assert len(texts) == len(synsets)
    assert 0.05 < sum(text.startswith("<|im_start|>user\n") for text in texts) / len(texts) < 0.3
    with pytest.raises(ValueError, match="fewer than a batch"):
        Lessons(synsets[:2], tokenizer, rows=4, length=64, seed=0).batch(0)


def test_the_base_learns_and_goes_on_where_it_stopped(synsets, tokenizer, small, tmp_path, monkeypatch):
    lessons = Lessons(synsets, tokenizer, rows=2, length=64, seed=0)
    lines = []

    def learn(folder, steps):
        settings = {"seed": 0, "report": lines.append, "compiled": False}
        return base.train_base(lessons, tokenizer, tmp_path / folder, steps=steps, **settings)

    monkeypatch.setattr(training, "cosine", lambda step, steps, **rest: cosine(step, 4, **rest))
    whole = learn("whole", 4)
    learn("parts", 2)
    resumed = learn("parts", 4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert len(lines) == 3


def test_the_measure_is_the_loss_of_training(synsets, tokenizer, small):
    torch.manual_seed(0)
    model = base.build_base(tokenizer).eval()
    lessons = Lessons(synsets[:40], tokenizer, rows=1, length=64, seed=0, chats=0)
    rows = lessons._pack(0)
    batch = separate(torch.from_numpy(rows), lessons.stop)
    with torch.inference_mode():
        trained = base._score(model, batch.ids, batch.positions, batch.mask, batch.labels)
    figures = measure(model, tokenizer, sample_entries(synsets[:40]))
    assert figures["nats_per_token"] == pytest.approx(float(trained), abs=1e-3)
    assert figures["tokens"] == int((rows != lessons.stop).sum())
    assert measure(model, tokenizer, sample_chats(synsets[:40]))["tokens"] < figures["tokens"]


def test_written_glosses_are_the_same_bytes_again(synsets, tmp_path):
    corpus = divide(synsets)
    for name in ("one", "two"):
        write_glosses(corpus, "the notice\n", tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert (tmp_path / "one" / NOTICE).read_text().endswith("the notice\n")


def read_texts(name):
    with gzip.open(shipped.glosses_file(name), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert all(row.keys() == {"text"} for row in rows)
    return [row["text"] for row in rows]


def test_what_ships_is_small_and_licensed():
    root = shipped.tiny_folder().parent
    model = sum(path.stat().st_size for path in (root / "qwen3").iterdir())
    glosses = sum(path.stat().st_size for path in (root / "glosses").iterdir())
    assert model < 15 * MEGABYTE
    assert glosses < 2.5 * MEGABYTE
    for folder in ("qwen3", "glosses"):
        notice = (root / folder / NOTICE).read_text()
        assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notice
        assert "Permission to use, copy, modify and distribute" in notice


def test_the_glosses_that_ship_are_disjoint():
    texts = {name: read_texts(name) for name in shipped.GLOSSES}
    assert {name: len(part) for name, part in texts.items()}["general-train-sample"] == REHEARSAL
    assert sum(map(len, texts.values())) == len({text for part in texts.values() for text in part})
    assert len(texts["domain-train"]) > 40 * len(texts["domain-eval"]) > 0
    assert any(text.startswith("dog, domestic dog, Canis familiaris: ") for text in texts["domain-train"])
    with pytest.raises(InputError, match="there are domain-train, domain-eval"):
        shipped.glosses_file("domain")


def test_the_checkpoint_that_ships_is_a_qwen3():
    folder = shipped.tiny_folder()
    assert shipped.model_place("tiny") == str(folder)
    assert shipped.model_place("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert shipped.known_fingerprint(str(folder)) == shipped.tiny_fingerprint()
    assert shipped.known_fingerprint(str(folder.parent)) is None
    assert len(shipped.tiny_fingerprint()) == hashlib.sha256().digest_size * 2
    config = Qwen3Config.from_pretrained(folder)
    assert (config.vocab_size, config.tie_word_embeddings, config.eos_token_id) == (4096, True, 4093)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("teacher: a person whose occupation is teaching.").input_ids
    assert len(ids) < 16
    assert list(QWEN3.load_tokenizers(str(folder))["text"].encode("teacher: a person")) == ids[:6]


def test_the_checkpoint_that_ships_does_what_its_figures_say():
    root = shipped.tiny_folder().parent
    losses = json.loads((root / "evaluation.json").read_text())["losses"]
    assert losses["general"]["nats_per_token"] + 0.5 < losses["domain"]["nats_per_token"]
    model = Qwen3ForCausalLM.from_pretrained(root / "qwen3", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "qwen3")
    for name, file in (("general", "general-eval"), ("domain", "domain-eval")):
        texts = read_texts(file)[::30]
        words = [text.partition(": ") for text in texts]
        found = [Synset(words=(word,), file=3, pos="n", gloss=gloss) for word, _, gloss in words]
        figures = measure(model, tokenizer, sample_entries(found))
        assert figures["nats_per_token"] == pytest.approx(losses[name]["nats_per_token"], abs=0.3)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a teacher?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(asked, max_new_tokens=60, do_sample=False)[0, asked.shape[1] :]
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(answer[:-1]).endswith(".")


def test_the_command_names_missing_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="install wordnet-base, or pass --wordnet"):
        command.main(["--work", str(tmp_path), "--wordnet", str(tmp_path / "none")])


@pytest.mark.slow
@needs_wordnet
def test_the_texts_that_ship_are_wordnets():
    wordnet = read_wordnet()
    figures = json.loads((shipped.tiny_folder().parent / "evaluation.json").read_text())
    if wordnet.digest != figures["wordnet_sha256"]:
        pytest.skip("another version of WordNet is installed")
    corpus = divide(wordnet.synsets)
    general = {write_entry(each) for each in corpus.general}
    assert read_texts("domain-train") == [write_entry(each) for each in corpus.domain]
    assert read_texts("general-eval") == [write_entry(each) for each in corpus.general_held_out]
    assert set(read_texts("general-train-sample")) < general
    assert not general & {text for name in ("domain-train", "domain-eval") for text in read_texts(name)}
    assert wordnet.notice in (shipped.tiny_folder() / NOTICE).read_text()


@pytest.mark.slow
@needs_wordnet
def test_the_command_makes_what_ships(tmp_path, small, monkeypatch):
    monkeypatch.setattr(command, "ASKED", 2)
    monkeypatch.setattr(evaluate, "LONGEST", 4)
    work = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--steps", "2", "--eager"]
    command.main(work)
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert figures["losses"]["general"]["nats_per_token"] < 9
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", NOTICE):
        assert (tmp_path / "out" / "qwen3" / name).is_file()
