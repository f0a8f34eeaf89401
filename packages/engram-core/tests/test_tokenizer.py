"""What engram takes from a tokenizer: ids, special ids, limits, and an identity that shows every difference."""

from dataclasses import dataclass, field

import pytest
from core_builders import make_adapter, make_concept, make_manifest, make_spec

from engram_core import InputError, TokenizerSpec, fingerprint_tokenizer, wrap_tokenizer
from engram_core.audit import check_tokenizers


@dataclass
class FakeTransformers:
    """As much of a `transformers` tokenizer as is used."""

    vocabulary: dict = field(default_factory=lambda: {"<s>": 0, "</s>": 1, "a": 2, "b": 3})
    model_max_length: int = 10
    calls: list = field(default_factory=list)
    all_special_ids = (0, 1)

    def __call__(self, text, **options):
        self.calls.append(options)
        return {"input_ids": [self.vocabulary.get(letter, 2) for letter in text]}

    def __len__(self):
        return len(self.vocabulary)

    def get_vocab(self):
        return self.vocabulary

    def num_special_tokens_to_add(self):
        return 2

    def convert_ids_to_tokens(self, ids):
        names = {number: token for token, number in self.vocabulary.items()}
        return [names[i] for i in ids]


class FakeTransformersFast(FakeTransformers):
    pass


@dataclass
class FakeAdded:
    special: bool


class FakeTokenizers:
    """As much of a `tokenizers.Tokenizer` as is used."""

    truncation = padding = None

    def encode(self, text, add_special_tokens=True):
        assert add_special_tokens is False
        return type("Encoding", (), {"ids": [5 + len(word) for word in text.split()]})()

    def get_added_tokens_decoder(self):
        return {0: FakeAdded(True), 1: FakeAdded(False), 2: FakeAdded(True)}

    def num_special_tokens_to_add(self, is_pair):
        return 1

    def get_vocab_size(self):
        return 100

    def get_vocab(self):
        return {"x": 7}

    def id_to_token(self, number):
        return "x" if number == 7 else None


def test_a_transformers_tokenizer():
    fake = FakeTransformers()
    wrapped = wrap_tokenizer(fake)
    assert wrapped.encode("abba") == [2, 3, 3, 2]
    assert all(options == {"add_special_tokens": False, "verbose": False} for options in fake.calls)
    assert wrapped.special_ids == {0, 1}
    assert wrapped.show([2, 3]) == ["a", "b"]
    assert wrapped.max_tokens == 8  # two special tokens take their place
    assert wrapped.spec.vocab_size == 4


def test_a_tokenizers_tokenizer():
    wrapped = wrap_tokenizer(FakeTokenizers())
    assert wrapped.encode("one two three") == [8, 8, 10]
    assert wrapped.special_ids == {0, 2}
    assert wrapped.show([7, 8]) == ["x", "?"]
    assert wrapped.max_tokens is None
    assert wrapped.spec.vocab_size == 100
    assert wrap_tokenizer(FakeTokenizers(), max_length=77).max_tokens == 76


def test_the_callers_limit_goes_first():
    assert wrap_tokenizer(FakeTransformers(), max_length=77).max_tokens == 75
    assert wrap_tokenizer(FakeTransformers(model_max_length=int(1e30))).max_tokens is None
    assert wrap_tokenizer(FakeTransformers(model_max_length=int(1e30)), max_length=256).max_tokens == 254


def test_the_class_name_is_for_people():
    assert wrap_tokenizer(FakeTransformers()).spec.class_name == "FakeTransformers"
    assert wrap_tokenizer(FakeTransformersFast()).spec.class_name == "FakeTransformers"
    assert wrap_tokenizer(FakeTokenizers(), class_name="CLIPTokenizerFast").spec.class_name == "CLIPTokenizer"


def test_the_vocabulary_covers_its_highest_id():
    sparse = FakeTransformers({"a": 2, "b": 500})
    assert wrap_tokenizer(sparse).spec.vocab_size == 501


@pytest.mark.parametrize("thing", [None, "gpt2", object(), len])
def test_anything_else_is_refused(thing):
    with pytest.raises(InputError, match=f"{type(thing).__name__} is not a tokenizer of transformers or tokenizers"):
        wrap_tokenizer(thing)


# Fingerprints


def letters(text):
    return [ord(letter) for letter in text]


def test_equal_behaviour_gives_equal_fingerprints():
    one = fingerprint_tokenizer({"a": 1, "b": 2}, letters)
    assert one == fingerprint_tokenizer({"b": 2, "a": 1}, lambda text: tuple(letters(text)))
    assert len(one) == 64
    assert set(one) <= set("0123456789abcdef")


def test_the_fingerprint_is_the_same_everywhere():
    assert fingerprint_tokenizer({"a": 1}, letters) == (
        "047be8aeafb1d31c271875824ec09a554034c857b1c2b9b28e596723dac365ad"
    )


