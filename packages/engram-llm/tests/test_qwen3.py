"""The backbone `qwen3`: registered, complete, and reading tokenizers from a model folder."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from engram_core import Backbone, InputError, list_backbones
from engram_llm.qwen3 import QWEN3


def test_it_is_registered_and_complete():
    assert isinstance(QWEN3, Backbone)
    assert list_backbones()["qwen3"].load() is QWEN3
    assert QWEN3.tokenizers.keys() == QWEN3.streams.keys() == {"text"}


def test_it_reads_the_tokenizer_of_a_model_folder(tmp_path):
    source = QWEN3.tokenizers["text"]
    folder = tmp_path / source.subfolder
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate("abc")}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = QWEN3.load_tokenizers(str(tmp_path))["text"]
    assert list(loaded.encode("cab")) == [2, 0, 1]
    assert loaded.max_tokens == source.max_length


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        QWEN3.load_tokenizers(str(tmp_path))
