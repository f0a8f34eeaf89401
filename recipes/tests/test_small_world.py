"""The small world: what it holds out stays out, training goes on where it stopped, and the tokenizer is CLIP's kind."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import T5Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from recipes import training
from recipes.small_world import autoencoder, denoiser, transformer, unigram
from recipes.small_world.captions import SCENE_PHRASES, describe_monster, invent_name, write_caption
from recipes.small_world.checkpoint35 import assemble
from recipes.small_world.judge import GROUPS, label
from recipes.small_world.references import write_references
from recipes.small_world.scenes import SCENES, draw_scene
from recipes.small_world.subjects import ATTRIBUTES, FONT, Monster, draw_monster, random_monster
from recipes.small_world.tokenizer import MAX_LENGTH, train_tokenizer
from recipes.small_world.world import CHARACTERS, REGIONS, SIZE, draw_example, is_held_out, render

NAMES = [name.casefold() for name in CHARACTERS]

needs_font = pytest.mark.skipif(not FONT.exists(), reason="needs Debian's fonts-noto-color-emoji")


@pytest.fixture(scope="module")
def captions():
    rng = np.random.default_rng(0)
    subjects = [describe_monster(random_monster(rng), rng) for _ in range(400)] + [invent_name(rng) for _ in range(200)]
    return [write_caption([subject], list(SCENE_PHRASES)[i % 10], rng) for i, subject in enumerate(subjects)]


@needs_font
def test_a_picture_depends_on_seed_and_index_alone():
    one, again, other = draw_example(3, 5), draw_example(3, 5), draw_example(3, 6)
    assert one.caption == again.caption
    np.testing.assert_array_equal(one.image, again.image)
    assert not np.array_equal(one.image, other.image)


@needs_font
def test_what_is_held_out_is_never_drawn_or_named():
    for index in range(1500):
        example = draw_example(0, index)
        assert not any(is_held_out(subject, example.scene) for subject in example.subjects)
        assert not any(name in example.caption.casefold() for name in NAMES)


def test_the_characters_are_held_out_in_every_scene():
    assert all(is_held_out(monster, scene) for monster in CHARACTERS.values() for scene in SCENES)


def test_monsters_differ_in_every_attribute():
    plain = Monster(color="red", shape="round", pattern="plain", headgear="none", eyes="two")
    for name, values in ATTRIBUTES.items():
        sprites = {draw_monster(replace(plain, **{name: value})).tobytes() for value in values}
        assert len(sprites) == len(values), name


@pytest.mark.parametrize("scene", SCENES)
def test_scenes_vary(scene):
    pictures = {draw_scene(scene, np.random.default_rng(seed)).tobytes() for seed in range(3)}
    assert len(pictures) == 3


def test_subjects_stand_where_the_judge_looks():
    rng = np.random.default_rng(0)
    for subjects, regions in (
        ([CHARACTERS["Zorbit Quell"]], ["alone"]),
        (list(CHARACTERS.values()), ["left", "right"]),
    ):
        _, boxes = render(tuple(subjects), "beach", rng)
        for (left, top, right, bottom), region in zip(boxes, regions, strict=True):
            x0, y0, x1, y1 = REGIONS[region]
            assert x0 <= left <= right <= x1
            assert y0 <= top <= bottom <= y1


def test_labels_name_the_subject():
    monster = CHARACTERS["Zorbit Quell"]
    kind, *attributes = label(monster)
    assert GROUPS["kind"][kind] == "monster"
    values = {name: ATTRIBUTES[name][at] for name, at in zip(ATTRIBUTES, attributes, strict=True)}
    assert values == {name: getattr(monster, name) for name in ATTRIBUTES}
    assert label("fox")[1:] == [-1] * len(ATTRIBUTES)


def test_the_references_show_five_scenes_each_and_all_ten_together(tmp_path):
    write_references(tmp_path, seed=0)
    shown = Counter(path.stem for path in tmp_path.rglob("*.png"))
    assert shown == Counter(list(SCENES))
    for name in CHARACTERS:
        folder = tmp_path / name.casefold().replace(" ", "-")
        assert len(list(folder.glob("*.png"))) == 5
        assert (folder / "metadata.jsonl").read_text().count(name) == 5


def test_the_tokenizer_is_of_clips_kind(tmp_path, captions):
    tokenizer = train_tokenizer(captions, tmp_path)
    ids = tokenizer("a monster in the forest").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer("A  Monster in the FOREST").input_ids == ids
    for name in CHARACTERS:
        assert len(tokenizer.tokenize(name)) >= 4
    with pytest.raises(ValueError, match=f"reads {MAX_LENGTH}"):
        denoiser.tokenize(tokenizer, ["monster " * MAX_LENGTH])


def test_the_autoencoder_goes_on_where_it_stopped(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (32, SIZE, SIZE, 3), np.uint8)
    lines = []
    whole = autoencoder.train_autoencoder(images, tmp_path / "whole", steps=4, seed=0, report=lines.append)
    monkeypatch.setattr(training, "cosine", lambda step, steps, **rest: cosine_of_four(step, **rest))
    autoencoder.train_autoencoder(images, tmp_path / "parts", steps=2, seed=0, report=lines.append)
    resumed = autoencoder.train_autoencoder(images, tmp_path / "parts", steps=4, seed=0, report=lines.append)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def cosine_of_four(step, **rest):
    from recipes.state import cosine

    return cosine(step, 4, **rest)


def test_the_denoiser_learns_and_goes_on_where_it_stopped(tmp_path, captions, monkeypatch):
    monkeypatch.setattr(denoiser, "BATCH", 4)
    tokenizer = train_tokenizer(captions, tmp_path / "tokenizer")
    latents = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    lessons = denoiser.prepare_lessons(latents, captions[:8], [((10, 17, 54, 61),)] * 8, tokenizer)
    assert torch.allclose(lessons.weights.mean(dim=(1, 2)), torch.ones(8))
    assert float(lessons.weights[0, 8, 8]) > float(lessons.weights[0, 0, 0])
    lines = []
    models = denoiser.train_denoiser(lessons, tokenizer, tmp_path / "run", steps=2, seed=0, report=lines.append)
    again = denoiser.train_denoiser(lessons, tokenizer, tmp_path / "run", steps=2, seed=0, report=lines.append)
    for name, value in models.unet.state_dict().items():
        assert torch.equal(value, again.unet.state_dict()[name]), name
    assert len(lines) == 1  # the second call had nothing left to do


def test_the_unigram_tokenizer_is_of_t5s_kind(tmp_path, captions):
    tokenizer = unigram.train_unigram(unigram.vary_case(captions, 0), tmp_path)
    ids = tokenizer("a monster in the forest").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁a", "▁monster", "▁in", "▁the", "▁forest", "</s>"]
    assert tokenizer.unk_token_id not in tokenizer('"ZORBIT", (it\'s) [x]: 12-3!').input_ids
    assert tokenizer("A Monster").input_ids != tokenizer("a monster").input_ids
    assert T5Tokenizer.from_pretrained(tmp_path)("Zorbit Quell").input_ids == tokenizer("Zorbit Quell").input_ids
    for name in CHARACTERS:
        assert len(tokenizer.tokenize(name)) >= 4


def test_the_transformer_learns_and_goes_on_where_it_stopped(tmp_path, captions, monkeypatch):
    monkeypatch.setattr(transformer, "BATCH", 4)
    first = train_tokenizer(captions, tmp_path / "tokenizer")
    readers = transformer.build_readers(tmp_path / "tokenizer", captions, tmp_path / "third", 0)
    ids = denoiser.tokenize(readers.first, captions[:20])
    repadded = transformer.repad(ids, readers.first.pad_token_id, readers.second.pad_token_id)
    assert torch.equal(repadded, denoiser.tokenize(readers.second, captions[:20]))
    latents = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    lessons = denoiser.prepare_lessons(latents, captions[:8], [((10, 17, 54, 61),)] * 8, first)
    lines = []

    def learn():
        torch.manual_seed(0)
        models = transformer.build_models(readers, denoiser.build_denoiser(first).text)
        return transformer.train_transformer(
            models, lessons, captions[:8], readers, tmp_path / "run", steps=2, seed=0, report=lines.append
        )

    models, again = learn(), learn()
    for name, value in models.transformer.state_dict().items():
        assert torch.equal(value, again.transformer.state_dict()[name]), name
    assert len(lines) == 1  # the second call had nothing left to do


def test_what_the_transformer_learns_from_is_what_the_pipeline_gives_it(tmp_path, captions):
    first = train_tokenizer(captions, tmp_path / "tokenizer")
    readers = transformer.build_readers(tmp_path / "tokenizer", captions, tmp_path / "third", 0)
    models = transformer.build_models(readers, denoiser.build_denoiser(first).text)
    pipeline = assemble(models, readers, autoencoder.build_autoencoder())
    text = [captions[0]]
    embeds, _, pooled, _ = pipeline.encode_prompt(text, None, None, max_sequence_length=unigram.MAX_LENGTH)
    seen = {}
    models.transformer.forward = lambda **arguments: seen.update(arguments) or SimpleNamespace(sample=torch.zeros(1))
    ids = {"clip_l": denoiser.tokenize(readers.first, text), "clip_g": denoiser.tokenize(readers.second, text)}
    ids["t5"] = torch.tensor(readers.third(text, padding="max_length", max_length=unigram.MAX_LENGTH)["input_ids"])
    transformer.guess_velocity(models, ids, torch.ones(1), torch.zeros(1, 4, 16, 16), torch.ones(1))
    assert torch.equal(seen["encoder_hidden_states"], embeds)
    assert torch.equal(seen["pooled_projections"], pooled)
