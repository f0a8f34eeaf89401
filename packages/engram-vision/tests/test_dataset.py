"""Folders of captioned pictures: three kinds of captions, the trigger in each, and a reason for every refusal."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from engram_core import InputError
from engram_vision.caption_stores import MAX_CAPTION, Items
from engram_vision.dataset import (
    caption_with,
    contains_trigger,
    put_trigger_first,
    read_captions,
    read_dataset,
)

TRIGGER = "Aldric Vortex-9"


def add_picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path)


def add_pair(folder, name="cat.png", caption=f"a photo of {TRIGGER}"):
    add_picture(folder / name)
    (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def add_lines(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def add_tinyengram(file, **captions):
    file.write_text(json.dumps({f"{name}.png": {"training_prompt": text} for name, text in captions.items()}))


def found(folder, *, at=None, **options):
    at = at or folder
    return [
        (image.path.relative_to(at).as_posix(), image.caption) for image in read_dataset(folder, TRIGGER, **options)
    ]


def refusal(folder, **options):
    with pytest.raises(InputError) as caught:
        read_dataset(folder, options.pop("trigger", TRIGGER), **options)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_json_lines(tmp_path):
    for name in ("b.png", "sub/a.JPG", "C.webp"):
        add_picture(tmp_path / name)
    add_lines(
        tmp_path,
        {"file_name": "b.png", "text": f" {TRIGGER} smiles\u2028 ", "extra": 1},
        "",
        {"file_name": "./sub/a.JPG", "text": "{trigger} at sea"},
        {"file_name": "C.webp", "text": "aldric  VORTEX-9, {trigger}"},
        "",
    )
    assert found(tmp_path) == [
        ("C.webp", f"aldric  VORTEX-9, {TRIGGER}"),
        ("b.png", f"{TRIGGER} smiles"),
        ("sub/a.JPG", f"{TRIGGER} at sea"),
    ]


def test_captions_of_other_files(tmp_path):
    for name in ("a.ogg", "b.ogg"):
        (tmp_path / name).touch()
    add_lines(
        tmp_path,
        {"file_name": "b.ogg", "text": TRIGGER, "seconds": 3, "notes": [1, {"key": "C"}]},
        {"file_name": "a.ogg", "text": "{trigger} sings"},
    )
    songs = Items(name="song", plural="songs", suffixes=(".ogg",))
    files = read_captions(tmp_path, TRIGGER, songs)
    assert [(file.path.name, file.caption, file.extra) for file in files] == [
        ("a.ogg", f"{TRIGGER} sings", {}),
        ("b.ogg", TRIGGER, {"seconds": 3, "notes": [1, {"key": "C"}]}),
    ]
    (tmp_path / "a.ogg").unlink()
    with pytest.raises(InputError, match=r"line 2: names 'a\.ogg', which is not there"):
        read_captions(tmp_path, TRIGGER, songs)


def test_sidecars(tmp_path):
    add_pair(tmp_path, "b.png", f"\ufeff{TRIGGER} smiles\r\n")
    add_pair(tmp_path, "a.b.gif", "{trigger}\nat sea")
    (tmp_path / "a.b.txt").rename(tmp_path / "a.b.TXT")
    assert found(tmp_path) == [("a.b.gif", f"{TRIGGER}\nat sea"), ("b.png", f"{TRIGGER} smiles")]


@pytest.mark.parametrize("given_folder", ["", "preprocessed"])
def test_tinyengram_with_preprocessed_pictures(tmp_path, given_folder):
    add_picture(tmp_path / "raw.png")
    for name in ("a", "b"):
        add_picture(tmp_path / "preprocessed" / f"{name}.png")
    add_tinyengram(tmp_path / "metadata.json", b=f"{TRIGGER} smiles", a=f"{TRIGGER} at sea")
    notes = []
    images = found(tmp_path / given_folder, at=tmp_path / "preprocessed", note=notes.append)
    assert images == [("a.png", f"{TRIGGER} at sea"), ("b.png", f"{TRIGGER} smiles")]
    if given_folder:
        assert notes == []
    else:
        assert notes == [f"{tmp_path}: the pictures in preprocessed are used, as in TinyEngram, and no others"]


def test_tinyengram_with_pictures_beside_the_metadata(tmp_path):
    add_picture(tmp_path / "a.png")
    add_tinyengram(tmp_path / "metadata.json", a=f"{TRIGGER} at sea")
    assert found(tmp_path) == [("a.png", f"{TRIGGER} at sea")]


def test_preprocessed_is_an_ordinary_name_without_tinyengram(tmp_path):
    add_pair(tmp_path / "preprocessed", "in.png")
    add_pair(tmp_path, "out.png")
    assert [name for name, _ in found(tmp_path)] == ["out.png"]
    assert [name for name, _ in found(tmp_path / "preprocessed")] == ["in.png"]


def test_other_and_hidden_files_are_ignored(tmp_path):
    add_pair(tmp_path, "cat.png")
    add_pair(tmp_path / "sub", "dog.png", "unused")
    for name in ("._cat.png", ".DS_Store", ".hidden.png", "Thumbs.db", "init_engram.pt", "notes.md"):
        (tmp_path / name).write_bytes(b"no picture")
    assert [name for name, _ in found(tmp_path)] == ["cat.png"]


def test_texts_without_pictures_are_ignored_beside_metadata(tmp_path):
    add_picture(tmp_path / "cat.png")
    add_lines(tmp_path, {"file_name": "cat.png", "text": TRIGGER})
    (tmp_path / "README.txt").write_text("Found in the attic.")
    assert found(tmp_path) == [("cat.png", TRIGGER)]


def test_only_picture_is_noted(tmp_path):
    notes = []
    add_pair(tmp_path, "cat.png")
    found(tmp_path, note=notes.append)
    assert notes == [f"{tmp_path / 'cat.png'}: is the only picture; with several the subject is learned more reliably"]
    add_pair(tmp_path, "dog.png")
    found(tmp_path, note=notes.append)
    assert len(notes) == 1


def test_captions_without_trigger_are_refused_together(tmp_path):
    add_pair(tmp_path, "good.png")
    for name in "edcba":
        add_pair(tmp_path, f"{name}.png", "a cat")
    add_picture(tmp_path / "x.png")
    add_pair(tmp_path, "y.png", " \n")
    assert refusal(tmp_path) == (
        f"{tmp_path}: the trigger 'Aldric Vortex-9' is not in the caption of a.png, b.png, c.png and 2 more, and there "
        "is no caption for x.png, y.png; write captions with the trigger, or pass --insert-trigger to put it in front"
    )


def test_trigger_is_inserted_on_request(tmp_path):
    add_pair(tmp_path, "a.png", "a cat")
    add_pair(tmp_path, "b.png", "ALDRIC vortex-9 smiles")
    add_pair(tmp_path, "c.png", "")
    add_picture(tmp_path / "d.png")
    assert found(tmp_path, insert_trigger=True) == [
        ("a.png", f"{TRIGGER}, a cat"),
        ("b.png", "ALDRIC vortex-9 smiles"),
        ("c.png", TRIGGER),
        ("d.png", TRIGGER),
    ]


def test_pictures_without_any_caption_get_the_trigger(tmp_path):
    add_picture(tmp_path / "a.png")
    assert f"{tmp_path}: there is no caption for a.png; " in refusal(tmp_path)
    assert found(tmp_path, insert_trigger=True) == [("a.png", TRIGGER)]


def test_white_space_of_the_trigger_does_not_matter(tmp_path):
    add_picture(tmp_path / "a.png")
    (image,) = read_dataset(tmp_path, "  Aldric\n Vortex-9 ", insert_trigger=True)
    assert image.caption == TRIGGER


@pytest.mark.parametrize("trigger", ["", " \n"])
def test_empty_trigger_is_refused(tmp_path, trigger):
    add_pair(tmp_path)
    assert (
        refusal(tmp_path, trigger=trigger)
        == f"the trigger is {trigger!r}; give the phrase that shall recall the subject"
    )


def test_bad_folders(tmp_path):
    gone, empty, file = tmp_path / "gone", tmp_path / "empty", tmp_path / "file"
    assert refusal(gone) == f"{gone}: does not exist; give the folder that holds the pictures"
    file.touch()
    assert refusal(file) == f"{file}: is a file; give the folder that holds the pictures"
    empty.mkdir()
    (empty / ".DS_Store").touch()
    assert refusal(empty) == f"{empty}: is empty; put the pictures and their captions into it"
    assert f"{empty / ('x' * 300)}: cannot be read: File name too long" in refusal(empty / ("x" * 300))
    (empty / "notes.md").touch()
    add_lines(empty, "")
    message = refusal(empty)
    assert f"{empty}: holds no pictures (.png, .jpg, .jpeg, .webp, .bmp, .gif, .tif, .tiff)" in message
    assert "name those in subfolders in metadata.jsonl" in message


def test_several_kinds_of_captions_are_refused(tmp_path):
    add_pair(tmp_path, "cat.png")
    add_lines(tmp_path, {"file_name": "cat.png", "text": TRIGGER})
    lines, tinyengram = tmp_path / "metadata.jsonl", tmp_path / "metadata.json"
    message = f"{tmp_path}: has captions of several kinds: "
    assert refusal(tmp_path) == f"{message}{lines}; cat.txt; keep those that are right"
    add_tinyengram(tinyengram, cat=TRIGGER)
    assert refusal(tmp_path) == f"{message}{lines}; {tinyengram}; cat.txt; keep those that are right"
    lines.unlink()
    assert refusal(tmp_path) == f"{message}{tinyengram}; cat.txt; keep those that are right"


def test_metadata_of_the_parent_counts_as_a_kind(tmp_path):
    add_pair(tmp_path / "preprocessed", "cat.png")
    add_tinyengram(tmp_path / "metadata.json", cat=TRIGGER)
    for folder in (tmp_path, tmp_path / "preprocessed"):
        assert f"{folder}: has captions of several kinds: {tmp_path / 'metadata.json'}; cat.txt" in refusal(folder)


def test_sidecar_without_picture(tmp_path):
    add_pair(tmp_path, "cat.png")
    stray = tmp_path / "dog.txt"
    stray.write_text(TRIGGER)
    expected = f"{stray}: there is no picture for this caption; put one of the same name beside it"
    assert refusal(tmp_path) == expected
    (tmp_path / "cat.png").unlink()
    (tmp_path / "cat.txt").unlink()
    assert refusal(tmp_path) == expected


def test_sidecar_of_several_pictures(tmp_path):
    add_pair(tmp_path, "cat.png")
    add_picture(tmp_path / "cat.jpg")
    expected = f"{tmp_path / 'cat.txt'}: is the caption of several pictures, cat.jpg, cat.png; rename all but one"
    assert refusal(tmp_path) == expected


def test_second_sidecar(tmp_path):
    add_pair(tmp_path, "cat.png")
    second = tmp_path / "cat.TXT"
    if second.exists():
        pytest.skip("the file system does not tell case")
    second.write_text(TRIGGER)
    assert refusal(tmp_path) == f"{tmp_path / 'cat.txt'}: is a second caption of cat.png; keep one"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{file_name: 1}", ": is not JSON: Expecting property name enclosed in double quotes at column 2; correct it"),
        ("[" * 100_000, ": cannot be used: it nests too deeply; correct it"),
        ('{"text": "a", "text": "b"}', ": cannot be used: it names 'text' twice; correct it"),
        ('["cat.png", "a cat"]', ": holds ['cat.png', 'a cat'], expected an object with file_name and text"),
        ({"file_name": "cat.png", "caption": "a"}, ": lacks text; it has ['caption', 'file_name']"),
        ({}, ": lacks file_name and text; it has []"),
        ({"file_name": "cat.png", "text": None}, ": text is None, expected text in quotes"),
        ({"file_name": 3, "text": "a"}, ": file_name is 3, expected text in quotes"),
        ({"file_name": "./cat.png", "text": "a"}, ": names './cat.png' a second time; keep one caption for a picture"),
        ({"file_name": "dog.png", "text": "a"}, ": names 'dog.png', which is not there; put it into FOLDER, or drop"),
        ({"file_name": "", "text": "a"}, ": names '', which is not there"),
        ({"file_name": "sub", "text": "a"}, ": names 'sub', which is not there"),
        ({"file_name": "a\0b.png", "text": "a"}, ": names 'a\\x00b.png', which is not there"),
        ({"file_name": "\ud800.png", "text": "a"}, ": names '\\ud800.png', which is not there"),
        ({"file_name": "x" * 300, "text": "a"}, "xxx', which is not there"),
        ({"file_name": "notes.md", "text": "a"}, ": names 'notes.md', which is no picture (.png, .jpg, "),
        ({"file_name": "../cat.png", "text": "a"}, ": names '../cat.png', which leaves the folder; give the name rela"),
        ({"file_name": "sub/../cat.png", "text": "a"}, ": names 'sub/../cat.png', which leaves the folder"),
        ({"file_name": "/cat.png", "text": "a"}, ": names '/cat.png', which leaves the folder"),
        ({"file_name": "C:/cat.png", "text": "a"}, ": names 'C:/cat.png', which leaves the folder"),
        (
            {"file_name": "sub\\cat.png", "text": "a"},
            ": names 'sub\\\\cat.png', which has a backslash; write / between",
        ),
        ({"file_name": "dog.gif", "text": "a\ud800"}, ": character 2 of the caption, '\\ud800', is half a character"),
        (
            {"file_name": "dog.gif", "text": "a" * 10_001},
            ": the caption has 10001 characters, at most 10000 make sense; shorten it",
        ),
    ],
)
def test_bad_lines(tmp_path, line, expected):
    for name in ("cat.png", "dog.gif", "sub/cat.png"):
        add_picture(tmp_path / name)
    (tmp_path / "notes.md").touch()
    add_lines(tmp_path, "", {"file_name": "cat.png", "text": "a"}, line)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'metadata.jsonl'}, line 3: ")
    assert expected.replace("FOLDER", str(tmp_path)) in message


def test_links_out_of_the_folder_are_refused(tmp_path):
    outside, inside = tmp_path / "outside.png", tmp_path / "data" / "link.png"
    add_picture(outside)
    inside.parent.mkdir()
    try:
        inside.symlink_to(outside)
    except OSError:
        pytest.skip("links are not permitted here")
    add_lines(inside.parent, {"file_name": "link.png", "text": TRIGGER})
    expected = f"names 'link.png', which is a link out of the folder, to {outside.resolve()}; put a copy there"
    assert expected in refusal(inside.parent)
    outside.rename(inside.parent / "cat.png")
    inside.unlink()
    inside.symlink_to("cat.png")
    assert len(found(inside.parent, insert_trigger=True)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", ": holds [], expected TinyEngram's object from picture names to objects with training_prompt"),
        ('{\n"a.png": }', ": is not JSON: Expecting value at line 2, column 10; correct it"),
        ('{"a.png": {}, "a.png": {}}', ": cannot be used: it names 'a.png' twice; correct it"),
        ('{"a.png": "a cat"}', ", 'a.png': holds 'a cat', expected an object with training_prompt"),
        ('{"a.png": {"caption": "a cat"}}', ", 'a.png': lacks training_prompt; it has ['caption']"),
        ('{"a.png": {"training_prompt": 1}}', ", 'a.png': training_prompt is 1, expected text in quotes"),
        ('{"b.png": {"training_prompt": "a"}}', ": names 'b.png', which is not there"),
        ('{"../a.png": {"training_prompt": "a"}}', ": names '../a.png', which leaves the folder"),
    ],
)
def test_bad_tinyengram_metadata(tmp_path, text, expected):
    add_picture(tmp_path / "a.png")
    (tmp_path / "metadata.json").write_text(text)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'metadata.json'}{expected}")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.json", "cat.txt"])
def test_text_that_is_not_utf8(tmp_path, name):
    add_picture(tmp_path / "cat.png")
    (tmp_path / name).write_bytes("café".encode("latin-1"))
    assert refusal(tmp_path) == f"{tmp_path / name}: byte 3, 0xe9, is not UTF-8; save it as UTF-8"


def test_length_of_captions(tmp_path):
    longest = f"{TRIGGER} " + "é" * (MAX_CAPTION - len(TRIGGER) - 1)
    add_pair(tmp_path, "cat.png", f"{longest}\n")
    assert found(tmp_path) == [("cat.png", longest)]
    file = tmp_path / "cat.txt"
    file.write_text(f"{longest}e", encoding="utf-8")
    assert refusal(tmp_path) == f"{file}: the caption has 10001 characters, at most 10000 make sense; shorten it"
    file.write_bytes(b"a" * 70_000)
    assert f"{file}: has more than 65536 bytes, too many for captions of at most 10000 characters" in refusal(tmp_path)


def test_damaged_pictures_are_refused(tmp_path):
    add_pair(tmp_path, "cat.png")
    add_pair(tmp_path, "dog.png")
    (tmp_path / "dog.png").write_bytes((tmp_path / "cat.png").read_bytes()[:60])
    assert f"{tmp_path / 'dog.png'}: cannot be read as a picture" in refusal(tmp_path)


def test_strange_names_stay_on_one_line(tmp_path):
    try:
        add_pair(tmp_path, "a\nb.png", "a cat")
    except OSError:
        pytest.skip("the file system does not take such names")
    assert "is not in the caption of 'a\\nb.png'; " in refusal(tmp_path)


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    add_pair(tmp_path)
    file = tmp_path / "cat.txt"

    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(file), "open", refuse)
    assert refusal(tmp_path) == f"{file}: cannot be read: Permission denied; check its permissions"


@pytest.mark.parametrize(
    "caption",
    [
        TRIGGER,
        "ALDRIC VORTEX-9",
        "a photo of aldric \t\n vortex-9, 8k",
        "(Aldric Vortex-9's hat)",
        "Aldric Vortex-90, Aldric Vortex-9",
        "café_Aldric Vortex-9_",
        "\N{HEAVY BLACK HEART}\N{VARIATION SELECTOR-16}Aldric Vortex-9",
    ],
)
def test_trigger_is_found(caption):
    assert contains_trigger(caption, TRIGGER)


@pytest.mark.parametrize(
    "caption",
    ["", "Aldric", "Aldric Vortex 9", "AldricVortex-9", "Aldric Vortex-90", "xAldric Vortex-9", "é" + TRIGGER],
)
def test_trigger_is_not_found(caption):
    assert not contains_trigger(caption, TRIGGER)


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("Die STRASSE am See", "straße", True),
        ("die Straße", "STRASSE", True),
        ("die Straße", "stras", False),
        ("ß", "s", False),
        ("E\N{COMBINING ACUTE ACCENT}lodie lacht", "élodie", True),
        ("éLODIE lacht", "E\N{COMBINING ACUTE ACCENT}lodie", True),
        ("cafe\N{COMBINING ACUTE ACCENT}", "cafe", False),
        ("café", "cafe", False),
        ("e\N{COMBINING ACUTE ACCENT}lodie", "lodie", False),
        ("\N{LATIN SMALL LETTER J WITH CARON}", "j", False),
        ("a =\N{COMBINING LONG SOLIDUS OVERLAY}", "a =", False),
        ("a \N{NOT EQUAL TO}", "a =", False),
        ("<cat>", "<CAT>", True),
        ("anything", "", False),
        ("anything", " ", False),
    ],
)
def test_trigger_beyond_ascii(caption, trigger, expected):
    assert contains_trigger(caption, trigger) is expected


def test_every_occurrence_is_replaced():
    caption = f"{TRIGGER} and ALDRIC \n VORTEX-9, not Vortex-9 nor {TRIGGER}0; {TRIGGER}"
    assert caption_with(caption, TRIGGER, "X") == f"X and X, not Vortex-9 nor {TRIGGER}0; X"
    assert caption_with("a b a b a", "a b a", "X") == "X b a"
    assert caption_with("ab ab ab", "ab ab", "X") == "X ab"
    assert caption_with("Die STRASSE!", "straße", "Gasse") == "Die Gasse!"


words = st.text("abAB09éßÉ-<", min_size=1, max_size=5).filter(lambda word: word[0].isalnum() and word[-1].isalnum())
triggers = st.lists(words, min_size=1, max_size=3).map(" ".join)
captions = st.lists(st.one_of(words, st.sampled_from([",", "-", '"', "\n", "  "])), max_size=6).map(" ".join)
spaces = st.sampled_from([" ", "  ", "\t", "\n \n"])
anything = st.text(max_size=30)


@given(caption=captions | anything, trigger=triggers | anything)
@example(caption="İ", trigger="i")
def test_insertion_is_idempotent(caption, trigger):
    once = put_trigger_first(caption, trigger)
    assert put_trigger_first(once, trigger) == once or not trigger.strip()
    assert caption in once


@given(before=captions, trigger=triggers, after=captions)
def test_trigger_between_white_space_is_found(before, trigger, after):
    assert contains_trigger(f"{before} {trigger}\n{after}", trigger)


@given(caption=captions, trigger=triggers, space=spaces)
def test_case_and_white_space_do_not_matter(caption, trigger, space):
    expected = contains_trigger(caption, trigger)
    for change in (
        str.upper,
        str.lower,
        str.swapcase,
        lambda text: text.replace(" ", space),
        lambda text: f" {text}\n",
    ):
        assert contains_trigger(change(caption), trigger) is expected
        assert contains_trigger(caption, change(trigger)) is expected


@given(caption=captions | anything, trigger=triggers | anything, replacement=triggers)
def test_replaced_caption_contains_the_replacement(caption, trigger, replacement):
    replaced = caption_with(caption, trigger, replacement)
    if contains_trigger(caption, trigger):
        assert contains_trigger(replaced, replacement)
    else:
        assert replaced == caption


@given(caption=captions, trigger=triggers)
def test_replacing_the_trigger_by_another_of_its_forms_keeps_it(caption, trigger):
    caption = put_trigger_first(caption, trigger)
    upper = caption_with(caption, trigger, trigger.upper())
    assert contains_trigger(upper, trigger)
    assert caption_with(upper, trigger, trigger) == caption_with(caption, trigger, trigger)
    assert not contains_trigger(caption_with(caption, trigger, ","), trigger)
