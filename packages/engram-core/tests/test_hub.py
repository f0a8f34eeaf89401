"""Adapters on the hub: found by path or repository, and published, without a network."""

import builtins
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from core_builders import make_adapter, make_concept

from engram_core import AdapterFormatError, AdapterReadError, InputError, open_adapter
from engram_core.card import CARD_MARK
from engram_core.hub import ADAPTER_FILE, find_adapter, prepare_upload, push_adapter

REPO = "someone/ant"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PNG = b"\x89PNG\r\n\x1a\n and so on"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The real library with an empty cache, online until a test says otherwise."""
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ant.safetensors"
    make_adapter(make_concept("ant", (1, 2, 3), license="CC0-1.0")).save(path)
    return path


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


@pytest.fixture
def no_library(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


def http_error(kind, status, message="said the server"):
    return kind(message, response=SimpleNamespace(status_code=status, headers={}, request=None))


def not_there(hub):
    """What the library raises for a file that a repository lacks; the name depends on its version."""
    return http_error(getattr(hub.errors, "RemoteEntryNotFoundError", hub.utils.EntryNotFoundError), 404)


def is_one_line(error):
    text = str(error.value)
    return "\n" not in text and len(text) < 500


# Finding


def test_importing_it_does_not_import_the_library():
    code = "import sys, engram_core\nassert 'engram_core.hub' not in sys.modules\nimport engram_core.hub\n"
    code += "assert 'huggingface_hub' not in sys.modules and 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_what_exists_here_is_a_path(no_library, file, elsewhere):
    assert find_adapter(file) == find_adapter(str(file)) == file
    assert find_adapter(str(file), revision="v1", filename="other.safetensors") == file
    (elsewhere / "someone").mkdir()
    (elsewhere / "someone" / "ant").write_bytes(file.read_bytes())
    assert find_adapter(REPO) == Path(REPO)


def test_a_folder_gives_its_adapter(no_library, file, elsewhere):
    folder = elsewhere / "someone" / "ant"
    folder.mkdir(parents=True)
    assert find_adapter(REPO) == Path(REPO)  # opening it says that it is a folder
    (folder / ADAPTER_FILE).write_bytes(file.read_bytes())
    (folder / "other.safetensors").write_bytes(file.read_bytes())
    assert find_adapter(REPO) == Path(REPO) / ADAPTER_FILE
    assert find_adapter(folder) == folder / ADAPTER_FILE
    assert find_adapter(folder, filename="other.safetensors") == folder / "other.safetensors"


@pytest.mark.parametrize(
    "source",
    [
        "missing.safetensors",
        "folder/missing.safetensors",
        "./owner/name",
        "../name",
        "~/name",
        "/no/name",
        "a/b/c",
        "plain",
        "owner/na me",
        "x" * 5000,
        "null\0byte/x",
        Path("owner/name"),
    ],
    ids=lambda source: str(source)[:20],
)
def test_what_is_no_repository_is_left_to_opening(no_library, elsewhere, source):
    path = find_adapter(source)
    assert path == Path(source)
    with pytest.raises(AdapterReadError):
        open_adapter(path)


def test_a_repository_is_downloaded(hub, file, elsewhere, monkeypatch):
    asked = []

    def download(repo_id, filename, *, revision):
        asked.append((repo_id, filename, revision))
        return str(file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert find_adapter(REPO) == file
    assert find_adapter(REPO, filename="sub/b.safetensors", revision="v1") == file
    assert asked == [(REPO, ADAPTER_FILE, None), (REPO, "sub/b.safetensors", "v1")]


def test_offline_the_cache_serves(hub, file, elsewhere, monkeypatch, tmp_path):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    store = tmp_path / "cache" / "models--someone--ant"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(COMMIT)
    snapshot = store / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / ADAPTER_FILE).write_bytes(file.read_bytes())
    found = find_adapter(REPO)
    assert open_adapter(found).names() == ["ant"]
    assert found == find_adapter(REPO, revision=COMMIT)
    with pytest.raises(InputError, match=r"'other\.safetensors' is not in the cache, and HF_HUB_OFFLINE is set"):
        find_adapter(REPO, filename="other.safetensors")


def test_offline_without_a_copy_is_one_line(hub, elsewhere, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        find_adapter(REPO, revision="v1")
    assert str(error.value) == (
        f"'{REPO}' is no path here, and as a hub repository its file '{ADAPTER_FILE}' at revision 'v1' is not in the "
        "cache, and HF_HUB_OFFLINE is set; unset it, or download the file while online"
    )


def test_the_environment_says_that_it_is_offline(hub, tmp_path):
    code = f"from engram_core.hub import find_adapter\ntry:\n    find_adapter({REPO!r})\n"
    code += "except ValueError as error:\n    print(error)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "is not in the cache, and HF_HUB_OFFLINE is set" in done.stdout


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda u: u.LocalEntryNotFoundError("An error\nhappened"),
            "is not in the cache, and the hub cannot be reached",
        ),
        (lambda u: http_error(u.GatedRepoError, 403), f"is gated; ask for access at https://huggingface.co/{REPO}"),
        (lambda u: http_error(u.RepositoryNotFoundError, 401), "does not exist or is private; check its name, or run"),
        (lambda u: http_error(u.RevisionNotFoundError, 404), "has no revision 'v1'; name a branch"),
        (lambda u: http_error(u.HfHubHTTPError, 500, "a\nb"), "cannot be downloaded (HfHubHTTPError: a b)"),
        (lambda u: OSError(28, "No space left on device"), "(OSError: [Errno 28] No space left on device)"),
        (lambda u: RuntimeError("\x1b[31mred"), "(RuntimeError: '\\x1b[31mred')"),
    ],
)
def test_what_keeps_it_from_downloading_is_said(hub, elsewhere, monkeypatch, make, said):
    failure = make(hub.utils)

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(InputError) as error:
        find_adapter(REPO, revision="v1")
    assert f"'{REPO}' is no path here, and as a hub repository" in str(error.value)
    assert said in str(error.value)
    assert is_one_line(error)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["README.md", "b.safetensors", "a.safetensors"], "it has 'a.safetensors', 'b.safetensors'; name one"),
        ([f"{n}.safetensors" for n in range(9)], "'4.safetensors' and 4 more; name one"),
        (["README.md"], "no .safetensors file at all"),
        (["\x1b[31m\n.safetensors"], "'\\x1b[31m\\n.safetensors'"),
        (None, "name another one (filename)"),
    ],
)
def test_a_missing_file_is_named_with_those_that_are_there(hub, elsewhere, monkeypatch, names, said):
    def fail(*args, **kwargs):
        raise not_there(hub)

    class Api:
        def list_repo_files(self, repo_id, *, revision):
            assert (repo_id, revision) == (REPO, None)
            if names is None:
                raise OSError("offline")
            return names

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    monkeypatch.setattr(hub, "HfApi", Api)
    with pytest.raises(InputError) as error:
        find_adapter(REPO)
    assert f"it has no file '{ADAPTER_FILE}'" in str(error.value)
    assert said in str(error.value)
    assert is_one_line(error)


def test_a_missing_library_is_named(no_library, elsewhere, file):
    with pytest.raises(InputError, match="needs the package 'huggingface_hub'; install engram-core with its extra"):
        find_adapter(REPO)
    with pytest.raises(InputError, match="publishing someone/ant needs the package 'huggingface_hub'"):
        push_adapter(file, REPO)


# Publishing


class Api:
    """A hub that records what it is told."""

    def __init__(self, hub, card=None, *, public=False, failures=None):
        self.hub, self.card, self.public, self.failures = hub, card, public, failures or {}
        self.calls, self.files = [], {}

    def _note(self, *call):
        self.calls.append(call)
        if call[0] in self.failures:
            raise self.failures[call[0]]

    def create_repo(self, repo_id, *, private, exist_ok):
        self._note("create_repo", repo_id, private, exist_ok)

    def repo_info(self, repo_id):
        self._note("repo_info", repo_id)
        return SimpleNamespace(private=not self.public)

    def create_branch(self, repo_id, *, branch, exist_ok):
        self._note("create_branch", repo_id, branch, exist_ok)

    def hf_hub_download(self, repo_id, filename, *, revision):
        self._note("hf_hub_download", repo_id, filename, revision)
        if self.card is None:
            raise not_there(self.hub)
        return str(self.card)

    def create_commit(self, repo_id, operations, *, commit_message, revision):
        self._note("create_commit", repo_id, commit_message, revision)
        for operation in operations:
            with operation.as_file() as stream:
                self.files[operation.path_in_repo] = stream.read()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{COMMIT}")


@pytest.fixture
def serve(hub, monkeypatch):
    def serve(**options):
        api = Api(hub, **options)
        monkeypatch.setattr(hub, "HfApi", lambda: api)
        return api

    return serve


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a grid.PNG"
    path.write_bytes(PNG)
    return path


def test_one_commit_holds_adapter_card_and_preview(serve, file, picture):
    api = serve()
    address = push_adapter(file, REPO, preview=picture)
    identity = hashlib.sha256(file.read_bytes()).hexdigest()
    assert address == f"https://huggingface.co/{REPO}/commit/{COMMIT}"
    assert api.calls == [
        ("create_repo", REPO, None, True),
        ("hf_hub_download", REPO, "README.md", None),
        ("create_commit", REPO, f"Upload adapter {identity[:12]}", None),
    ]
    assert set(api.files) == {ADAPTER_FILE, "README.md", "preview.png"}
    assert api.files[ADAPTER_FILE] == file.read_bytes()
    assert api.files["preview.png"] == PNG
    card = api.files["README.md"].decode()
    assert CARD_MARK in card
    assert 'license: "cc0-1.0"' in card
    assert "![Preview](preview.png)" in card
    assert identity in card


def test_options_reach_the_hub(serve, file):
    api = serve()
    push_adapter(file, REPO, private=True, revision="v2", message="Second", description="Small.", license="mit")
    assert api.calls == [
        ("create_repo", REPO, True, True),
        ("repo_info", REPO),
        ("create_branch", REPO, "v2", True),
        ("hf_hub_download", REPO, "README.md", "v2"),
        ("create_commit", REPO, "Second", "v2"),
    ]
    card = api.files["README.md"].decode()
    assert 'license: "mit"' in card
    assert "\nSmall.\n" in card


@pytest.mark.parametrize("options", [{"create": False, "revision": "v2"}, {"create": True, "revision": "refs/pr/1"}])
def test_nothing_is_created_that_need_not_be(serve, file, options):
    api = serve()
    push_adapter(file, REPO, **options)
    names = [call[0] for call in api.calls]
    assert "create_branch" not in names
    assert ("create_repo" in names) is options["create"]


def test_a_card_of_somebody_else_stays(serve, file, tmp_path):
    own = tmp_path / "README.md"
    own.write_text("# My own words\n")
    said = []
    api = serve(card=own)
    push_adapter(file, REPO, note=said.append)
    assert set(api.files) == {ADAPTER_FILE}
    assert said == [f"{REPO}: its README.md was not written by engram and stays; overwriting the card replaces it"]
    api = serve(card=own)
    push_adapter(file, REPO, overwrite_card=True, note=said.append)
    assert "README.md" in api.files
    own.write_bytes(b"\xff" + prepare_upload(file, REPO).card.encode())
    api = serve(card=own)
    push_adapter(file, REPO, note=said.append)
    assert "README.md" in api.files
    assert len(said) == 1


def test_private_is_not_published_to_a_public_repository(serve, file):
    api = serve(public=True)
    with pytest.raises(InputError, match="someone/ant: exists and is public; make it private"):
        push_adapter(file, REPO, private=True)
    assert not api.files


@pytest.mark.parametrize(
    ("where", "make", "said"),
    [
        ("create_repo", lambda u: u.LocalTokenNotFoundError("no token"), "you are not logged in, or the token is not"),
        ("create_repo", lambda u: http_error(u.HfHubHTTPError, 401), "run `hf auth login`, or set HF_TOKEN"),
        ("create_repo", lambda u: http_error(u.RepositoryNotFoundError, 401), "you are not logged in"),
        ("create_repo", lambda u: http_error(u.HfHubHTTPError, 403), "the token may not write for 'someone'"),
        ("create_commit", lambda u: http_error(u.RepositoryNotFoundError, 404), "does not exist, or the token may not"),
        ("hf_hub_download", lambda u: http_error(u.RevisionNotFoundError, 404), "has no revision 'v9'"),
        ("hf_hub_download", lambda u: u.LocalEntryNotFoundError("x"), "the hub cannot be reached (LocalEntryNot"),
        ("create_commit", lambda u: u.OfflineModeIsEnabled("x"), "cannot be published offline; HF_HUB_OFFLINE is set"),
        (
            "create_commit",
            lambda u: ValueError("Invalid metadata\n- license"),
            "the hub refuses the upload (ValueError",
        ),
        ("create_commit", lambda u: http_error(u.HfHubHTTPError, 409), "the hub refuses the upload (HfHubHTTPError"),
        ("create_commit", lambda u: http_error(u.HfHubHTTPError, 503), "the hub cannot be reached (HfHubHTTPError"),
        (
            "create_commit",
            lambda u: OSError("Connection reset"),
            "the hub cannot be reached (OSError: Connection reset)",
        ),
    ],
)
def test_what_keeps_it_from_publishing_is_said(hub, serve, file, where, make, said):
    serve(failures={where: make(hub.utils)})
    with pytest.raises(InputError) as error:
        push_adapter(file, REPO, revision="v9")
    assert str(error.value).startswith(f"{REPO}: ")
    assert said in str(error.value)
    assert is_one_line(error)


def test_offline_it_is_refused_at_once(hub, serve, file, monkeypatch):
    api = serve()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="someone/ant: cannot be published offline; HF_HUB_OFFLINE is set"):
        push_adapter(file, REPO)
    assert not api.calls


def test_an_adapter_that_changes_meanwhile_is_not_sent(serve, file, monkeypatch):
    api = serve()
    real = prepare_upload

    def prepare(*args, **kwargs):
        upload = real(*args, **kwargs)
        make_adapter(make_concept("bee", (4, 5))).save(file, overwrite=True)
        return upload

    monkeypatch.setattr("engram_core.hub.prepare_upload", prepare)
    with pytest.raises(InputError, match="the adapter changed since it was checked; nothing was sent"):
        push_adapter(file, REPO)
    assert not api.calls


@pytest.mark.parametrize(
    ("repo_id", "options", "said"),
    [
        ("ant", {}, "'ant' is no repository id; expected OWNER/NAME"),
        ("someone/ant.safetensors", {}, "not ending in .safetensors"),
        ("a/b/c", {}, "'a/b/c' is no repository id"),
        (REPO, {"license": " "}, "license is ' ', expected 1..256 printable characters"),
        (REPO, {"license": "a\nb"}, r"license is 'a\nb'"),
        (REPO, {"preview": Path("absent.png")}, "preview 'absent.png' cannot be read: No such file"),
        (REPO, {"preview": Path()}, "preview '.' cannot be read: "),
        (REPO, {"preview": Path("text.png")}, "preview 'text.png' begins with 23 20 74 65 78 74; expected a PNG"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(serve, file, elsewhere, repo_id, options, said):
    (elsewhere / "text.png").write_bytes(b"# text")
    api = serve()
    with pytest.raises(InputError) as error:
        push_adapter(file, repo_id, **options)
    assert said in str(error.value)
    assert not api.calls


def test_a_file_that_is_no_sound_adapter_is_refused(serve, file, tmp_path):
    api = serve()
    with pytest.raises(AdapterReadError):
        push_adapter(tmp_path / "absent.safetensors", REPO)
    table = open_adapter(file).container.tensors["clip_l.vectors"]
    data = bytearray(file.read_bytes())
    data[table.start : table.start + 4] = b"\xff\xff\xff\xff"  # NaN, which opening does not see
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(AdapterFormatError, match=r"clip_l\.vectors: holds NaN"):
        push_adapter(file, REPO)
    assert not api.calls


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (PNG, "preview.png"),
        (b"\xff\xd8\xff\xe0 and so on", "preview.jpg"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "preview.webp"),
    ],
)
def test_preparing_needs_no_library(no_library, file, tmp_path, head, name):
    (tmp_path / "picture").write_bytes(head)
    upload = prepare_upload(file, REPO, preview=tmp_path / "picture", description="\ud800")
    assert upload.sizes() == {
        ADAPTER_FILE: file.stat().st_size,
        "README.md": len(upload.card.encode()),
        name: len(head),
    }
    assert f"![Preview]({name})" in upload.card
    assert upload.identity == open_adapter(file).identity()