@pytest.mark.parametrize(
    ("vocabulary", "encode"),
    [
        ({"a": 1, "b": 2, "c": 3}, letters),
        ({"a": 1, "b": 3}, letters),
        ({"a": 2, "b": 1}, letters),
        ({"a": 1, "B": 2}, letters),
        ({"a": 1, "b": 2}, lambda text: letters(text.lower())),
        ({"a": 1, "b": 2}, lambda text: letters(" ".join(text.split()))),
        ({"a": 1, "b": 2}, lambda text: letters(text.replace("9", ""))),
        ({"a": 1, "b": 2}, lambda text: letters(text.encode("ascii", "ignore").decode())),
    ],
    ids=["new token", "other id", "swapped", "other token", "lower case", "white space", "digits", "ascii only"],
)
def test_every_difference_shows(vocabulary, encode):
    assert fingerprint_tokenizer(vocabulary, encode) != fingerprint_tokenizer({"a": 1, "b": 2}, letters)


# An adapter's tokenizers


def adapter_for(spec):
    streams = {"clip_l": make_spec(3, vocab_size=spec.vocab_size, fingerprint=spec.fingerprint)}
    return make_adapter(make_concept("cat", (2, 3)), manifest=make_manifest(streams=streams), label="cat.safetensors")


def test_the_right_tokenizer_is_accepted():
    wrapped = wrap_tokenizer(FakeTransformers())
    check_tokenizers(adapter_for(wrapped.spec), {"clip_l": wrapped, "another": wrapped})


def test_another_class_name_is_no_difference():
    wrapped, fast = wrap_tokenizer(FakeTransformers()), wrap_tokenizer(FakeTransformers(), class_name="Other")
    check_tokenizers(adapter_for(wrapped.spec), {"clip_l": fast})


def test_a_missing_tokenizer_is_named():
    wrapped = wrap_tokenizer(FakeTransformers())
    with pytest.raises(InputError, match=r"^cat\.safetensors: stream 'clip_l' needs its tokenizer \(ToyTokenizer\)$"):
        check_tokenizers(adapter_for(wrapped.spec), {"t5": wrapped})


def test_the_wrong_tokenizer_is_named_beside_the_right_one():
    right = TokenizerSpec(class_name="ToyTokenizer", vocab_size=1000, fingerprint="ab" * 32)
    wrong = wrap_tokenizer(FakeTransformers())
    with pytest.raises(InputError) as caught:
        check_tokenizers(adapter_for(right), {"clip_l": wrong})
    assert str(caught.value) == (
        "cat.safetensors: stream 'clip_l' was made with the tokenizer ToyTokenizer abababababab of 1000 ids, "
        f"this one is FakeTransformers {wrong.spec.fingerprint[:12]} of 4; use the tokenizer of toy/base"
    )


# The real libraries


@pytest.fixture(scope="module")
def trained():
    """A small byte-pair encoder of the `tokenizers` library, trained here."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", "<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a photo of a red-haired pilot in the snow"] * 5, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 1)]
    )
    return tokenizer


def copy_of(tokenizer):
    return type(tokenizer).from_str(tokenizer.to_str())


def test_a_real_tokenizer(trained):
    wrapped = wrap_tokenizer(trained, max_length=77)
    ids = wrapped.encode("a red-haired pilot")
    assert 1 not in ids
    assert wrapped.special_ids == {0, 1}
    assert wrapped.max_tokens == 76
    assert wrapped.spec.vocab_size == trained.get_vocab_size()
    assert "".join(wrapped.show(ids)) == "aĠred-hairedĠpilot"


def test_truncation_and_padding_in_the_file_are_left_out(trained):
    limited = copy_of(trained)
    limited.enable_truncation(4)
    limited.enable_padding(length=32)
    wrapped = wrap_tokenizer(limited)
    text = "a photo of a red-haired pilot in the snow"
    assert list(wrapped.encode(text)) == trained.encode(text, add_special_tokens=False).ids
    assert wrapped.spec.fingerprint == wrap_tokenizer(trained).spec.fingerprint
    assert len(limited.encode(text).ids) == 32  # the caller's own object is left alone


def test_a_normaliser_changes_the_fingerprint(trained):
    tokenizers = pytest.importorskip("tokenizers")
    lower = copy_of(trained)
    lower.normalizer = tokenizers.normalizers.Lowercase()
    plain, folded = wrap_tokenizer(trained).spec, wrap_tokenizer(lower).spec
    assert lower.get_vocab() == trained.get_vocab()
    assert plain.fingerprint != folded.fingerprint


def test_an_added_token_changes_the_fingerprint(trained):
    larger = copy_of(trained)
    larger.add_tokens(["<concept>"])
    assert wrap_tokenizer(larger).spec.fingerprint != wrap_tokenizer(trained).spec.fingerprint
    assert wrap_tokenizer(larger).spec.vocab_size == trained.get_vocab_size() + 1


def test_transformers_and_tokenizers_agree(trained):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=copy_of(trained), pad_token="<pad>", eos_token="<end>", model_max_length=64
    )
    theirs, ours = wrap_tokenizer(fast), wrap_tokenizer(trained, max_length=64)
    for text in ("a red-haired pilot", "Ünïcode 日本 🙂", "", " \n "):
        assert list(theirs.encode(text)) == list(ours.encode(text))
    assert theirs.spec.fingerprint == ours.spec.fingerprint
    assert theirs.spec.vocab_size == ours.spec.vocab_size
    assert theirs.max_tokens == ours.max_tokens == 63
    assert theirs.special_ids == ours.special_ids
    long = "a red-haired pilot " * 100
    assert len(theirs.encode(long)) > 64
