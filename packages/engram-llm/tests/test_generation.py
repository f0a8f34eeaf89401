"""Texts with memories and without: what is generated, told and written."""

import dataclasses
import json

import pytest
import torch
from llm_folders import POSITIONS, make_folder, make_memory_file

from engram_core import (
    AdapterFormatError,
    EngramError,
    GeneratingBackbone,
    IncompatibleAdaptersError,
    InputError,
    TargetExistsError,
    Watcher,
    open_memory,
)
from engram_core.settings import Layer, resolve_settings
from engram_llm.generation import Sampling
from engram_llm.loading import load_memory
from engram_llm.models import load_model, load_tokenizer
from engram_llm.qwen3 import QWEN3
from engram_llm.selection import beyond_vocabulary
from engram_llm.settings import GenerateSettings

PROMPTS = ("Once upon a time", "The dog", "A fever is a rise in the temperature")


class Ears(Watcher):
    """Keeps what it hears."""

    def __init__(self):
        self.notes, self.texts, self.titles = [], {}, []

    def begin(self, title, total=None, done=0):
        self.titles.append(title)

    def note(self, message):
        self.notes.append(message)

    def text(self, title, piece):
        self.texts.setdefault(title, []).append(piece)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generation")


@pytest.fixture(scope="module")
def base(folder):
    return make_folder(folder / "model")


@pytest.fixture(scope="module")
def a(folder, base):
    return make_memory_file(folder / "a.safetensors", base)


@pytest.fixture(scope="module")
def b(folder, base):
    return make_memory_file(
        folder / "b.safetensors", base, seed=1, layer_ids=(0, 3), max_ngram_size=2, engram_vocab_size=(53,)
    )


@pytest.fixture
def settings(base):
    def settings(*adapters, **fields):
        defaults = {"prompts": PROMPTS, "max_new_tokens": 12, "precision": "fp32", "device": "cpu"}
        return GenerateSettings(adapters=tuple(map(str, adapters)), model=str(base), **defaults | fields)

    return settings


def run(settings, **fields):
    return QWEN3.generate(settings, **fields).texts


