"""`engram merge` and `engram extract`, through real processes."""

import hashlib

import pytest


def test_merge_writes_merged_safetensors_in_the_current_folder_and_says_so(world):
    world.build("aldric", "Aldric Vortex")
    world.build("brindle", "Brindle Fennimore", seed=1)
    done = world.run("merge", "aldric.safetensors", "brindle.safetensors")
    assert done.status == 0, done.err
    assert "wrote merged.safetensors: 2 concepts" in done.out
    identity = hashlib.sha256((world.folder / "merged.safetensors").read_bytes()).hexdigest()
    assert f"identity {identity}" in done.out
    assert world.files() == ["aldric.safetensors", "brindle.safetensors", "merged.safetensors", "tokenizer.json"]


def test_merge_is_commutative_down_to_the_bytes(world):
    one, other = world.build("aldric", "Aldric Vortex"), world.build("brindle", "Brindle Fennimore", seed=1)
    first = world.run("merge", one, other, "-o", "ab.safetensors", "--json").json
    second = world.run("merge", other, one, "-o", "ba.safetensors", "--json").json
    assert first["identity"] == second["identity"]
    assert first["concepts"] == ["aldric", "brindle"]


def test_merge_refuses_an_existing_target_and_leaves_it_as_it_was(world):
    one, other = world.build("aldric", "Aldric Vortex"), world.build("brindle", "Brindle Fennimore", seed=1)
    before = one.read_bytes()
    done = world.run("merge", one, other, "-o", one)
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert "aldric.safetensors: exists already" in done.err
    assert "--force" in done.err
    assert one.read_bytes() == before
    assert world.run("merge", one, other, "-o", one, "--force").status == 0
    assert world.run("inspect", one, "--json").json["concepts"][1]["name"] == "brindle"


def test_merge_lists_every_conflict_and_writes_nothing(world):
    one = world.build("aldric", "Aldric Vortex")
    other = world.build("rival", "Aldric Vortex", seed=1)
    third = world.build("aldric", "Somebody Else", file="third.safetensors", seed=2)
    done = world.run("merge", one, other, third)
    assert done.status == 1
    assert "2 conflicting pairs" in done.err
    assert "'aldric' of" in done.err
    assert "'rival' of" in done.err
    assert "share the trigger" in done.err
    assert "share the name 'aldric'" in done.err
    assert "merged.safetensors" not in world.files()


@pytest.mark.parametrize(
    ("choice", "kept"), [("keep-first", ["aldric"]), ("keep-last", ["rival"]), ("both", ["aldric", "rival"])]
)
def test_conflicts_are_settled_the_way_the_user_chooses(world, choice, kept):
    one, other = world.build("aldric", "Aldric Vortex"), world.build("rival", "Aldric Vortex", seed=1)
    done = world.run("merge", one, other, "--on-conflict", choice, "--json")
    assert done.status == 0, done.err
    assert done.json["concepts"] == kept
    assert [item["name"] for item in done.json["dropped"]] == [n for n in ("aldric", "rival") if n not in kept]


def test_both_renames_concepts_of_one_name_and_says_so(world):
    one = world.build("aldric", "Aldric Vortex")
    other = world.build("aldric", "Aldric Vortex", file="other.safetensors", seed=1)
    done = world.run("merge", one, other, "--on-conflict", "both")
    assert done.status == 0
    assert done.err.count("renamed 'aldric'") == 2


def test_incompatible_adapters_are_refused_by_name_and_value(world):
    one, other = world.build("aldric", "Aldric Vortex"), world.build("wide", "Wide One", width=16)
    done = world.run("merge", one, other)
    assert done.status == 1
    assert "aldric.safetensors and" in done.err
    assert "text.width is 8 in the first and 16 in the second" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("merge",), "files"),
        (("merge", "a.safetensors", "--on-conflict", "maybe"), "keep-first"),
        (("extract", "a.safetensors"), "names"),
        (("nonsense",), "nonsense"),
        (("convert", "x.pt"), "--backbone"),
        (("convert", "x.pt", "--backbone", "sd15", "--rule", "odd"), "absolute-tanh"),
        (("convert", "x.pt", "--backbone", "sd15", "--max-ngram", "1"), "--max-ngram"),
    ],
)
def test_wrong_usage_is_status_2(world, arguments, said):
    done = world.run(*arguments)
    assert done.status == 2
    assert said in done.err


def test_extract_gives_back_the_very_file(world):
    one, other = world.build("aldric", "Aldric Vortex"), world.build("brindle fox", "Brindle Fennimore", seed=1)
    world.run("merge", one, other)
    done = world.run("extract", "merged.safetensors", "brindle fox")
    assert done.status == 0, done.err
    assert "wrote brindle-fox.safetensors: 1 concept" in done.out
    assert (world.folder / "brindle-fox.safetensors").read_bytes() == other.read_bytes()
    several = world.run("extract", "merged.safetensors", "brindle fox", "aldric", "--json")
    assert several.json["output"] == "extracted.safetensors"
    assert several.json["concepts"] == ["aldric", "brindle fox"]


def test_extract_of_an_unknown_concept_lists_what_there_is(world):
    done = world.run("extract", world.build("aldric", "Aldric Vortex"), "elena")
    assert done.status == 1
    assert "has no concept 'elena'; it has 'aldric'" in done.err
    assert "elena.safetensors" not in world.files()


@pytest.mark.parametrize("damage", ["truncate", "flip", "text", "folder", "absent"])
def test_unusable_files_are_one_line_naming_the_file(world, damage):
    good, bad = world.build("aldric", "Aldric Vortex"), world.folder / "bad.safetensors"
    data = good.read_bytes()
    if damage == "truncate":
        bad.write_bytes(data[:-5])
    elif damage == "flip":
        bad.write_bytes(data[:200] + b"\xff" + data[201:])
    elif damage == "text":
        bad.write_text("not an adapter\n")
    elif damage == "folder":
        bad.mkdir()
    for command in (("merge", good, bad), ("inspect", bad), ("extract", bad, "aldric", "-o", "x.safetensors")):
        done = world.run(*command)
        assert done.status == 1
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
        assert "bad.safetensors" in done.err
    assert not {"merged.safetensors", "x.safetensors"} & set(world.files())


def test_memories_do_not_merge_and_say_what_to_do(world):
    one, other = world.build_memory("one"), world.build_memory("other")
    done = world.run("merge", one.name, other.name)
    assert done.status == 1
    assert done.err == (
        "error: one.safetensors and other.safetensors do not merge: kind is 'hashed-memory' in both; hashed memories "
        "act side by side: name both, e.g. engram generate -a one.safetensors -a other.safetensors\n"
    )
    assert "merged.safetensors" not in world.files()
    done = world.run("merge", one.name)
    assert "one.safetensors does not merge: kind is 'hashed-memory'; hashed memories act side by side" in done.err


@pytest.mark.parametrize("order", [1, -1])
def test_kinds_do_not_merge(world, order):
    files = [world.build("aldric", "Aldric Vortex").name, world.build_memory("one").name][::order]
    kinds = ["concept-table", "hashed-memory"][::order]
    done = world.run("merge", *files)
    assert done.status == 1
    assert f"{files[0]} and {files[1]} do not merge: " in done.err
    assert f"kind is {kinds[0]!r} in the first and {kinds[1]!r} in the second" in done.err


def test_nothing_is_extracted_from_a_memory(world):
    done = world.run("extract", world.build_memory("one").name, "x")
    assert done.status == 1
    assert "one.safetensors: is a hashed memory, which has no concepts to extract" in done.err
    assert done.err.count("\n") == 1
