"""Tokenizers from folders in the layouts of diffusers and transformers, without either library."""

import builtins
import json

import pytest

from engram_core import InputError
from engram_core.huggingface import TokenizerSource, load_tokenizer, load_tokenizers, read_tokenizer

tokenizers = pytest.importorskip("tokenizers")

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
TOP = TokenizerSource(subfolder="", max_length=None)


@pytest.fixture
def words():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "red": 1, "cat": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture
def folder(tmp_path, words):
    """A model with a tokenizer.json in one subfolder, and CLIP's two files in another."""
    (tmp_path / "tokenizer").mkdir()
    words.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizerFast"}')
    clip = tmp_path / "tokenizer_2"
    clip.mkdir()
    tokens = ["c", "a", "t", "t</w>", "s</w>", "ca", "cat</w>", BEGIN, END]
    (clip / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (clip / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return tmp_path


def test_a_tokenizer_json_is_read(folder):
    wrapped = load_tokenizer(str(folder), TokenizerSource(subfolder="tokenizer", max_length=16))
    assert list(wrapped.encode("red cat red dog")) == [1, 2, 1, 0]
    assert wrapped.max_tokens == 16
    assert wrapped.spec.class_name == "BertTokenizer"


def test_a_vocabulary_and_merges_are_clips(folder):
    wrapped = load_tokenizer(str(folder), TokenizerSource(subfolder="tokenizer_2", max_length=77))
    assert wrapped.show(wrapped.encode("CAT  cats")) == ["cat</w>", "ca", "t", "s</w>"]
    assert wrapped.special_ids == {7, 8}
    assert wrapped.max_tokens == 75
    assert wrapped.spec.class_name == "Tokenizer"


def test_streams_are_loaded_as_asked(folder):
    sources = {
        "one": TokenizerSource(subfolder="tokenizer", max_length=None),
        "two": TokenizerSource(subfolder="tokenizer_2", max_length=None),
        "gone": TokenizerSource(subfolder="missing", max_length=None),
    }
    assert list(load_tokenizers(str(folder), sources, ["two", "one"])) == ["two", "one"]
    with pytest.raises(InputError, match="there is no stream 'three'; there are one, two, gone"):
        load_tokenizers(str(folder), sources, ["three"])
    with pytest.raises(InputError, match="missing: holds no tokenizer"):
        load_tokenizers(str(folder), sources)


def test_a_file_may_be_named_itself(folder):
    assert read_tokenizer(folder / "tokenizer" / "tokenizer.json").get_vocab_size() == 3


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"version":"1.0","model":{"type":"Other"}}'])
def test_a_malformed_file_is_named(folder, text):
    (folder / "tokenizer" / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"tokenizer\.json: is not a tokenizer: "):
        load_tokenizer(str(folder), TokenizerSource(subfolder="tokenizer", max_length=None))


def test_a_vocabulary_that_is_not_clips_is_refused(folder):
    (folder / "tokenizer_2" / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(InputError, match="is not CLIP's"):
        load_tokenizer(str(folder), TokenizerSource(subfolder="tokenizer_2", max_length=None))


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"tokenizer_class": 3}', '{"tokenizer_class": "rm -rf"}'])
def test_a_strange_configuration_is_left_aside(folder, config):
    (folder / "tokenizer" / "tokenizer_config.json").write_text(config)
    wrapped = load_tokenizer(str(folder), TokenizerSource(subfolder="tokenizer", max_length=None))
    assert wrapped.spec.class_name == "Tokenizer"


def test_a_missing_library_is_named(folder, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("tokenizers", "huggingface_hub"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="needs the package 'tokenizers'; install engram-core with its extra"):
        load_tokenizer(str(folder / "tokenizer"), TOP)
    with pytest.raises(InputError, match="'no/model' is not a local folder, and 'huggingface_hub' is not installed"):
        load_tokenizer("no/model", TOP)


def test_a_model_that_cannot_be_had_is_named(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fail(model, allow_patterns):
        asked.append((model, allow_patterns))
        raise OSError("offline")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"model 'no/model' is not a local folder.*\(OSError\); pass --model"):
        load_tokenizer("no/model", TokenizerSource(subfolder="tokenizer_2", max_length=None))
    ((model, patterns),) = asked
    assert model == "no/model"
    # Text files alone: no weights are downloaded to read a tokenizer.
    assert all(pattern.startswith("tokenizer_2/") and pattern.endswith((".json", ".txt")) for pattern in patterns)


def test_downloaded_files_are_read(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda model, allow_patterns: str(folder))
    wrapped = load_tokenizer("some/model", TokenizerSource(subfolder="tokenizer", max_length=None))
    assert list(wrapped.encode("red cat")) == [1, 2]
