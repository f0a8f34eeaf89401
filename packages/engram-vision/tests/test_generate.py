"""Generation writes what was asked for, says in each file how it was made, and refuses early what cannot be."""

import hashlib
import json

import pytest
from PIL import Image
from vision_builders import LOUD, TRIGGER, Log, copy_of, generate_settings, make_adapter, make_concept

from engram_core import (
    AdapterReadError,
    AdapterWriteError,
    ConflictError,
    IncompatibleAdaptersError,
    InputError,
    TargetExistsError,
    open_adapter,
)
from engram_vision import loading
from engram_vision.drawing import Drawing, draw
from engram_vision.generation import generate
from engram_vision.loading import load_engram

OTHER = "mira voss"


@pytest.fixture
def files(base, tmp_path):
    """Return the files of two adapters that do not contradict each other."""
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    make_adapter(base).save(paths[0])
    make_adapter(base, make_concept(base, OTHER, seed=1), make_concept(base, "red ball", seed=2)).save(paths[1])
    return [str(path) for path in paths]


@pytest.fixture
def run(tmp_path, model):
    """Return a function that generates with changes to small settings."""

    def start(log=None, *, overwrite=False, **values):
        return generate(generate_settings(tmp_path, model, **values), overwrite=overwrite, watcher=log)

    return start


def facts(path):
    with Image.open(path) as image:
        return dict(image.text)


def pixels(path):
    with Image.open(path) as image:
        return image.tobytes()


def names(report):
    return [file.path.name for file in report.files]


# Files


def test_each_prompt_is_drawn_with_each_seed(run, tmp_path):
    prompts = (f"{TRIGGER} in the snow", "“A Red, ball!”", "", "x" * 200)
    report = run(prompts=prompts, seeds=(3, 5))
    slugs = ["zorbit-quell-in-the-snow", "a-red-ball", "prompt", "x" * 48]
    expected = [f"{2 * n + k:03d}-{slug}-{seed}.png" for n, slug in enumerate(slugs) for k, seed in enumerate((3, 5))]
    assert names(report) == expected
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == expected
    assert [(file.prompt, file.seed) for file in report.files] == [(p, s) for p in prompts for s in (3, 5)]
    assert report.grid is None
    assert report.seconds > 0
    assert len({pixels(file.path) for file in report.files}) == 8


def test_without_adapters_the_base_model_is_drawn(run, base):
    report = run(prompts=("a red ball",), negative="snow")
    (file,) = report.files
    (expected,) = draw(base, [Drawing(prompt="a red ball", seed=0)], steps=2, guidance=3.0, negative="snow")
    assert pixels(file.path) == expected.tobytes()
    assert file.identity is None
    assert facts(file.path)["engrams"] == "[]"


def test_the_same_seed_draws_the_same_file(run, files):
    report = run(adapters=(files[0],))
    before = report.files[0].path.read_bytes()
    run(adapters=(files[0],), overwrite=True)
    assert report.files[0].path.read_bytes() == before


def test_a_file_says_how_it_was_made(run, files, model):
    prompt = f"„{TRIGGER}“ — 日本"
    (file,) = run(adapters=(files[0],), prompts=(prompt,), seeds=(7,), negative="snow").files
    adapter = open_adapter(files[0])
    engrams = [{"file": "one.safetensors", "identity": adapter.identity(), "strengths": {TRIGGER: 1.0}}]
    found = facts(file.path)
    assert json.loads(found.pop("engrams")) == engrams
    assert found == {
        "prompt": prompt,
        "negative_prompt": "snow",
        "seed": "7",
        "model": str(model),
        "steps": "2",
        "guidance": "3.0",
    }
    assert file.identity == adapter.identity()


# Adapters and strengths


def drawn(base, prompt, *loads):
    """Return what the pipeline itself draws with some adapters."""
    pipeline = copy_of(base)
    for source, options in loads:
        load_engram(pipeline, source, **options)
    return draw(pipeline, [Drawing(prompt=prompt, seed=0)], steps=2, guidance=3.0)[0].tobytes()


