"""Pictures depend on prompt, seed and what is loaded; grids show them with labels."""

import numpy as np
import pytest
from PIL import Image
from vision_builders import LENGTH, LOUD, SIZE, TRIGGER, make_adapter, make_concept

from engram_core import InputError
from engram_vision.drawing import Drawing, draw, find_cut, find_silent
from engram_vision.grid import draw_grid
from engram_vision.loading import load_engram, pipeline_tokenizers

PROMPTS = ["a red ball", f"{TRIGGER} in the snow", "", "a blue hat"]
OPTIONS = {"steps": 2, "guidance": 3.0}


def drawings(*prompts, seed=0):
    return [Drawing(prompt=prompt, seed=seed) for prompt in prompts]


def test_a_seed_means_the_same_picture(base):
    one, same = (draw(base, drawings(*PROMPTS), **OPTIONS) for _ in range(2))
    assert [image.tobytes() for image in one] == [image.tobytes() for image in same]
    assert len({image.tobytes() for image in one}) == len(PROMPTS)
    (other,) = draw(base, drawings(PROMPTS[0], seed=1), **OPTIONS)
    (alone,) = draw(base, drawings(PROMPTS[0]), **OPTIONS)
    assert other.tobytes() != alone.tobytes()


def test_each_drawing_of_a_batch_has_its_own_seed(base):
    both = draw(base, [Drawing(prompt="a red ball", seed=seed) for seed in (1, 2)], **OPTIONS)
    for seed, image in zip((1, 2), both, strict=True):
        (alone,) = draw(base, drawings("a red ball", seed=seed), **OPTIONS)
        difference = np.abs(np.asarray(alone, int) - np.asarray(image, int))
        assert difference.max() <= 2  # products of another shape may round differently
    assert both[0].tobytes() != both[1].tobytes()


def test_pictures_are_drawn_in_batches_and_counted(base):
    done = []
    images = draw(base, drawings(*PROMPTS, "a hat"), batch_size=2, advance=done.append, **OPTIONS)
    assert done == [2, 4, 5]
    assert len(images) == 5
    assert draw(base, [], **OPTIONS) == []


def test_the_negative_prompt_and_the_size_count(base):
    (plain,) = draw(base, drawings("a red ball"), **OPTIONS)
    (negative,) = draw(base, drawings("a red ball"), negative="snow", **OPTIONS)
    assert plain.tobytes() != negative.tobytes()
    assert plain.size == (SIZE, SIZE)
    (wide,) = draw(base, drawings("a red ball"), width=48, height=16, **OPTIONS)
    assert wide.size == (48, 16)


@pytest.mark.parametrize(("side", "pixels"), [("width", 36), ("height", 100)])
def test_a_size_that_the_model_cannot_draw_is_refused(base, side, pixels):
    with pytest.raises(InputError, match=f"{side} is {pixels}, expected a multiple of 8"):
        draw(base, drawings("a red ball"), **{side: pixels}, **OPTIONS)


def test_what_is_loaded_is_drawn(pipeline, base):
    load_engram(pipeline, make_adapter(base))
    pairs = zip(draw(pipeline, drawings(*PROMPTS), **OPTIONS), draw(base, drawings(*PROMPTS), **OPTIONS), strict=True)
    assert [one.tobytes() == other.tobytes() for one, other in pairs] == [True, False, True, True]


# Silent triggers


def find(base, *prompts, trigger=TRIGGER):
    return find_silent(base, make_adapter(base, make_concept(base, trigger)), prompts)


def test_a_trigger_that_is_cut_off_is_told_once_a_prompt(base):
    long = "a red ball " * 10 + TRIGGER
    (told,) = find(base, long, long, TRIGGER)
    assert told.startswith(f"{TRIGGER!r} stands in {long!r} but does not fire in clip_l: it is cut off")
    assert f"the encoder reads {LENGTH - 2}" in told


def test_a_trigger_that_the_tokenizer_cuts_otherwise_is_told(base):
    (told,) = find(base, f"a {LOUD}% ball", trigger=LOUD)
    assert "tokens that are not registered" in told


@pytest.mark.parametrize("prompt", [f"{TRIGGER}, a ball", TRIGGER.upper(), f"x{TRIGGER}", f"{TRIGGER}s", "zorbit", ""])
def test_a_trigger_that_fires_or_is_part_of_another_word_is_not_told(base, prompt):
    assert find(base, prompt) == []


# Grids


def grey(value, size=(8, 8)):
    return Image.new("RGB", size, (value, value, value))


def test_a_grid_has_a_row_a_prompt_and_a_column_a_variant():
    rows = [
        ("one", [grey(10, (200, 150)), grey(20, (200, 150))]),
        ("two", [grey(30, (200, 150)), grey(40, (200, 150))]),
    ]
    sheet = draw_grid(["base", "engram"], rows)
    assert sheet.size == (220 + 2 * 208, 30 + 2 * 158)
    for row in range(2):
        for column in range(2):
            place = (220 + column * 208, 30 + row * 158)
            part = np.asarray(sheet.crop((*place, place[0] + 200, place[1] + 150)))
            assert set(part.ravel().tolist()) == {10 + 20 * row + 10 * column}
    labels = np.asarray(sheet.crop((0, 0, 220, sheet.height)))
    assert (labels[30:180] < 128).any()
    assert (labels[188:] < 128).any()
    assert (np.asarray(sheet.crop((220, 0, sheet.width, 30))) < 128).any()


def test_tiny_pictures_are_enlarged_by_whole_factors():
    picture = Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 50, 3))
    sheet = draw_grid(["engram"], [("one", [picture])])
    assert sheet.size == (220 + 200 + 8, 30 + 160 + 8)
    shown = sheet.crop((220, 30, 420, 190))
    assert shown.tobytes() == picture.resize((200, 160), Image.Resampling.NEAREST).tobytes()


@pytest.mark.parametrize(
    "label", ["", "\n(seed 0)", "word " * 300, "x" * 500, "日本 “é”\n(seed 3)", "tab\tand\r\nline"]
)
def test_any_label_fits(label):
    sheet = draw_grid(["engram"], [(label, [grey(200)]), ("two", [grey(200)])])
    assert sheet.size == (220 + 136, 30 + 2 * 136)
    beside = np.asarray(sheet.crop((212, 30, 220, sheet.height)))
    assert (beside == 255).all()


def test_drawing_prints_nothing_even_of_long_prompts(base, capfd):
    draw(base, drawings("a red ball " * 11), **OPTIONS)
    assert capfd.readouterr() == ("", "")


def test_prompts_that_are_too_long_are_named_with_both_numbers(base):
    (tokenizer,) = pipeline_tokenizers(base).values()
    long = "forest " * (tokenizer.max_tokens + 1)
    (sentence,) = find_cut(base, ["forest", long, long])
    assert f"clip_l reads {tokenizer.max_tokens}" in sentence
    assert f"has {len(tokenizer.encode(long))} tokens" in sentence