def by_hand(base, prompt, n_tokens, *memories):
    """Return the likeliest tokens, each from a full pass without cache."""
    model, tokenizer = load_model(str(base)), load_tokenizer(str(base))
    for file, strength in memories:
        load_memory(model, file, strength=strength)
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(n_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[beyond_vocabulary(model, tokenizer)] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_it_generates():
    assert isinstance(QWEN3, GeneratingBackbone)
    assert QWEN3.default_generate_settings("tiny") == {"precision": "fp32"}
    assert QWEN3.default_generate_settings("other") == {}


def test_texts_are_the_likeliest_of_full_passes(base, settings, a, b):
    texts = run(settings(a, f"{b}@0.5", compare=True))
    assert [text.prompt for text in texts] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [text.variant for text in texts] == ["base", "engram"] * len(PROMPTS)
    for text in texts:
        memories = [(a, 1.0), (b, 0.5)] if text.adapters else []
        assert text.text == by_hand(base, text.prompt, 12, *memories)
    assert all(one.text != other.text for one, other in zip(texts[::2], texts[1::2], strict=True))


def test_batches_change_nothing(settings, a, b):
    for fields in ({}, {"temperature": 1.5, "top_p": 0.9, "seeds": (0, 3)}):
        alone = run(settings(a, b, compare=True, **fields))
        assert run(settings(a, b, compare=True, batch_size=4, **fields)) == alone


def test_seeds_decide_what_is_sampled(settings, a):
    texts = run(settings(a, temperature=2.0, seeds=(0, 1), prompts=("The dog",)))
    assert texts[0].text != texts[1].text
    assert [text.seed for text in texts] == [0, 1]
    assert run(settings(a, temperature=2.0, seeds=(1,), prompts=("The dog",)))[0] == texts[1]
    assert run(settings(a, temperature=1e-6, prompts=("The dog",))) == run(settings(a, prompts=("The dog",)))


def test_samples_follow_the_softmax():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    rows, temperature = 4000, 0.7
    sampling = Sampling(range(rows), temperature, 1.0)
    drawn = sampling(None, logits.expand(rows, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / rows
    torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=0.025, rtol=0)
    few = Sampling(range(rows), 1.0, 0.75)(None, logits.expand(rows, -1)).argmax(-1)
    assert set(few.tolist()) == {0, 1}  # 0.5 alone is below 0.75, with 0.3 it is not
    one = Sampling(range(50), 1.0, 0.4)(None, logits.expand(50, -1)).argmax(-1)
    assert set(one.tolist()) == {0}


def test_every_text_records_its_adapters(settings, a, b):
    base, both = run(settings(f"{a}@0.5", b, compare=True, prompts=("The dog",), strengths=("b=2", "3")))
    assert base.adapters == ()
    assert [(one.file, one.identity, one.strength) for one in both.adapters] == [
        (str(a), open_memory(a).identity(), 1.5),
        (str(b), open_memory(b).identity(), 2.0),
    ]
    (alone,) = run(settings(prompts=("The dog",)))
    assert alone.adapters == ()


def test_strength_zero_is_the_base_model(settings, a):
    base, zero = run(settings(f"{a}@0", compare=True, prompts=("The dog",)))
    assert zero.text == base.text
    assert zero.adapters[0].strength == 0


def test_the_end_of_a_text_is_not_part_of_it(base, settings):
    tokenizer = load_tokenizer(str(base))
    seeds = tuple(range(40))
    stopped = run(settings(temperature=3.0, seeds=seeds, prompts=("The",), max_new_tokens=60, batch_size=40))
    ends = [text for text in stopped if text.stopped == "end"]
    assert ends
    assert len(ends) < len(stopped)
    for text in stopped:
        assert tokenizer.eos_token not in text.text
        assert (text.n_tokens == 60) == (text.stopped == "length") or text.n_tokens == 60


def test_pieces_add_up_to_the_texts(settings, a):
    ears = Ears()
    texts = run(settings(a, compare=True), watcher=ears)
    assert list(ears.texts) == [f"{text.variant}: {text.prompt}" for text in texts]
    for text, pieces in zip(texts, ears.texts.values(), strict=True):
        assert "".join(pieces) == text.text
        assert pieces[-1] == ""
    assert ears.titles == [f"loading {settings().model}"]
    silent = Ears()
    run(settings(a, batch_size=2), watcher=silent)
    assert not silent.texts
    assert "generating" in silent.titles


def test_long_prompts_and_many_seeds_are_told_apart_in_titles(settings):
    ears = Ears()
    run(settings(prompts=("a " * 40,), temperature=1.0, seeds=(0, 1), max_new_tokens=2), watcher=ears)
    first, second = ears.texts
    assert first.endswith("\N{HORIZONTAL ELLIPSIS} (seed 0)")
    assert second.endswith("(seed 1)")
    assert len(first) < 90


def test_a_chat_goes_through_the_template(base, settings):
    tokenizer = load_tokenizer(str(base))
    written = "<|im_start|>user\nThe dog<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(written)["input_ids"] == tokenizer(written, add_special_tokens=False)["input_ids"]
    (chat,) = run(settings(prompts=("The dog",), chat=True))
    (plain,) = run(settings(prompts=(written,)))
    assert chat.text == plain.text
    assert chat.prompt == "The dog"


def test_a_model_without_template_refuses_chats(tmp_path, settings):
    bare = make_folder(tmp_path / "bare", chat=False)
    with pytest.raises(InputError, match=r"bare: its tokenizer has no chat template; leave out --chat"):
        run(dataclasses.replace(settings(chat=True), model=str(bare)))


def test_prompts_may_stand_in_a_file(tmp_path, settings):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffThe dog\n\n  The fox  \n", encoding="utf-8")
    texts = run(settings(prompts=("a",), prompts_file=file, max_new_tokens=1))
    assert [text.prompt for text in texts] == ["a", "The dog", "The fox"]
    for content, said in ((b"\n\n", "holds no prompt"), (b"\xff\xfe", "is not UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=said):
            run(settings(prompts=(), prompts_file=file))
    with pytest.raises(InputError, match=r"absent.txt: cannot be read"):
        run(settings(prompts_file=tmp_path / "absent.txt"))


def test_prompts_that_leave_no_place_are_refused(settings):
    ears = Ears()
    prompt = " the" * (POSITIONS - 4)
    (text,) = run(settings(prompts=(prompt,), max_new_tokens=30), watcher=ears)
    (note,) = ears.notes
    assert f"reads at most {POSITIONS} tokens and a prompt has {POSITIONS - 4}" in note
    assert "at most 4 are generated after it instead of 30" in note
    assert text.n_tokens <= 4
    with pytest.raises(InputError, match=rf"has {POSITIONS} tokens, .* reads at most {POSITIONS} with what it"):
        run(settings(prompts=(prompt + " the" * 4,)))
    with pytest.raises(InputError, match="prompt '' has no token"):
        run(settings(prompts=("",)))


def test_the_output_holds_all_texts(tmp_path, settings, a):
    file = tmp_path / "texts.jsonl"
    report = QWEN3.generate(settings(a, compare=True, output=file))
    assert report.output == file
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["variant"], row["text"]) for row in rows] == [
        (text.prompt, text.variant, text.text) for text in report.texts
    ]
    assert rows[1]["adapters"] == [{"file": str(a), "identity": open_memory(a).identity(), "strength": 1.0}]
    assert rows[0]["adapters"] == []
    assert rows[0] | {"model": settings().model, "temperature": 0.0, "max_new_tokens": 12} == rows[0]
    with pytest.raises(TargetExistsError, match=r"texts.jsonl: exists; pass --force"):
        run(settings(output=file))
    assert len(run(settings(output=file), overwrite=True)) == len(PROMPTS)
    assert len(file.read_text().splitlines()) == len(PROMPTS)


def test_tables_on_the_host_generate_the_same(settings, a):
    assert run(settings(a, host_tables=True)) == run(settings(a))


def test_memories_of_other_models_are_refused(tmp_path, settings, a):
    wide = make_folder(tmp_path / "wide", width=40)
    with pytest.raises(
        IncompatibleAdaptersError, match=r"a.safetensors: has width 32, the model's hidden states have 40"
    ):
        run(dataclasses.replace(settings(a), model=str(wide)))


def test_what_is_no_memory_is_refused(tmp_path, settings, base):
    with pytest.raises(AdapterFormatError, match="format is 'pt'"):
        run(settings(base / "model.safetensors"))
    with pytest.raises(EngramError, match=r"absent\.safetensors"):
        run(settings(tmp_path / "absent.safetensors"))


@pytest.mark.parametrize(
    ("strengths", "said"),
    [
        (("x",), "strength 'x' is not a number or NAME=number"),
        (("c=1",), "there is no memory 'c'; there is a, b"),
    ],
)
def test_malformed_strengths_are_refused(settings, a, b, strengths, said):
    with pytest.raises(InputError, match=said):
        run(settings(a, b, strengths=strengths))


def test_strengths_need_a_memory(settings, a):
    with pytest.raises(InputError, match="strength '2': there is no memory to apply it to; give --adapter"):
        run(settings(strengths=("2",)))
    with pytest.raises(InputError, match=r"a.safetensors: is named twice; name it once, with its strength as .*@2"):
        run(settings(a, a))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "there is no prompt; give --prompt or --prompts-file"),
        ({"seeds": []}, "seeds are [], expected at least one"),
        ({"seeds": [0, 1]}, "seeds are [0, 1], but temperature 0 gives one text for all; set a temperature"),
        ({"temperature": -1}, "temperature is -1.0, expected a finite number of at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0, expected a number above 0, at most 1"),
        ({"compare": True}, "compare needs a memory to compare with; give --adapter"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
    ],
)
def test_wrong_settings_are_told(fields, said):
    with pytest.raises(InputError) as refused:
        resolve_settings(GenerateSettings, [Layer(source="test", values=fields)])
    assert said in str(refused.value)
