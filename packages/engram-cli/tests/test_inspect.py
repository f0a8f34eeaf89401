"""`engram inspect`, through real processes."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest

NAMED = ("--tokenizer", "text=tokenizer.json")


def test_it_shows_backbone_streams_sizes_concepts_and_identity(world):
    path = world.build("aldric", "Aldric Vortex", license="CC0-1.0")
    done = world.run("inspect", path.name)
    assert done.status == 0, done.err
    identity = hashlib.sha256(path.read_bytes()).hexdigest()
    for part in ("example", "text", "last_hidden_state", "aldric", "Aldric Vortex", "anchored", "CC0-1.0", identity):
        assert part in done.out


def test_json_holds_all_of_it(world):
    path = world.build("aldric", "Aldric Vortex", training={"steps": 3})
    report = world.run("inspect", path.name, "--json").json
    assert report["identity"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["bytes"] == path.stat().st_size
    assert report["manifest"]["streams"]["text"]["width"] == 8
    (concept,) = report["concepts"]
    assert concept["training"] == {"steps": 3}
    assert concept["entries"]["text"] == report["streams"]["text"]["entries"] > 1


def test_it_shows_how_many_blocks_have_residuals_of_their_own(world):
    sites = tuple(f"down_blocks.{number}" for number in range(16))
    path = world.build("aldric", "Aldric Vortex", sites=sites)
    done = world.run("inspect", path.name)
    assert done.status == 0, done.err
    assert "last_hidden_state, 16 blocks" in done.out
    report = world.run("inspect", path.name, "--json").json
    assert report["manifest"]["streams"]["text"]["sites"] == list(sites)
    size = report["streams"]["text"]["entries"] * 16 * 8 * 4
    assert report["streams"]["text"]["vector_bytes"] == size
    single = world.build("brindle", "Brindle Fennimore", sites=("mid_block",))
    assert "last_hidden_state, 1 block " in world.run("inspect", single.name).out
    plain = world.build("mira", "Mira Voss")
    assert "block" not in world.run("inspect", plain.name).out
    assert "sites" not in world.run("inspect", plain.name, "--json").json["manifest"]["streams"]["text"]
    done = world.run("merge", path, plain)
    assert done.status == 1
    said = "text.sites is '16 blocks' in the first and 'text' in the second"
    assert done.err.strip() == f"error: {path} and {plain} do not merge: {said}"


def test_long_lists_are_cut_and_say_so(world):
    files = [world.build(f"c{n}", f"Concept{n} Vortex", seed=n) for n in range(4)]
    world.run("merge", *files)
    done = world.run("inspect", "merged.safetensors", "--limit", "3")
    assert "and 1 more" in done.out
    assert "Concept3" not in done.out
    assert "Concept3" in world.run("inspect", "merged.safetensors", "--limit", "0").out


def test_quick_does_not_read_the_vectors(world):
    path = world.build("aldric", "Aldric Vortex")
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little") + header["text.vectors"]["data_offsets"][0]
    data[start : start + 4] = b"\xff\xff\xff\xff"  # NaN
    path.write_bytes(data)
    assert "text.vectors: holds NaN" in world.run("inspect", path.name).err
    assert world.run("inspect", path.name, "--quick").status == 0


def test_prompt_shows_which_tokens_fire(world):
    path = world.build("aldric", "Aldric Vortex")
    done = world.run("inspect", path, *NAMED, "--prompt", "a photo of Aldric Vortex", "--prompt", "a photo")
    assert done.status == 0, done.err
    assert "aldric fires at tokens" in done.out
    assert "nothing fires" in done.out
    line = next(line for line in done.out.splitlines() if line.startswith("  text") and "[" in line)
    assert line.index("photo") < line.index("[") < line.index("]")  # brackets where there is no colour
    colored = world.run("inspect", path, *NAMED, "--prompt", "a photo of Aldric Vortex", color=True).out
    assert "\x1b[30;42m" in colored


def test_prompt_as_json_gives_ids_and_spans(world):
    path = world.build("aldric", "Aldric Vortex")
    (report,) = world.run("inspect", path, *NAMED, "-p", "of Aldric Vortex", "--json").json
    reading = report["streams"]["text"]
    ((start, stop),) = reading["fires"][0]["spans"]
    assert "".join(reading["tokens"][start:stop]).strip() == "Aldric Vortex"
    assert len(reading["ids"]) == len(reading["tokens"]) == reading["read"]
    assert report["silent"] == []


def test_a_trigger_cut_in_another_way_is_reported(world):
    path = world.build("aldric", "Aldric Vortex", contexts=[("", "")])
    done = world.run("inspect", path, *NAMED, "--prompt", "a photo of ALDRIC VORTEX of mine, AlDrIc vortex")
    assert done.status == 0
    done = world.run("inspect", path, *NAMED, "--prompt", "AlDrIc VoRtEx")
    assert "'aldric' stands in the prompt but does not fire in text: the tokenizer cuts it here" in done.err


def test_against_reports_each_line_and_the_span_at_fault(world):
    path = world.build("aldric", "Aldric Vortex", activation="spans")
    text = world.folder / "lines.txt"
    text.write_bytes(b"nothing here\na photo of Aldric Vortex\n\xff\xfe bytes that are no text\nVortex\x1b[31m red\n")
    done = world.run("inspect", path, *NAMED, "--against", "lines.txt")
    assert done.status == 0, done.err
    assert " of 4 lines would fire" in done.out
    assert "\x1b" not in done.out  # a stranger's line cannot paint the terminal
    found = [
        json.loads(line) for line in world.run("inspect", path, *NAMED, "--against", text, "--json").out.splitlines()
    ]
    lines = {item["line"] for item in found}
    assert {2, 4} <= lines
    assert 1 not in lines
    assert {item["concept"] for item in found} == {"aldric"}
    assert found[0]["spans"] == ["Aldric Vortex"]


def test_anchored_concepts_do_not_fire_on_parts(world):
    path = world.build("aldric", "Aldric Vortex")
    (world.folder / "lines.txt").write_text("Vortex\nAldric\nAldric the Vortex\n")
    assert "0 of 3 lines would fire" in world.run("inspect", path, *NAMED, "--against", "lines.txt").out


def test_spans_concepts_are_pointed_out(world):
    assert "unrelated text too" in world.run("inspect", world.build("a", "Aldric Vortex", activation="spans")).err


def test_concepts_that_fire_inside_anothers_trigger_are_pointed_out(world):
    one = world.build("vortex", "Aldric Vortex", activation="spans")
    other = world.build("nebula", "Aldric Vortex Nebula", seed=1)
    assert world.run("merge", one, other, "--on-conflict", "both").status == 0
    done = world.run("inspect", "merged.safetensors")
    assert "'vortex' also fires inside the trigger of 'nebula', in text on tokens" in done.err
    assert "'nebula' also fires" not in done.err


def test_several_files_list_all_conflicts(world):
    one, other = world.build("aldric", "Aldric Vortex"), world.build("rival", "Aldric Vortex", seed=1)
    done = world.run("inspect", one, other)
    assert done.status == 0
    assert "rival" in done.out
    assert "1 conflicting pair" in done.out
    (conflict,) = world.run("inspect", one, other, "--json").json
    assert conflict["kind"] == "trigger"
    assert conflict["first"]["name"] == "aldric"
    friend = world.build("friend", "Brindle Fennimore", seed=2)
    assert "merge without conflict" in world.run("inspect", one, friend).out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--prompt", "x", "--against", "y"), 2, "not both"),
        (("--prompt", "x", "--tokenizer", "tokenizer.json"), 2, "STREAM=PATH"),
        (("--prompt", "x", "--tokenizer", "other=tokenizer.json"), 2, "STREAM=PATH"),
        (("--prompt", "x", "--tokenizer", "text=absent.json"), 1, "absent.json"),
        (("--prompt", "x"), 1, "backbone 'example' is not installed"),
        ((*NAMED, "--against", "absent.txt"), 1, "absent.txt: cannot be read"),
    ],
)
def test_what_cannot_be_done_says_why(world, arguments, status, said):
    done = world.run("inspect", world.build("aldric", "Aldric Vortex"), *arguments)
    assert done.status == status
    assert said in done.err


def test_another_tokenizer_is_refused(world):
    path = world.build("aldric", "Aldric Vortex")
    other = json.loads((world.folder / "tokenizer.json").read_text())
    other["normalizer"] = {"type": "Lowercase"}
    (world.folder / "lower.json").write_text(json.dumps(other))
    done = world.run("inspect", path, "--tokenizer", "text=lower.json", "--prompt", "x")
    assert done.status == 1
    assert "was made with the tokenizer" in done.err


def test_prompts_of_several_adapters_are_refused(world):
    one, other = world.build("aldric", "Aldric Vortex"), world.build("b", "Brindle Fennimore")
    assert world.run("inspect", one, other, "--prompt", "x").status == 2


@pytest.mark.skipif(os.name != "posix", reason="signals and named pipes")
def test_interrupting_is_one_line_and_status_130(world):
    path, pipe = world.build("aldric", "Aldric Vortex"), world.folder / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "engram_cli", "inspect", str(path), *NAMED, "--against", str(pipe)]
    process = subprocess.Popen(command, cwd=world.folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with pipe.open("w"):  # opens once the command reads
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in err


def test_a_memory_shows_what_it_belongs_to_and_its_size(world):
    path = world.build_memory("biomedicine", license="CC0-1.0", training={"steps": 300, "data": "texts"})
    done = world.run("inspect", path.name)
    assert done.status == 0, done.err
    identity = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = done.out.splitlines()
    assert f"identity     {identity}" in lines
    assert lines[0].startswith("file         biomedicine.safetensors (")
    assert lines[0].endswith(", hashed memory)")
    assert "licence      CC0-1.0" in lines
    assert "n-grams      2 to 3, 2 heads each" in lines
    assert "rows a head  11 for n = 2, 7 for n = 3, or the primes that follow; width 2" in lines
    assert "window       2 taps every 3 positions" in lines
    assert any(line.split() == ["1", "48", "384", "B", "f32"] for line in lines)
    assert any(line.split() == ["steps", "300"] for line in lines)
    quick = world.run("inspect", path.name, "--quick").out
    assert "not computed (--quick)" in quick


def test_json_holds_all_of_a_memory(world):
    path = world.build_memory("biomedicine", training={"steps": 300})
    report = world.run("inspect", path.name, "--json").json
    assert report["kind"] == "hashed-memory"
    assert report["identity"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["bytes"] == path.stat().st_size
    assert report["memory"]["layer_ids"] == [1, 3]
    assert report["training"] == {"steps": 300}
    assert report["tables"]["1"] == {"rows": 48, "bytes": 384, "dtype": "f32"}
    assert report["manifest"]["streams"]["text"]["width"] == 4


def test_every_value_of_a_memory_is_checked(world):
    path = world.build_memory("biomedicine")
    data = bytearray(path.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"  # the compressed ids come last
    data[-1000:-996] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    done = world.run("inspect", path.name)
    assert done.status == 1
    assert "biomedicine.safetensors: " in done.err
    assert world.run("inspect", path.name, "--quick").status in (0, 1)


def test_a_memory_has_no_triggers_to_look_for(world):
    path = world.build_memory("biomedicine")
    for option in ("--prompt", "--against"):
        done = world.run("inspect", path.name, option, "x")
        assert done.status == 1
        assert "biomedicine.safetensors: is a hashed memory, which has no trigger" in done.err


def test_memories_are_not_compared(world):
    memory, adapter = world.build_memory("biomedicine"), world.build("aldric", "Aldric Vortex")
    done = world.run("inspect", adapter.name, memory.name)
    assert done.status == 1
    assert "kind is 'concept-table' in the first and 'hashed-memory' in the second" in done.err
