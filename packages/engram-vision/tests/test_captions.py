"""Captions read and written back in their form, and the trigger in the place of "a man" and the like."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from engram_core import InputError
from engram_vision.caption_files import CLIP_SUFFIXES, CaptionFolder
from engram_vision.caption_stores import MAX_CAPTION
from engram_vision.captions import SUBJECTS, find_mentions, normalize_caption, normalize_folder
from engram_vision.dataset import contains_trigger, read_dataset

TRIGGER = "Zorbit Quell"
FORMS = ["metadata.jsonl", "metadata.json", "txt"]


def add_media(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in CLIP_SUFFIXES:
            path.write_bytes(b"a clip, which nothing here opens")
        else:
            Image.new("RGB", (8, 8), (255, 0, 0)).save(path)


def add_captions(folder, form, captions):
    if form == "metadata.jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
        (folder / form).write_bytes("\n".join(lines).encode())
    elif form == "metadata.json":
        (folder / form).write_bytes(
            json.dumps({name: {"training_prompt": text} for name, text in captions.items()}).encode()
        )
    else:
        for name, text in captions.items():
            (folder / name).with_suffix(".txt").write_bytes(text.encode())


def build(folder, form, captions, *more):
    add_media(folder, *captions, *more)
    add_captions(folder, form, captions)
    return folder


def refusal(action, *arguments, **options):
    with pytest.raises(InputError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable()
    return message


# What counts as a mention


def mentioned(caption, *subjects, **options):
    return [caption[start:stop] for start, stop in find_mentions(caption, subjects, **options)]


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("a man with a hat", ["a man"]),
        ("A Man, smiling", ["A Man"]),
        ("photo of the\n  woman's hat", ["the\n  woman"]),
        ("an individual at sea", ["an individual"]),
        ("this creature sleeps", ["this creature"]),
        ("someone runs", ["someone"]),
        ("a human being", ["a human being"]),
        ("a cartoon character", ["a cartoon character"]),
        ("(a boy) and 'the girl'", ["a boy", "the girl"]),
        ("a man and a woman", ["a man", "a woman"]),
        ("the man, then the man", ["the man", "the man"]),
        ("a man - tall", ["a man"]),
        # parts of words
        ("a mandolin, the manor, panda man", []),
        ("a man-eating plant", []),
        ("half-a man", []),
        ("a man_1", []),
        ("a man\u0301, e\u0301a man", []),
        ("a men", []),
        ("two men, women, a person5", []),
        # a description of something else
        ("a monster truck", []),
        ("a character  Sheet of the monster", ["the monster"]),
        ("someone else", []),
        ("a figure skater", []),
        # words between article and noun, and nouns that are too special
        ("a young man", []),
        ("a dog, a robot, a human hand", []),
        ("man with a hat", []),
        ("", []),
    ],
)
def test_mentions(caption, found):
    assert mentioned(caption) == found


def test_every_built_in_mention_is_found_whatever_its_case():
    assert len(set(SUBJECTS)) == len(SUBJECTS)
    for subject in SUBJECTS:
        for text in (subject, subject.upper(), subject.title()):
            assert mentioned(f"in the snow {text}, smiling") == [text]


def test_named_subjects_come_first_and_others_only_without_them():
    caption = "A man holds a purple monster"
    assert mentioned(caption) == ["A man"]
    assert mentioned(caption, "a purple monster") == ["a purple monster"]
    assert mentioned("A man sleeps", "a purple monster") == ["A man"]
    assert mentioned("A man sleeps", "a purple monster", only_subjects=True) == []
    assert mentioned(caption, "a purple monster", "a man") == ["A man", "a purple monster"]


def test_a_subject_without_article_takes_one_along():
    for article in ("a ", "The ", "this  ", ""):
        assert mentioned(f"in bed {article}purple monster", "purple monster") == [f"{article}purple monster"]
    assert mentioned("Lana purple monster", "purple monster") == ["purple monster"]
    assert mentioned("the purple monster", "a purple monster") == []
    assert mentioned("an old man and the old man", "old man", "man") == ["an old man", "the old man"]


def test_a_named_subject_may_describe_and_have_accents():
    assert mentioned("a monster truck", "a monster") == ["a monster"]
    for caption in ("un gar\u00e7on rit", "un garc\u0327on rit"):
        for subject in ("un gar\u00e7on", "un garc\u0327on"):
            assert mentioned(caption, subject) == [caption[:-4]]


def test_bad_subjects_and_triggers_are_refused():
    assert refusal(find_mentions, "a man", ["a man", "?!"]) == (
        "a subject is '?!'; give the words that captions call it, e.g. 'a man'"
    )
    assert "none is named" in refusal(find_mentions, "a man", only_subjects=True)
    assert refusal(normalize_caption, "a man", " \n").startswith("the trigger is ' \\n'; give the phrase")


# What becomes of a caption


@pytest.mark.parametrize(
    ("caption", "status", "after"),
    [
        ("A man with a hat", "changed", "Zorbit Quell with a hat"),
        ("Snow. the woman's hat", "changed", "Snow. Zorbit Quell's hat"),
        ("a red hat", "none", None),
        ("", "none", None),
        ("a man and a woman", "several", None),
        ("a man and ZORBIT  quell", "already", None),
        ("a man and {trigger}", "already", None),
    ],
)
def test_a_caption(caption, status, after):
    done = normalize_caption(caption, TRIGGER)
    assert (done.before, done.status, done.after) == (caption, status, caption if after is None else after)
    assert (done.inserted is not None) == (status == "changed")
    if done.inserted:
        assert done.after[slice(*done.inserted)] == TRIGGER


def test_the_first_of_several_on_request():
    done = normalize_caption("in snow a man and a woman", TRIGGER, first=True)
    assert (done.status, done.after) == ("changed", "in snow Zorbit Quell and a woman")
    assert [done.before[start:stop] for start, stop in done.mentions] == ["a man", "a woman"]
    assert done.after[slice(*done.inserted)] == TRIGGER


def test_the_trigger_is_put_in_as_training_reads_it():
    assert normalize_caption("a man", "  Zorbit \n Quell ").after == TRIGGER


words = st.sampled_from(
    [
        *("a man", "The Woman", "a", "an", "the", "man", "monster", "truck", "zorbit quell", "Zorbit"),
        *("a purple monster", "purple monster", "hat", "é", "e\u0301", "\u0301", "{trigger}", "someone", "else", "x"),
    ]
)
captions = st.lists(
    st.one_of(words, st.sampled_from([" ", ", ", "-", "\n", "'s ", "_", "  ", "("]), st.text(max_size=3)), max_size=12
).map("".join)
options = st.fixed_dictionaries(
    {"first": st.booleans(), "subjects": st.sampled_from([(), ("purple monster",), ("x",)])}
)
triggers = st.one_of(st.just(TRIGGER), st.text(min_size=1, max_size=5).filter(str.strip))


@given(captions, triggers, options)
@example("a man", "ß", {"first": False, "subjects": ()})
@example("e\u0301a man", TRIGGER, {"first": False, "subjects": ()})
@example("x", "\u0301", {"first": False, "subjects": ("x",)})
def test_what_is_outside_of_the_mention_stays_and_a_second_time_nothing_changes(caption, trigger, options):
    once = normalize_caption(caption, trigger, **options)
    phrase = " ".join(trigger.split())
    if once.status == "changed":
        start, stop = once.mentions[0]
        assert once.after == caption[:start] + phrase + caption[stop:]
        assert contains_trigger(once.after, trigger)
        assert not contains_trigger(caption, trigger)
        assert len(once.mentions) == 1 or options["first"]
    else:
        assert once.after == caption
    again = normalize_caption(once.after, trigger, **options)
    assert again.after == once.after
    assert again.status == ("already" if once.status == "changed" else once.status)


@given(captions)
def test_mentions_do_not_overlap_and_are_in_order(caption):
    places = [0, *(place for mention in find_mentions(caption, ["monster"]) for place in mention)]
    assert places == sorted(places)


# What is read of files


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read(tmp_path, form):
    build(tmp_path, form, {"b.png": " a man\n", "a.JPG": "a cat", "c.mp4": ""}, "d.webp")
    place = CaptionFolder(tmp_path)
    assert place.form == form
    assert place.captions == {"b.png": "a man", "a.JPG": "a cat", "c.mp4": "", "d.webp": ""}
    expected = ["a.JPG", "b.png", "c.mp4", "d.webp"] if form == "txt" else ["b.png", "a.JPG", "c.mp4", "d.webp"]
    assert list(place.captions) == expected
    assert place.locate("b.png").is_file()


def test_pictures_without_captions(tmp_path):
    add_media(tmp_path, "b.png", "a.png")
    (tmp_path / "notes.md").write_text("no caption")
    place = CaptionFolder(tmp_path)
    assert (place.form, place.captions) == ("txt", {"a.png": "", "b.png": ""})


def test_what_is_read_is_what_training_reads(tmp_path):
    for form in FORMS:
        folder = tmp_path / form.replace(".", "_")
        folder.mkdir()
        build(folder, form, {"b.png": f"\u2028{TRIGGER}\tsmiles ", "a.png": f'{TRIGGER} \\ "at" sea'})
        trained = {image.path.name: image.caption for image in read_dataset(folder, TRIGGER)}
        assert CaptionFolder(folder).captions == trained


@pytest.mark.parametrize("given_folder", ["", "preprocessed"])
def test_tinyengram_with_preprocessed_pictures(tmp_path, given_folder):
    add_media(tmp_path, "raw.png", "preprocessed/a.png")
    add_captions(tmp_path, "metadata.json", {"a.png": "a man"})
    notes = []
    report = normalize_folder(tmp_path / given_folder, TRIGGER, write=True, note=notes.append)
    assert list(report.captions) == ["a.png"]
    assert [path.resolve() for path in report.written] == [(tmp_path / "metadata.json").resolve()]
    assert json.loads((tmp_path / "metadata.json").read_text()) == {"a.png": {"training_prompt": TRIGGER}}
    told = f"{tmp_path}: the pictures or clips in preprocessed are used, as in TinyEngram, and no others"
    assert notes == ([] if given_folder else [told])


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "is empty"),
        ({"notes.md": ""}, "holds no pictures"),
        ({"a.txt": "a man"}, "a.txt: there is no picture or clip for this caption"),
        (
            {"a.png": None, "a.mp4": b"", "a.txt": "a man"},
            "a.txt: is the caption of several pictures or clips, a.mp4, a.png",
        ),
        ({"a.png": None, "a.txt": "a man", "a.TXT": "a man"}, "is a second caption of a.png"),
        ({"a.png": None, "a.txt": b"\xff"}, "a.txt: byte 0, 0xff, is not UTF-8"),
        ({"a.png": None, "a.txt": "x" * (MAX_CAPTION + 1)}, f"the caption has {MAX_CAPTION + 1} characters"),
        ({"a.png": None, "a.txt": "x" * 70000}, "has more than 65536 bytes"),
        ({"a.png": None, "metadata.jsonl": "", "a.txt": "a man"}, "has captions of several kinds"),
        ({"a.png": None, "metadata.jsonl": "", "metadata.json": "{}"}, "has captions of several kinds"),
        ({"metadata.jsonl": '\n{"file_name": 1'}, "metadata.jsonl, line 2: is not JSON"),
        ({"metadata.jsonl": "[]"}, "line 1: holds [], expected an object with file_name and text"),
        ({"metadata.jsonl": '{"file_name": "a.png"}'}, "line 1: lacks text; it has ['file_name']"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": 1}'}, "line 1: text is 1, expected text in quotes"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": ""}'}, "names 'a.png', which is not there"),
        ({"metadata.jsonl": '{"file_name": "../a.png", "text": ""}'}, "names '../a.png', which leaves the folder"),
        ({"metadata.jsonl": '{"file_name": "a\\\\b.png", "text": ""}'}, "has a backslash"),
        ({"b.md": "", "metadata.jsonl": '{"file_name": "b.md", "text": ""}'}, "which is no picture or clip"),
        ({"metadata.jsonl": '{"file_name": "a.png", "file_name": "b.png"}'}, "it names 'file_name' twice"),
        (
            {"a.png": None, "metadata.jsonl": '{"file_name":"a.png","text":""}\n' * 2},
            "line 2: names 'a.png' a second time",
        ),
        ({"a.png": None, "metadata.jsonl": '{"file_name":"a.png","text":"\\ud800"}'}, "is half a character"),
        ({"metadata.json": "[]"}, "metadata.json: holds [], expected TinyEngram's object"),
        ({"metadata.json": '{"a.png": 1}'}, "metadata.json, 'a.png': holds 1, expected an object with training_prompt"),
        ({"a.png": None, "metadata.json": '{"a.png": {"x": 1}}'}, "lacks training_prompt; it has ['x']"),
        ({"metadata.json": "[" * 100000}, "it nests too deeply"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, files, told):
    for name, content in files.items():
        if content is None:
            add_media(tmp_path, name)
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(CaptionFolder, tmp_path)
    assert told in message
    assert str(tmp_path) in message


def test_a_folder_that_is_none_is_refused(tmp_path):
    assert "does not exist" in refusal(CaptionFolder, tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(CaptionFolder, tmp_path / "file")


# What is written to files


def everything(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_nothing_but_captions_changes_in_json_lines(tmp_path):
    add_media(tmp_path, "b.png", "sub/a.png")
    file = tmp_path / "metadata.jsonl"
    before = (
        '\ufeff{"n": 1.0, "file_name" :"b.png" ,"text": " A man \\u00e9 ", "deep": {"text": "a man"}, "big": 1e5}\r\n'
        '\r\n {"text":"the\\nwoman","file_name": "./sub/a.png"}'
    )
    file.write_bytes(before.encode())
    assert normalize_folder(tmp_path, TRIGGER, write=True).written == (file,)
    after = before.replace("A man", TRIGGER).replace("the\\nwoman", TRIGGER)
    assert file.read_bytes() == after.encode()
    assert normalize_folder(tmp_path, TRIGGER, write=True).written == ()


def test_nothing_but_captions_changes_in_tinyengrams_metadata(tmp_path):
    add_media(tmp_path, "a.png", "b.png")
    file = tmp_path / "metadata.json"
    before = '{\n\t"b.png": {"seed": 1.50, "training_prompt": "a man"},\n\t"a.png": {"training_prompt" : "a hat"}\n}\n'
    file.write_text(before)
    normalize_folder(tmp_path, TRIGGER, write=True)
    assert file.read_text() == before.replace("a man", TRIGGER)


def test_nothing_but_captions_changes_in_sidecars(tmp_path):
    add_media(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbf A man\r\nat sea\r\n")
    (tmp_path / "b.txt").write_bytes(b"a hat\n")
    before = everything(tmp_path)
    assert normalize_folder(tmp_path, TRIGGER, write=True).written == (tmp_path / "a.TXT",)
    assert everything(tmp_path) == before | {"a.TXT": b"\xef\xbb\xbf Zorbit Quell\r\nat sea\r\n"}


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_written_unasked(tmp_path, form):
    build(tmp_path, form, {"a.png": "a man"})
    before = everything(tmp_path)
    report = normalize_folder(tmp_path, TRIGGER)
    assert report.captions["a.png"].after == TRIGGER
    assert report.written == ()
    assert everything(tmp_path) == before


def test_the_report_sorts_by_what_became_of_captions(tmp_path):
    build(tmp_path, "txt", {"a.png": "a man", "b.png": "a man, a boy", "c.png": TRIGGER, "d.png": "a hat"}, "e.png")
    report = normalize_folder(tmp_path, TRIGGER, write=True)
    names = {status: report.names(status) for status in ("changed", "several", "already", "none")}
    assert names == {"changed": ["a.png"], "several": ["b.png"], "already": ["c.png"], "none": ["d.png", "e.png"]}


# A mark at the beginning of a file is none of its text.
characters = st.characters(codec="utf-8", exclude_characters="\ufeff")
texts = st.text(characters, max_size=20).map(str.strip)


@given(
    st.sampled_from(FORMS), st.lists(texts, min_size=3, max_size=3), st.lists(st.none() | texts, min_size=4, max_size=4)
)
def test_what_is_written_is_read_again_in_the_same_form(tmp_path_factory, form, old, new):
    folder = tmp_path_factory.mktemp("captions")
    build(folder, form, dict(zip(["c.png", "a.png", "b.webp"], old, strict=True)), "d.png")
    place = CaptionFolder(folder, incomplete=True)
    before = place.captions
    changes = {name: text for name, text in zip(before, new, strict=True) if text is not None}
    written = place.write(changes)
    assert place.captions == before | changes
    again = CaptionFolder(folder, incomplete=True)
    assert again.form == form
    assert again.captions == before | changes
    assert [name for name in again.captions if before[name]] == [name for name in before if before[name]]
    assert bool(written) == (before | changes != before)
    assert place.write(changes) == []


@given(st.sampled_from(FORMS), texts.filter(bool), texts, texts.filter(bool))
def test_writing_back_what_was_read_restores_every_byte(tmp_path_factory, form, old, beside, other):
    folder = tmp_path_factory.mktemp("captions")
    build(folder, form, {"a.png": f" {old}\n", "b.png": beside})
    before = everything(folder)
    place = CaptionFolder(folder)
    captions = place.captions
    assert place.write(captions) == []
    place.write({"a.png": other})
    assert (everything(folder) == before) == (other == old)
    place.write(captions)
    assert everything(folder) == before


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("{}", '{"b.png": {"training_prompt": "new"}}'),
        ('{"a.png": {}}', '{"a.png": {"training_prompt": "other"}, "b.png": {"training_prompt": "new"}}'),
        (
            '{"a.png": {"k": [1.0]}}\n',
            '{"a.png": {"k": [1.0], "training_prompt": "other"}, "b.png": {"training_prompt": "new"}}\n',
        ),
        (
            '{\n  "a.png": {\n    "training_prompt": null\n  }\n}',
            '{\n  "a.png": {\n    "training_prompt": "other"\n  },\n  "b.png": {\n    "training_prompt": "new"\n  }\n}',
        ),
    ],
)
def test_entries_are_added_to_tinyengrams_metadata(tmp_path, before, after):
    add_media(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.json").write_text(before)
    place = CaptionFolder(tmp_path, incomplete=True)
    place.write({"b.png": "new"})
    if before != "{}":
        place.write({"a.png": "other"})
    assert (tmp_path / "metadata.json").read_text() == after
    assert CaptionFolder(tmp_path, incomplete=True).captions == place.captions


def test_lines_are_added_to_json_lines(tmp_path):
    add_media(tmp_path, "a.png", "b.png", "ü.png")
    file = tmp_path / "metadata.jsonl"
    file.write_bytes(b'{"file_name": "a.png"}\r\n{"file_name": "b.png", "text": null, "x": 1}')
    place = CaptionFolder(tmp_path, incomplete=True)
    place.write({"ü.png": "first"})
    place.write({"b.png": "second", "a.png": "third", "ü.png": "again"})
    assert file.read_bytes().decode() == (
        '{"file_name": "a.png", "text": "third"}\r\n{"file_name": "b.png", "text": "second", "x": 1}\r\n'
        '{"file_name": "ü.png", "text": "again"}\r\n'
    )


def test_a_new_caption_is_a_sidecar_of_its_own(tmp_path):
    add_media(tmp_path, "a.b.png", "c.mp4")
    written = CaptionFolder(tmp_path, incomplete=True).write({"a.b.png": "a cat", "c.mp4": "a dog"})
    assert written == [tmp_path / "a.b.txt", tmp_path / "c.txt"]
    assert [path.read_bytes() for path in written] == [b"a cat\n", b"a dog\n"]


def test_pictures_that_would_share_a_sidecar_are_refused(tmp_path):
    add_media(tmp_path, "a.png", "a.jpg")
    assert CaptionFolder(tmp_path).captions == {"a.jpg": "", "a.png": ""}
    message = refusal(CaptionFolder, tmp_path, incomplete=True)
    assert message == f"{tmp_path}: a.jpg, a.png would share the caption file a.txt; rename all but one"


@pytest.mark.parametrize("form", FORMS)
def test_what_others_wrote_meanwhile_is_not_lost(tmp_path, form):
    build(tmp_path, form, {"a.png": "a man"}, "b.png")
    place = CaptionFolder(tmp_path, incomplete=True)
    add_captions(tmp_path, form, {"a.png": "mine", "b.png": "mine"})
    theirs = everything(tmp_path)
    for name in ("a.png", "b.png"):
        assert "was changed by something else meanwhile; run the command again" in refusal(place.write, {name: "new"})
    assert everything(tmp_path) == theirs
    assert place.captions == {"a.png": "a man", "b.png": ""}


def test_a_caption_file_that_became_a_folder_is_told_on_one_line(tmp_path):
    build(tmp_path, "txt", {"a.png": "a man"})
    place = CaptionFolder(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").mkdir()
    assert refusal(place.write, {"a.png": "x"}) == f"{tmp_path / 'a.txt'}: cannot be read: Is a directory; check it"


def test_captions_unfit_for_training_are_not_written(tmp_path):
    build(tmp_path, "txt", {"a.png": "a man"})
    place, before = CaptionFolder(tmp_path), everything(tmp_path)
    assert f"the caption has {MAX_CAPTION + 1} characters" in refusal(place.write, {"a.png": "x" * (MAX_CAPTION + 1)})
    assert "is half a character" in refusal(place.write, {"a.png": "\ud800"})
    assert "holds no 'b.png'" in refusal(place.write, {"b.png": "x"})
    assert everything(tmp_path) == before


def test_the_names_of_clips_are_those_of_the_video_package():
    containers = pytest.importorskip("engram_video.containers", exc_type=ImportError)
    assert {*CLIP_SUFFIXES, ".gif"} == set(containers.SUFFIXES)
