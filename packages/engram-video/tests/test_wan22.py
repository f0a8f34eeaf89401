"""The backbone `wan22`: registered, complete, and reading tokenizers from a model folder."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from engram_core import Backbone, InputError, list_backbones
from engram_video.wan22 import WAN22


def test_it_is_registered_and_complete():
    assert isinstance(WAN22, Backbone)
    assert list_backbones()["wan22"].load() is WAN22
    assert WAN22.tokenizers.keys() == WAN22.streams.keys() == {"umt5"}


def test_it_reads_the_tokenizer_of_a_model_folder(tmp_path):
    source = WAN22.tokenizers["umt5"]
    folder = tmp_path / source.subfolder
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate("abc")}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = WAN22.load_tokenizers(str(tmp_path))["umt5"]
    assert list(loaded.encode("cab")) == [2, 0, 1]
    assert loaded.max_tokens == source.max_length


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer"):
        WAN22.load_tokenizers(str(tmp_path))
