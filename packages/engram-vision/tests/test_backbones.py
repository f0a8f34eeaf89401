"""The backbones `sd15` and `sd35`: their streams, and their tokenizers from model folders."""

import pytest

from engram_core import Backbone, ConvertingBackbone, InputError, build_registry, list_backbones, wrap_tokenizer
from engram_vision.sd15 import SD15
from engram_vision.sd35 import SD35

TRIGGER = "Aldric Vortex-9 CyberNebula"


@pytest.mark.parametrize("backbone", [SD15, SD35])
def test_they_are_registered_and_complete(backbone):
    assert isinstance(backbone, Backbone)
    assert isinstance(backbone, ConvertingBackbone)
    assert list_backbones()[backbone.name].load() is backbone
    assert backbone.tokenizers.keys() == backbone.streams.keys()


def test_sd35_has_three_streams_in_the_order_of_the_pipeline():
    assert list(SD35.streams) == ["clip_l", "clip_g", "t5"]


def test_clip_files_give_transformers_own_tokenizer(sd15_folder, clip_files):
    transformers = pytest.importorskip("transformers")
    vocabulary, merges = clip_files
    theirs = wrap_tokenizer(
        transformers.CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split()) for m in merges], model_max_length=77)
    )
    ours = SD15.load_tokenizers(str(sd15_folder))["clip_l"]
    assert ours.spec == theirs.spec
    assert ours.special_ids == theirs.special_ids == {49406, 49407}
    assert ours.max_tokens == theirs.max_tokens == 75
    for text in ("A photo of Aldric's  CAT, 8k!", "日本語 ﬁ 🙂", "", "<|endoftext|> x"):
        assert list(ours.encode(text)) == list(theirs.encode(text))


def test_the_published_trigger_has_its_published_entries(sd15_folder):
    tokenizer = SD15.load_tokenizers(str(sd15_folder))["clip_l"]
    registry = build_registry(TRIGGER, tokenizer, contexts=[("", "")])
    n_tokens = len(registry.variants[0].ids)
    assert tokenizer.show(registry.variants[0].ids)[-1].endswith("</w>")
    assert len(registry.entries) == sum(n_tokens - n + 1 for n in range(2, min(7, n_tokens) + 1)) + (n_tokens > 7)


def test_streams_can_be_chosen(sd35_folder):
    assert list(SD35.load_tokenizers(str(sd35_folder), ["t5"])) == ["t5"]
    assert list(SD35.load_tokenizers(str(sd35_folder))) == ["clip_l", "clip_g", "t5"]
    with pytest.raises(InputError, match="no stream 'umt5'; there are clip_l, clip_g, t5"):
        SD35.load_tokenizers(str(sd35_folder), ["umt5"])


def test_a_folder_without_tokenizers_is_named(tmp_path, sd15_folder):
    with pytest.raises(InputError, match=f"{tmp_path}.*tokenizer: holds no tokenizer"):
        SD15.load_tokenizers(str(tmp_path))
    with pytest.raises(InputError, match="tokenizer_2: holds no tokenizer"):
        SD35.load_tokenizers(str(sd15_folder))


def test_a_malformed_tokenizer_is_named(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: is not a tokenizer"):
        SD15.load_tokenizers(str(tmp_path))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "merges.txt").write_text("")
    with pytest.raises(InputError, match=r"vocab\.json is not CLIP's"):
        SD15.load_tokenizers(str(tmp_path))


def test_a_model_that_is_nowhere_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="model 'nobody/nothing' is not a local folder"):
        SD15.load_tokenizers("nobody/nothing")