def test_adapters_act_together(run, files, base):
    prompt = f"{OTHER} and {TRIGGER}"
    (file,) = run(adapters=tuple(files), prompts=(prompt,)).files
    assert pixels(file.path) == drawn(base, prompt, (files[0], {}), (files[1], {}))
    told = facts(file.path)["engrams"]
    assert [one["file"] for one in json.loads(told)] == ["one.safetensors", "two.safetensors"]
    assert file.identity == hashlib.sha256(told.encode()).hexdigest()


@pytest.mark.parametrize(
    ("ats", "texts", "expected"),
    [
        (("@0.5", ""), (), ({TRIGGER: 0.5}, {OTHER: 1.0, "red ball": 1.0})),
        (("", ""), (f"{OTHER}=0.25",), ({TRIGGER: 1.0}, {OTHER: 0.25, "red ball": 1.0})),
        (("", "@2"), ("0.5", f"{OTHER}=-1"), ({TRIGGER: 0.5}, {OTHER: -2.0, "red ball": 1.0})),
        (("@0", "@1e0"), (), ({TRIGGER: 0.0}, {OTHER: 1.0, "red ball": 1.0})),
    ],
)
def test_strengths_multiply(run, files, base, ats, texts, expected):
    prompt = f"{OTHER}, {TRIGGER}, a red ball"
    adapters = tuple(f"{file}{at}" for file, at in zip(files, ats, strict=True))
    (file,) = run(adapters=adapters, strengths=texts, prompts=(prompt,)).files
    loads = [(source, {"strength": strength}) for source, strength in zip(files, expected, strict=True)]
    assert pixels(file.path) == drawn(base, prompt, *loads)
    assert pixels(file.path) != drawn(base, prompt, *((source, {}) for source in files))
    assert tuple(one["strengths"] for one in json.loads(facts(file.path)["engrams"])) == expected
    assert file.identity not in (None, *(open_adapter(source).identity() for source in files))


def test_a_file_may_have_an_at_sign_in_its_name(run, files, base, tmp_path):
    make_adapter(base).save(tmp_path / "me@0.5")
    (file,) = run(adapters=(str(tmp_path / "me@0.5"),)).files
    assert json.loads(facts(file.path)["engrams"])[0]["strengths"] == {TRIGGER: 1.0}
    (file,) = run(adapters=(str(tmp_path / "me@0.5@0.5"),), overwrite=True).files
    assert json.loads(facts(file.path)["engrams"])[0]["strengths"] == {TRIGGER: 0.5}


def refuse(error, run, tmp_path, *told, loads=False, **values):
    log = Log()
    with pytest.raises(error) as caught:
        run(log, **values)
    message = str(caught.value)
    assert all(text in message for text in told), message
    assert error is ConflictError or message.isprintable()  # conflicts are told one a line
    assert [title for title, *_ in log.works if title == "drawing"] == []
    assert loads or log.works == []
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"adapters": ("@x",)}, ["@x: 'x' after @ is not a number; expected FILE@0.8"]),
        ({"adapters": ("@",)}, ["'' after @ is not a number"]),
        ({"strengths": ("half",)}, ["strength 'half' is not a number or NAME=number"]),
        ({"strengths": (f"{TRIGGER}=",)}, ["is not a number or NAME=number"]),
        ({"strengths": ("mira=0.5",)}, ["there is no concept 'mira'; there is zorbit quell"]),
    ],
)
def test_a_strength_that_cannot_be_read_is_refused_before_anything_is_loaded(run, files, tmp_path, values, told):
    values["adapters"] = tuple(files[0] + at for at in values.get("adapters", ("",)))
    refuse(InputError, run, tmp_path, *told, **values)


@pytest.mark.parametrize("at", ["@nan", "@inf", "@1e39"])
def test_a_strength_that_is_not_finite_is_refused_before_anything_is_drawn(run, files, tmp_path, at):
    refuse(InputError, run, tmp_path, "strength", "finite number", adapters=(files[0] + at,), loads=True)


def test_strengths_without_adapters_are_refused(run, tmp_path):
    refuse(InputError, run, tmp_path, "no adapter to apply it to", strengths=("0.5",))


