"""What the frozen models made is kept: made once, used while nothing it depends on has changed."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vision_builders import Log, captions, train_settings, write_pictures

from engram_vision.training import frozen, pictures
from engram_vision.training.frozen import FrozenData, FrozenTexts
from engram_vision.training.store import FrozenStore
from engram_vision.training.trainer import train


def data_of(seed=0):
    draws = torch.Generator().manual_seed(seed)
    texts = FrozenTexts(
        ids=torch.arange(10).view(2, 5),
        states=torch.randn(2, 5, 3, generator=draws).half(),
        lengths=torch.tensor([3, 5]),
    )
    pooled = FrozenTexts(ids=texts.ids + 1, states=texts.states + 1, pooled=torch.randn(2, 4, generator=draws))
    return FrozenData(
        mean=torch.randn(3, 4, 2, 2, generator=draws),
        std=torch.rand(3, 4, 2, 2, generator=draws),
        texts={"clip_l": texts, "clip_g": pooled},
        captions=((0,), (0, 1), (1,)),
        origin={"pictures": "a", "captions": "b"},
    )


def same(one, other):
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.std, other.std)
    assert one.captions == other.captions
    assert dict(one.origin) == dict(other.origin)
    assert one.texts.keys() == other.texts.keys()
    for stream, texts in one.texts.items():
        for name in ("ids", "states", "pooled", "lengths"):
            value, again = getattr(texts, name), getattr(other.texts[stream], name)
            assert (value is None) == (again is None)
            assert value is None or (value.dtype == again.dtype and torch.equal(value, again))


@pytest.fixture
def fetch(tmp_path):
    """Return a function that asks a store, and says how often the data was made."""
    file = tmp_path / "a.png"
    file.write_bytes(b"picture")
    made, notes = [], []

    def ask(*, text="a caption", content=b"picture", writes=True, **facts):
        file.write_bytes(content)
        store = FrozenStore(folder=tmp_path / "kept", facts=facts, writes=writes, note=notes.append)
        found = store.fetch([file], [[text]], lambda: made.append(1) or data_of())
        return found, len(made), notes

    return ask


def test_what_is_kept_comes_back_bit_for_bit(fetch):
    first, count, _ = fetch(precision="fp32")
    again, count_again, notes = fetch(precision="fp32")
    assert (count, count_again, notes) == (1, 1, [])
    same(first, again)
    same(again, data_of())


def test_whatever_the_values_depend_on_makes_them_anew(fetch):
    assert fetch(precision="fp32")[1] == 1
    assert fetch(precision="bf16")[1] == 2
    assert fetch(precision="fp32", text="another")[1] == 3
    assert fetch(precision="fp32", content=b"another")[1] == 4
    assert fetch(precision="fp32")[1] == 4


def test_one_of_several_processes_writes(fetch, tmp_path):
    assert fetch(writes=False)[1] == 1
    assert not (tmp_path / "kept").exists()
    assert fetch(writes=False)[1] == 2


@pytest.mark.parametrize("damage", ["cut", "junk", "foreign", "unfit"])
def test_a_file_that_cannot_be_used_is_made_again(fetch, tmp_path, damage):
    fetch()
    (file,) = (tmp_path / "kept").iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "junk":
        file.write_bytes(b"junk")
    elif damage == "foreign":
        save_file({"mean": torch.zeros(1)}, file)
    else:
        tensors = load_file(file)
        record = {"engram-frozen": '{"captions": [[0]], "origin": {}}'}
        save_file(tensors, file, record)
    found, count, notes = fetch()
    assert count == 2
    assert [str(file) in note and "is made again" in note for note in notes] == [True]
    same(found, data_of())
    assert fetch()[1] == 2


def test_a_second_run_on_the_same_data_runs_no_frozen_model_and_learns_the_same(tmp_path, model, monkeypatch):
    write_pictures(tmp_path / "pictures", captions())
    cache = tmp_path / "cache"
    settings = train_settings(tmp_path, model, steps=2, cache_dir=cache)
    first = train(settings)
    assert [file.name.startswith("frozen-") for file in cache.iterdir()] == [True]

    def refuse(*_, **__):
        raise AssertionError("a frozen model ran again")

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "encode_pictures", refuse)
        patch.setattr(frozen.TextReader, "read", refuse)
        again = train(settings, overwrite=True, watcher=Log())
        other = train(train_settings(tmp_path, model, steps=2, cache_dir=cache, vector_rate=0.5), overwrite=True)
    assert first.identity == again.identity != other.identity

    Image.new("RGB", (40, 40), "red").save(sorted((tmp_path / "pictures").glob("*.png"))[0])
    changed = train(settings, overwrite=True)
    assert changed.identity != first.identity
    assert len(list(cache.iterdir())) == 2
