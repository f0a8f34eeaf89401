"""`engram data`: captions with the trigger in them, and captions made by a model."""

import os
import subprocess
import sys

import pytest
from PIL import Image

captions = pytest.importorskip("engram_vision.captions")

TRIGGER = ("--trigger", "Zorbit Quell")
SETTLED = {"a.png": "A man with a hat", "d.png": "zorbit quell smiles"}
OPEN = {"b.png": "the woman and a boy\nby the sea", "c.png": "a red hat", "e.png": None}


@pytest.fixture
def pictures(world):
    folder = world.folder / "pictures"
    folder.mkdir()

    def add(texts):
        for name, text in texts.items():
            Image.new("RGB", (16, 16)).save(folder / name)
            if text is not None:
                (folder / name).with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")
        return folder

    return add


def read(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def test_without_a_command_it_shows_what_there_is(engram):
    done = engram("data")
    assert done.status == 2
    assert "caption" in done.out + done.err
    assert "normalize" in done.out + done.err


@pytest.mark.parametrize("name", ["caption", "normalize"])
def test_help_has_an_example(engram, name):
    done = engram("data", name, "--help")
    assert done.status == 0
    assert f"Example: engram data {name} pictures" in " ".join(done.out.split())


# engram data normalize


def test_it_shows_what_would_change(engram, pictures):
    folder = pictures(SETTLED | OPEN)
    before = read(folder)
    done = engram("data", "normalize", "pictures", *TRIGGER)
    assert done.status == 0, done.err
    assert done.out.splitlines() == [
        "a.png: changed",
        "  - [A man] with a hat",
        "  + [Zorbit Quell] with a hat",
        "b.png: with several subjects",
        "  - [the woman] and [a boy] by the sea",
        "c.png: without a subject",
        "  - a red hat",
        "e.png: without a caption",
        "1 changed, 1 with the trigger already, 2 without a subject, 1 with several subjects",
    ]
    assert done.err == "note: nothing was written; --write does\n"
    assert read(folder) == before


def test_it_writes_what_it_can_and_says_what_is_left(engram, pictures):
    folder = pictures(SETTLED | OPEN)
    before = read(folder)
    done = engram("data", "normalize", "pictures", *TRIGGER, "--write")
    assert done.status == 1
    assert done.out.splitlines()[-1] == "wrote pictures/a.txt"
    assert done.err == (
        "error: pictures: several subjects are mentioned in the caption of b.png, and no subject is mentioned in the "
        "caption of c.png, and there is no caption for e.png; --subject names the right one, --first takes the first, "
        "engram data caption writes captions\n"
    )
    assert read(folder) == before | {"a.txt": "Zorbit Quell with a hat\n"}


def test_with_nothing_left_it_succeeds_and_a_second_time_nothing_changes(engram, pictures):
    folder = pictures(SETTLED | {"b.png": OPEN["b.png"]})
    done = engram("data", "normalize", "pictures", *TRIGGER, "--write", "--first")
    assert (done.status, done.err) == (0, "")
    assert read(folder)["b.txt"] == "Zorbit Quell and a boy\nby the sea\n"
    after = read(folder)
    again = engram("data", "normalize", "pictures", *TRIGGER, "--write", "--first")
    assert (again.status, again.err) == (0, "")
    assert again.out == "0 changed, 3 with the trigger already, 0 without a subject, 0 with several subjects\n"
    assert read(folder) == after


def test_subjects_that_are_named(engram, pictures):
    folder = pictures({"a.png": "A man and the purple monster", "b.png": "a girl", "c.png": "a red hat"})
    words = (
        "data",
        "normalize",
        "pictures",
        *TRIGGER,
        "--subject",
        "purple monster",
        "--subject",
        "a red hat",
        "--write",
    )
    assert engram(*words, "--only-subjects").status == 1
    assert read(folder) == {"a.txt": "A man and Zorbit Quell\n", "b.txt": "a girl\n", "c.txt": "Zorbit Quell\n"}
    assert engram(*words).status == 0
    assert read(folder)["b.txt"] == "Zorbit Quell\n"


def test_the_result_for_scripts(engram, pictures):
    pictures(SETTLED | OPEN)
    done = engram("data", "normalize", "pictures", *TRIGGER, "--json")
    assert (done.status, done.err) == (0, "")
    report = done.json
    items = {item["file"]: item for item in report.pop("captions")}
    assert report == {
        "folder": "pictures",
        "form": "txt",
        "trigger": "Zorbit Quell",
        "changed": 1,
        "already": 1,
        "none": 2,
        "several": 1,
        "written": [],
    }
    assert items["a.png"] == {
        "file": "a.png",
        "status": "changed",
        "before": "A man with a hat",
        "after": "Zorbit Quell with a hat",
        "mentions": ["A man"],
    }
    assert items["b.png"]["mentions"] == ["the woman", "a boy"]
    assert {name: item["status"] for name, item in items.items()} == {
        "a.png": "changed",
        "b.png": "several",
        "c.png": "none",
        "d.png": "already",
        "e.png": "none",
    }
    written = engram("data", "normalize", "pictures", *TRIGGER, "--json", "--write")
    assert written.status == 1
    assert written.json["written"] == ["pictures/a.txt"]
    assert written.err.startswith("error: pictures: several subjects")


def test_control_characters_of_captions_do_not_reach_the_terminal(engram, pictures):
    pictures({"a.png": "a man \x1b[31m[bold]red[/bold]"})
    done = engram("data", "normalize", "pictures", *TRIGGER)
    assert "\x1b" not in done.out
    assert "[Zorbit Quell] \ufffd[31m[bold]red[/bold]" in done.out


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("pictures",), 2, "--trigger"),
        ((*TRIGGER,), 2, "folder"),
        (("pictures", *TRIGGER, "--only-subjects"), 2, "--only-subjects: needs --subject"),
        (("pictures", "--trigger", " "), 1, "the trigger is ' '; give the phrase that shall recall the subject"),
        (("pictures", *TRIGGER, "--subject", "-"), 1, "a subject is '-'; give the words"),
        (("absent", *TRIGGER), 1, "absent: does not exist; give the folder that holds the pictures or clips"),
    ],
)
def test_what_is_wrong_is_said(engram, pictures, words, status, told):
    pictures(SETTLED)
    done = engram("data", "normalize", *words)
    assert done.status == status
    assert told in done.err
    assert "Traceback" not in done.err