@pytest.mark.parametrize("name", ["none.safetensors", "none@0.5", "n@one.safetensors", "none@x"])
def test_an_adapter_that_is_not_there_is_refused_by_name(run, tmp_path, name):
    file = "none" if name == "none@0.5" else name
    refuse(AdapterReadError, run, tmp_path, f"{tmp_path / file}: cannot be opened", adapters=(str(tmp_path / name),))


def test_adapters_that_do_not_fit_are_refused_before_anything_is_drawn(run, files, base, tmp_path):
    other = str(tmp_path / "other.safetensors")
    compare = {"compare": True, "loads": True}
    make_adapter(base, backbone="sd35").save(other)
    refuse(IncompatibleAdaptersError, run, tmp_path, other, "sd35", "sd15", adapters=(other,), **compare)
    make_adapter(base, make_concept(base, name="x", seed=3)).save(other, overwrite=True)
    refuse(ConflictError, run, tmp_path, TRIGGER, adapters=(files[0], other), **compare)
    refuse(InputError, run, tmp_path, "loaded already", adapters=(files[0], files[0]), **compare)


def test_an_adapter_of_another_version_of_the_model_is_refused_before_anything_is_loaded(
    run, base, tmp_path, monkeypatch
):
    file = tmp_path / "old.safetensors"
    make_adapter(base, base_fingerprint="ab" * 32).save(file)
    assert len(run(adapters=(str(file),)).files) == 1  # other models have no fingerprint to compare with
    monkeypatch.setattr(loading, "known_fingerprint", lambda place: "cd" * 32)
    told = [str(file), "trained on small with fingerprint abababababab", "has cdcdcdcdcdcd", "train it again"]
    log = Log()
    with pytest.raises(IncompatibleAdaptersError) as caught:
        run(log, adapters=(str(file),), output=tmp_path / "others")
    assert all(text in str(caught.value) for text in told)
    assert log.works == []
    make_adapter(base, base_fingerprint="cd" * 32).save(file, overwrite=True)
    assert len(run(adapters=(str(file),), output=tmp_path / "others").files) == 1


# Comparing


def test_comparing_draws_the_base_model_byte_for_byte_and_a_grid(run, files, tmp_path):
    prompts = (f"{TRIGGER} in the snow", "a blue hat")
    report = run(adapters=(files[0],), prompts=prompts, compare=True)
    slugs = ["000-zorbit-quell-in-the-snow-0", "001-a-blue-hat-0"]
    assert names(report) == [f"{slug}-{variant}.png" for variant in ("base", "engram") for slug in slugs]
    identity = open_adapter(files[0]).identity()
    assert [file.identity for file in report.files] == [None, None, identity, identity]
    plain = run(prompts=prompts, output=tmp_path / "plain")
    shown = [pixels(file.path) for file in report.files]
    assert shown[:2] == [pixels(file.path) for file in plain.files]
    assert shown[0] != shown[2]
    assert shown[1] == shown[3]
    assert facts(report.files[0].path)["engrams"] == "[]"
    assert report.grid == tmp_path / "images" / "grid.png"
    with Image.open(report.grid) as grid:
        assert grid.size == (220 + 2 * (128 + 8), 30 + 2 * (128 + 8))
        for number, file in enumerate(report.files):
            place = (220 + number // 2 * 136, 30 + number % 2 * 136)
            with Image.open(file.path) as image:
                enlarged = image.resize((128, 128), Image.Resampling.NEAREST)
            assert grid.crop((*place, place[0] + 128, place[1] + 128)).tobytes() == enlarged.tobytes()


def test_a_grid_without_comparing_has_one_column(run, files):
    report = run(adapters=(files[0],), grid=True, seeds=(0, 1, 2))
    assert names(report) == [f"00{seed}-zorbit-quell-in-the-snow-{seed}.png" for seed in range(3)]
    with Image.open(report.grid) as grid:
        assert grid.size == (220 + 136, 30 + 3 * 136)


def test_progress_counts_every_picture_of_every_variant(run, files, model):
    class Counter(Log):
        def advance(self, done, figures=None):
            counts.append(done)

    counts = []
    log = Counter()
    run(log, adapters=(files[0],), compare=True, seeds=(0, 1, 2), batch_size=2)
    assert log.works == [(f"loading {model}", None, 0), ("drawing", 6, 0)]
    assert counts == [2, 3, 5, 6]


# Prompts


def test_prompts_come_from_a_file_with_one_a_line(run, tmp_path):
    text = "\ufeffa red ball\r\n\n   \n  a blue hat  \n“é”, 日本\n"
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8", newline="")
    report = run(prompts=("first",), prompts_file=tmp_path / "prompts.txt")
    assert [file.prompt for file in report.files] == ["first", "a red ball", "a blue hat", "“é”, 日本"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read: No such file"),
        (b"\n \n", "holds no prompt"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"x" * (1 << 21), "has 2097152 bytes"),
    ],
)
def test_a_file_without_prompts_is_refused_before_anything_is_loaded(run, tmp_path, content, told):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    file = tmp_path / "prompts.txt"
    refuse(InputError, run, tmp_path, f"{file}: ", told, prompts=(), prompts_file=file)


