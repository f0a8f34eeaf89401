"""Every snippet of the documentation runs as it stands, and what the pages show is what it prints.

A page's Python blocks share one namespace and one folder, in order. A block ```text title="Output" holds what
the Python block before it prints; a ```console block holds commands and what they print, both streams together.
Other blocks are not run. `python docs/tests/test_snippets.py` writes the present outputs into the pages.
"""

import contextlib
import gzip
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "packages").glob("*/README.md")])
CHECKOUT = "quickstart.md"  # runs at the top of a checkout, all others where the quickstart writes its files

_BLOCK = re.compile(r"^```(?P<kind>python|text|console)(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)


def name_page(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if _BLOCK.search(page.read_text("utf-8"))], ids=name_page)
def test_the_page_shows_what_happens(page: Path, files: Path, tmp_path: Path) -> None:
    text = page.read_text("utf-8")
    assert render(page, text, copy_files(files, tmp_path, page)) == text, f"run python {name_page(Path(__file__))}"


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


def render(page: Path, text: str, folder: Path) -> str:
    """Return the page as it would be with the outputs of now."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    done: list[str] = []
    at, printed = 0, ""
    with working_in(folder):
        for block in _BLOCK.finditer(text):
            body = block["body"]
            if block["kind"] == "python":
                line = text.count("\n", 0, block.start("body"))
                code = compile("\n" * line + body, str(page), "exec")
                with captured() as stream:
                    exec(code, namespace)
                printed = stream.getvalue()
            elif block["kind"] == "console":
                body = run_console(body)
            elif block["info"].strip() == 'title="Output"':
                body = printed
            done += [text[at : block.start("body")], trim(body)]
            at = block.end("body")
    return "".join(done) + text[at:]


def run_console(body: str) -> str:
    shown, status = [], 0
    commands = re.findall(r"^\$ ((?:.*\\\n)*.*)", body, re.M)
    if commands[0].startswith("uv run"):  # a script may print commands of its own
        del commands[1:]
    for command in commands:
        words = shlex.split(command.replace("\\\n", ""))
        if command == "echo $?":
            output = f"{status}\n"
        elif words[0] == "engram":
            status, output = run_engram(words[1:])
        elif words[:3] == ["uv", "run", "python"]:
            result = subprocess.run(
                [sys.executable, *words[3:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            status, output = result.returncode, result.stdout
        else:
            raise ValueError(f"cannot run {command!r}")
        shown.append(f"$ {command}\n{output}")
    return "".join(shown)


def run_engram(words: list[str]) -> tuple[int, str]:
    """Run the command in this process: starting one for each would take most of the time."""
    with captured() as stream:
        from engram_cli.main import main

        try:
            main(words)
        except SystemExit as end:
            return int(end.code or 0), stream.getvalue()
    return 0, stream.getvalue()


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield stream


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before, environment = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    os.environ.update(COLUMNS="80", NO_COLOR="1", TERM="dumb", HF_HUB_OFFLINE="1")
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)


def trim(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


# The files that pages start from: those of the quickstart, CLIP's tokenizer in a model folder, and checkpoints
# such as TinyEngram writes.


def make_files(folder: Path) -> None:
    output = folder / "examples" / "output"
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("output", "tests"))
    output.mkdir()
    example = load_script(ROOT / "examples" / "two_concepts.py")
    trained = example.train_tokenizer()
    trained.save(str(output / "tokenizer.json"))
    from engram_core import merge_files, wrap_tokenizer

    adapters = []
    for item in json.loads((ROOT / "examples" / "concepts.json").read_text("utf-8")):
        adapters.append(output / f"{item['name']}.safetensors")
        example.build_adapter(item, wrap_tokenizer(trained, max_length=77)).save(adapters[-1])
    merge_files(adapters, output / "both.safetensors")
    make_clip(output / "stable-diffusion-v1-5" / "tokenizer")
    for name in ("tokenizer", "tokenizer_2"):
        make_clip(output / "stable-diffusion-3.5-medium" / name)
    # T5's vocabulary is in no package at hand; the page says that another stands in.
    (output / "stable-diffusion-3.5-medium" / "tokenizer_3").mkdir()
    shutil.copy(output / "tokenizer.json", output / "stable-diffusion-3.5-medium" / "tokenizer_3")


def make_clip(folder: Path) -> None:
    """Write CLIP's tokenizer as model folders hold it, from the vocabulary that open_clip ships."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    packed = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}', encoding="utf-8")


def make_checkpoints(folder: Path) -> None:
    import torch

    from engram_vision.sd15 import SD15
    from engram_vision.sd35 import SD35

    def spans(ids: list[int]) -> dict[str, list[int]]:
        lengths = range(2, min(len(ids), 7) + 1)
        found = {f"trigger_{n}gram_{at}": ids[at : at + n] for n in lengths for at in range(len(ids) - n + 1)}
        return found | ({"trigger_full": ids} if len(ids) > 7 else {})

    noise = torch.Generator().manual_seed(0)
    (clip,) = SD15.load_tokenizers(str(folder / "stable-diffusion-v1-5")).values()
    for name, trigger, switches in (
        ("checkpoint-sd15", "Aldric Vortex-9 CyberNebula", {"enable_tanh_gating": True}),
        ("checkpoint-repeats", "round and round and round", {"normalization_mode": True}),
    ):
        ngrams = spans(list(clip.encode(trigger)))
        config = {"trigger_word": trigger, "max_ngram_size": 7, "target_ngrams": ngrams} | switches
        (folder / name).mkdir()
        (folder / name / "engram_config.json").write_text(json.dumps(config), encoding="utf-8")
        embeddings = {key: 0.02 * torch.randn(1, 768, generator=noise) for key in ngrams}
        weights = {"engram_embeddings": embeddings, "injection_scale": torch.full((768,), 0.05)}
        torch.save(weights, folder / name / "engram_weights.pt")
    (folder / "checkpoint-5000").mkdir()
    tokenizers = SD35.load_tokenizers(str(folder / "stable-diffusion-3.5-medium")).values()
    for number, (tokenizer, width) in enumerate(zip(tokenizers, (768, 1280, 4096), strict=True), start=1):
        ngrams = spans(list(tokenizer.encode("Aldric Vortex-9 CyberNebula")))
        embeddings = {key: 0.02 * torch.randn(1, width, generator=noise) for key in ngrams}
        torch.save(embeddings, folder / "checkpoint-5000" / f"engram_{number}.pt")
        torch.save(torch.full((width,), 0.05), folder / "checkpoint-5000" / f"scale_{number}.pt")


def copy_files(files: Path, folder: Path, page: Path) -> Path:
    shutil.copytree(files, folder, dirs_exist_ok=True)
    if page.name == CHECKOUT:
        shutil.rmtree(folder / "examples" / "output")
        return folder
    if page.name == "convert.md":
        make_checkpoints(folder / "examples" / "output")
    return folder / "examples" / "output"


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as files:
        make_files(Path(files))
        for page in PAGES:
            text = page.read_text("utf-8")
            if (names and page.name not in names) or not _BLOCK.search(text):
                continue
            with tempfile.TemporaryDirectory() as folder:
                now = render(page, text, copy_files(Path(files), Path(folder), page))
            if now != text:
                page.write_text(now, encoding="utf-8")
                print(f"updated {name_page(page)}")  # noqa: T201 - a script


if __name__ == "__main__":
    main()