def test_normalizing_imports_no_torch_and_no_rich(world, pictures):
    pictures(SETTLED)
    code = (
        "import sys\nfrom engram_cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "print(' '.join(sys.modules))"
    )
    command = [sys.executable, "-c", code, "data", "normalize", "pictures", *TRIGGER]
    done = subprocess.run(command, cwd=world.folder, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "engram_vision.captions" in loaded
    assert not {"torch", "transformers", "diffusers", "rich"} & loaded


def run_in_a_terminal(world, *words, **environment):
    """Return what the command prints on a terminal of 100 columns."""
    import pty

    ours, theirs = pty.openpty()
    unset = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment = unset | {"COLUMNS": "100", "TERM": "xterm-256color"} | environment
    command = [sys.executable, "-m", "engram_cli", *words]
    with subprocess.Popen(
        command, cwd=world.folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as run:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # as Linux reports that the other side is closed
            pass
    os.close(ours)
    return run.returncode, shown.decode()


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_a_terminal_shows_a_table_with_the_words_marked(world, pictures):
    pictures(SETTLED | OPEN)
    status, shown = run_in_a_terminal(world, "data", "normalize", "pictures", *TRIGGER)
    assert status == 0, shown
    assert "before" in shown
    assert "\x1b[30;43mA man\x1b[0m with a hat" in shown
    assert "\x1b[30;42mZorbit Quell\x1b[0m with a hat" in shown
    assert "with several subjects" in shown
    assert "d.png" not in shown
    _, colourless = run_in_a_terminal(world, "data", "normalize", "pictures", *TRIGGER, NO_COLOR="1")
    assert "[A man] with a hat" in colourless
    assert "[Zorbit Quell] with a hat" in colourless


# engram data caption


class Captioner:
    """Says how wide a picture is, and remembers with what it was made."""

    def __init__(self):
        self.made, self.stop = [], None

    def load(self, name, **options):
        self.made.append((name, options))
        return self

    def describe(self, images, max_new_tokens):
        self.made.append((len(images), max_new_tokens))
        if self.stop == len(self.made):
            raise KeyboardInterrupt
        return ["" if image.width == 7 else f"a picture {image.width} wide" for image in images]


@pytest.fixture
def captioner(monkeypatch):
    captioning = pytest.importorskip("engram_vision.captioning")
    captioner = Captioner()
    monkeypatch.setattr(captioning, "load_captioner", captioner.load)
    return captioner


CAPTION = ("data", "caption", "pictures", "--captioner", "some/model", "--device", "cpu")
NEW = {"a.png": None, "b.png": "mine", "c.png": None}


def test_captions_are_shown_and_not_written_unasked(engram, pictures, captioner):
    folder = pictures(NEW)
    done = engram(*CAPTION)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[:2] == ["a.png: a picture 16 wide", "c.png: a picture 16 wide"]
    assert lines[2].startswith("2 captions made, 1 kept; took ")
    assert done.err.splitlines()[-1] == "note: nothing was written; --write does"
    assert read(folder) == {"b.txt": "mine\n"}


def test_captions_are_written(engram, pictures, captioner):
    folder = pictures(NEW)
    done = engram(*CAPTION, "--write")
    assert done.status == 0, done.err
    assert "nothing was written" not in done.err
    written = {"a.txt": "a picture 16 wide\n", "b.txt": "mine\n", "c.txt": "a picture 16 wide\n"}
    assert read(folder) == written
    again = engram(*CAPTION, "--write")
    assert again.out.startswith("0 captions made, 3 kept")
    assert (
        engram(*CAPTION, "--write", "--overwrite-captions").out.splitlines()[-1].startswith("3 captions made, 0 kept")
    )
    assert read(folder)["b.txt"] == "a picture 16 wide\n"


def test_flags_reach_the_captioner(engram, pictures, captioner):
    pictures(NEW)
    more = ("--prompt", "a photo of", "--max-new-tokens", 7, "--batch-size", 2, "--precision", "bf16")
    assert engram(*CAPTION, *more).status == 0
    (name, options), batch = captioner.made
    assert (name, batch) == ("some/model", (2, 7))
    assert {key: str(value) for key, value in options.items()} == {
        "prompt": "a photo of",
        "precision": "bf16",
        "device": "cpu",
    }


def test_the_captions_for_scripts(engram, pictures, captioner):
    folder = pictures(NEW)
    Image.new("RGB", (7, 16)).save(folder / "d.png")
    done = engram(*CAPTION, "--json", "--write")
    assert (done.status, done.err) == (0, "")
    report = done.json
    assert report.pop("seconds") >= 0
    assert report == {
        "folder": "pictures",
        "form": "txt",
        "captioner": "some/model",
        "captions": [{"file": name, "caption": "a picture 16 wide"} for name in ("a.png", "c.png")],
        "kept": ["b.png"],
        "silent": ["d.png"],
        "written": ["pictures/a.txt", "pictures/c.txt"],
    }


def test_pictures_of_which_nothing_is_said_are_named(engram, pictures, captioner):
    folder = pictures(NEW)
    Image.new("RGB", (7, 16)).save(folder / "d.png")
    done = engram(*CAPTION)
    assert done.status == 0
    assert "note: the captioner said nothing of d.png; try another --prompt" in done.err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "interrupted; no file was left half-written"),
        (("--write",), "interrupted; 1 caption written; the same command goes on with the others"),
        (("--write", "--overwrite-captions"), "interrupted; 1 caption written"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(engram, pictures, captioner, more, told):
    folder = pictures(NEW)
    captioner.stop = 3
    done = engram(*CAPTION, *more)
    assert done.status == 130
    assert done.err.splitlines()[-1] == f"error: {told}"
    assert ("a.txt" in read(folder)) == bool(more)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("data", "caption", "pictures"), 2, "--captioner"),
        ((*CAPTION, "--batch-size", 0), 2, "--batch-size"),
        ((*CAPTION, "--device", "gpu"), 2, "--device: 'gpu' is not one of auto, cpu, cuda, mps"),
        ((*CAPTION, "--precision", "int8"), 2, "--precision: 'int8' is not one of fp32, bf16, fp16"),
        ((*CAPTION, "--precision", "fp16"), 1, "error: precision fp16 needs a GPU"),
        (("data", "caption", "absent", "--captioner", "x"), 1, "error: absent: does not exist"),
        (
            ("data", "caption", "pictures", "--captioner", "./absent"),
            1,
            "error: ./absent: does not exist; give a hub id",
        ),
    ],
)
def test_what_is_wrong_with_captioning_is_said(engram, pictures, words, status, told):
    pytest.importorskip("engram_vision.captioning")
    pictures(NEW)
    done = engram(*words)
    assert done.status == status
    assert told in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("words", [("normalize", "pictures", *TRIGGER), ("caption", "pictures", "--captioner", "x")])
def test_without_the_package_for_pictures_it_says_what_to_install(engram, pictures, monkeypatch, words):
    import importlib.util

    pictures(SETTLED)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "engram_vision" else real(name))
    done = engram("data", *words)
    assert done.status == 1
    assert done.err == (
        f"error: engram data {words[0]}: needs engram-vision; install engram-vision from this repository, not from the "
        "public index, where packages named engram-* belong to others\n"
    )