def test_a_trigger_that_stays_silent_is_told(run, files, base, tmp_path):
    make_adapter(base, make_concept(base, LOUD)).save(tmp_path / "loud.safetensors")
    log = Log()
    long = "a blue hat " * 10 + TRIGGER
    run(log, adapters=(files[0],), prompts=(long, TRIGGER, f"x{TRIGGER}"), compare=True, seeds=(0, 1))
    assert len(log.notes) == 1
    assert long in log.notes[0]
    assert "cut off" in log.notes[0]
    log = Log()
    run(log, adapters=(str(tmp_path / "loud.safetensors"),), prompts=(f"{LOUD}% ball",))
    assert len(log.notes) == 1
    assert "not registered" in log.notes[0]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_prompt_that_is_cut_off_is_told(run, files, with_adapter):
    log = Log()
    run(log, adapters=(files[0],) if with_adapter else (), prompts=("a blue hat " * 11, "a red ball"), seeds=(0, 1))
    assert len(log.notes) == 1
    assert "33 tokens, clip_l reads 30; the rest has no effect" in log.notes[0]


# Writing


def test_existing_files_are_refused_before_anything_is_loaded(run, files, tmp_path):
    report = run(adapters=(files[0],), compare=True, seeds=(0, 1))
    before = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    report.files[0].path.unlink()
    del before[report.files[0].path]
    log = Log()
    with pytest.raises(TargetExistsError, match=r"001-.*-1-base.png and 3 more: exists; pass --force"):
        run(log, adapters=(files[0],), compare=True, seeds=(0, 1))
    assert log.works == []
    assert {path: path.read_bytes() for path in (tmp_path / "images").iterdir()} == before
    again = run(adapters=(files[0],), compare=True, seeds=(0, 1), overwrite=True)
    assert {file.path.name for file in again.files} == {file.path.name for file in report.files}


def test_a_folder_that_cannot_be_made_is_refused(run, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AdapterWriteError, match=r"file/images: cannot be made: Not a directory"):
        run(output=tmp_path / "file" / "images")
    with pytest.raises(AdapterWriteError, match=r"file: cannot be made: File exists"):
        run(output=tmp_path / "file")


@pytest.mark.parametrize("values", [{"width": 36}, {"height": 20}])
def test_a_size_that_cannot_be_drawn_is_refused(run, values):
    with pytest.raises(InputError, match="expected a multiple of 8"):
        run(**values)


def test_a_size_may_be_chosen(run):
    (file,) = run(width=48, height=16).files
    with Image.open(file.path) as image:
        assert image.size == (48, 16)


def test_the_precision_is_that_of_the_model(run, tmp_path):
    (exact,) = run().files
    (coarse,) = run(precision="bf16", output=tmp_path / "coarse").files
    assert pixels(exact.path) != pixels(coarse.path)
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        run(precision="fp16", output=tmp_path / "half")
