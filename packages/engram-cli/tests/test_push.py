"""`engram push`, against a hub that records what it is told; and hub repositories as adapters."""

import hashlib
from types import SimpleNamespace

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

REPO = "someone/aldric"
ADDRESS = f"https://huggingface.co/{REPO}/commit/0123"


class Api:
    def __init__(self, card):
        self.card, self.calls, self.files = card, [], []

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create_repo", repo_id, private))

    def repo_info(self, repo_id):
        return SimpleNamespace(private=True)

    def create_branch(self, repo_id, *, branch, exist_ok):
        self.calls.append(("create_branch", branch))

    def hf_hub_download(self, repo_id, filename, *, revision):
        return str(self.card)

    def create_commit(self, repo_id, operations, *, commit_message, revision):
        self.calls.append(("create_commit", commit_message, revision))
        self.files = [operation.path_in_repo for operation in operations]
        return SimpleNamespace(commit_url=ADDRESS)


@pytest.fixture
def hub(world, monkeypatch):
    card = world.folder / "their-card.md"
    card.write_text("# Words of somebody else\n")
    api = Api(card)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return api


@pytest.fixture
def aldric(world):
    return world.build("aldric", "Aldric Vortex", license="CC0-1.0")


def test_it_publishes_and_tells_where(world, engram, hub, aldric):
    (world.folder / "grid.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    options = ("--license", "mit", "--preview", "grid.png", "--private", "--revision", "v2", "--message", "Second")
    done = engram("push", aldric.name, REPO, *options, "--overwrite-card")
    assert done.status == 0, done.err
    identity = hashlib.sha256(aldric.read_bytes()).hexdigest()
    assert done.out == f"published {REPO}: {ADDRESS}\nidentity {identity}\n"
    assert hub.calls == [("create_repo", REPO, True), ("create_branch", "v2"), ("create_commit", "Second", "v2")]
    assert hub.files == ["engram.safetensors", "README.md", "preview.png"]


def test_a_card_that_stays_is_noted(engram, hub, aldric):
    done = engram("push", aldric.name, REPO)
    assert done.status == 0, done.err
    assert "README.md was not written by engram and stays" in done.err
    assert "(--overwrite-card)" in done.err
    assert hub.files == ["engram.safetensors"]


def test_json_says_what_was_sent(engram, hub, aldric):
    done = engram("push", aldric.name, REPO, "--json")
    report = done.json
    assert report["repository"] == REPO
    assert report["commit"] == ADDRESS
    assert report["identity"] == hashlib.sha256(aldric.read_bytes()).hexdigest()
    assert report["files"] == {"engram.safetensors": aldric.stat().st_size}
    assert report["card"] is None
    assert engram("push", aldric.name, REPO, "--json", "--overwrite-card").json["card"].startswith("---\n")


def test_a_dry_run_prints_the_card_and_needs_no_hub(world, aldric):
    blocked = world.folder / "blocked"
    blocked.mkdir()
    (blocked / "huggingface_hub.py").write_text("raise ImportError('not installed')\n")
    options = ("--dry-run", "--description", "A *small* pilot.")
    done = world.run("push", aldric.name, REPO, *options, env={"PYTHONPATH": str(blocked)})
    assert done.status == 0, done.err
    assert done.out.startswith('---\nlicense: "cc0-1.0"\n')
    assert "<code>Aldric Vortex</code>" in done.out
    assert "A *small* pilot." in done.out
    assert f"nothing was sent; to {REPO} would go engram.safetensors (" in done.err
    report = world.run("push", aldric.name, REPO, *options, "--json", env={"PYTHONPATH": str(blocked)}).json
    assert report["commit"] is None
    assert report["card"] == done.out
    assert list(report["files"]) == ["engram.safetensors", "README.md"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("aldric.safetensors", "aldric"), "'aldric' is no repository id; expected OWNER/NAME"),
        (("absent.safetensors", REPO), "absent.safetensors: cannot be opened"),
        (("tokenizer.json", REPO), "tokenizer.json: "),
        (("aldric.safetensors", REPO, "--preview", "tokenizer.json"), "expected a PNG, JPEG or WebP picture"),
        (("aldric.safetensors", REPO, "--license", ""), "license is '', expected 1..256"),
    ],
)
def test_what_cannot_be_published_says_why(engram, hub, aldric, arguments, said):
    for options in ((), ("--dry-run",)):
        done = engram("push", *arguments, *options)
        assert done.status == 1
        assert said in done.err
        assert done.err.count("\n") == 1
    assert not hub.calls


def test_offline_it_says_so(world, aldric):
    done = world.run("push", aldric.name, REPO, env={"HF_HUB_OFFLINE": "1"})
    assert done.status == 1
    assert done.err == f"error: {REPO}: cannot be published offline; HF_HUB_OFFLINE is set, unset it\n"


def test_a_repository_can_be_inspected(engram, hub, aldric, monkeypatch):
    asked = []

    def download(repo_id, filename, *, revision):
        asked.append((repo_id, filename))
        return str(aldric)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    done = engram("inspect", REPO)
    assert done.status == 0, done.err
    assert "Aldric Vortex" in done.out
    assert asked == [(REPO, "engram.safetensors")]


def test_a_repository_can_be_generated_with(engram, hub, toy, world, monkeypatch):
    path = world.build("aldric", "Aldric Vortex", backbone="toy", base_model="toy/other")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, filename, *, revision: str(path))
    done = engram("generate", "-a", f"{REPO}@0.5", "-p", "a photo")
    assert done.status == 0, done.err
    ((settings, _),) = toy.calls
    assert settings.adapters == (f"{REPO}@0.5",)
    assert settings.model == "toy/other"


def test_a_repository_that_cannot_be_had_is_one_line(world):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(world.folder / "cache")}
    for command in (("inspect", REPO), ("inspect", REPO, "x/y"), ("generate", "-a", REPO, "-p", "x")):
        done = world.run(*command, env=environment)
        assert done.status == 1
        assert "'someone/aldric' is no path here" in done.err
        assert "is not in the cache, and HF_HUB_OFFLINE is set" in done.err
        assert done.err.count("\n") == 1


def test_a_folder_is_inspected_by_the_adapter_in_it(world, engram, aldric):
    (world.folder / "copy").mkdir()
    aldric.rename(world.folder / "copy" / "engram.safetensors")
    assert "Aldric Vortex" in engram("inspect", "copy").out
    assert "is not a regular file" in engram("inspect", ".").err


def test_a_memory_gets_a_card_of_its_own(world, engram, hub):
    path = world.build_memory("biomedicine", backbone="qwen3", base_model="Qwen/Qwen3-0.6B", license="mit")
    done = engram("push", path.name, "me/biomedicine", "--dry-run")
    assert done.status == 0, done.err
    for part in ('license: "mit"', 'pipeline_tag: "text-generation"', '  - "hashed-memory"', "load_memory(model, "):
        assert part in done.out
    assert hub.calls == []
