"""`locate`: local folders, the huggingface_hub cache offline, and a small Hub on 127.0.0.1."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from csulora_cli.adapter import read_adapter
from csulora_cli.api import fix_adapter
from csulora_cli.errors import HostError, HubError, InputError, UsageError
from csulora_cli.locate import ADAPTER_FILES, MODEL_FILES, locate, locate_model
from csulora_cli.settings import FixSettings

COMMIT, OLDER = "c0ffee" + "0" * 34, "decade" + "1" * 34
CONSTANTS = "huggingface_hub.constants"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty huggingface_hub cache."""
    folder = tmp_path / "cache" / "hub"
    folder.mkdir(parents=True)
    monkeypatch.setattr(f"{CONSTANTS}.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(f"{CONSTANTS}.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, and no network."""
    monkeypatch.setattr(f"{CONSTANTS}.HF_HUB_OFFLINE", True)
    return cache


def put_in_cache(cache: Path, repo: str, source: Path, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """What a download leaves: blobs without suffix, and links to them."""
    repository = cache / f"models--{repo.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    for file in source.iterdir():
        data = file.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        (snapshot / file.name).symlink_to(Path("../../blobs") / digest)
    if ref is not None:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return snapshot


# Local


def test_a_folder_wins_over_a_hub_id(offline: Path, adapters: Callable[..., Path], tmp_path: Path) -> None:
    put_in_cache(offline, "org/name", adapters("llama"))
    assert locate("org/name", ADAPTER_FILES).repo_id == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    found = locate("org/name", ADAPTER_FILES)
    assert (found.folder, found.repo_id, found.commit) == (Path("org/name"), None, None)
    assert found.label == "name"


def test_a_file_stands_for_its_folder(adapters: Callable[..., Path]) -> None:
    folder = adapters("llama")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert locate(str(folder / name), ADAPTER_FILES).folder == folder
    with pytest.raises(InputError, match="neither a folder nor a Hub id"):
        locate(str(folder / "README.md"), ADAPTER_FILES)


@pytest.mark.parametrize(
    "given",
    [
        "./org/name",
        "/org/name",
        "~/org/name",
        "a/b/c",
        "org/na me",
        "",
        "org/n\x1b[0m",
        "...",
        "org/../name",
        "org/name\n",
        "-x/--name",
        "org/name.git",
        "a--b/c",
        "https://huggingface.co/org/name",
    ],
)
def test_what_is_neither_is_an_input_error(given: str, offline: Path) -> None:
    with pytest.raises(InputError) as caught:
        locate(given, ADAPTER_FILES)
    assert "neither a folder nor a Hub id" in caught.value.message
    assert "\x1b" not in caught.value.message
    assert caught.value.hint


def test_a_revision_of_a_folder_is_a_usage_error(adapters: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="does not apply to the local folder"):
        locate(str(adapters("llama")), ADAPTER_FILES, "main")


# Offline


def test_offline_takes_the_cache(offline: Path, adapters: Callable[..., Path]) -> None:
    snapshot = put_in_cache(offline, "org/name", adapters("llama"))
    found = locate("org/name", ADAPTER_FILES)
    assert found.folder == snapshot
    assert (found.repo_id, found.commit, found.name, found.label) == ("org/name", COMMIT, "name", "org/name")
    assert len(read_adapter(found.folder).sites) == 14


@pytest.mark.parametrize(("given", "revision"), [("org/name@v1", None), ("org/name", "v1"), ("org/name@v1", "v1")])
def test_offline_takes_the_revision(
    given: str, revision: str | None, offline: Path, adapters: Callable[..., Path]
) -> None:
    put_in_cache(offline, "org/name", adapters("llama"))
    put_in_cache(offline, "org/name", adapters("llama", r=3), OLDER, "v1")
    found = locate(given, ADAPTER_FILES, revision)
    assert (found.commit, found.given, found.label) == (OLDER, given, "org/name")
    assert read_adapter(found.folder).ranks == [3]
    assert locate(f"org/name@{COMMIT}", ADAPTER_FILES).commit == COMMIT


def test_two_revisions_are_a_usage_error(offline: Path) -> None:
    with pytest.raises(UsageError, match="two revisions given: v1 and v2"):
        locate("org/name@v1", ADAPTER_FILES, "v2")


def test_offline_without_the_files_says_so(offline: Path) -> None:
    for given in ("org/name", "org/name@v1", f"org/name@{OLDER}"):
        with pytest.raises(HubError, match="is no folder here, and the Hub cannot be reached") as caught:
            locate(given, ADAPTER_FILES)
        assert "HF_HUB_OFFLINE" in caught.value.hint


def test_a_repair_from_the_cache_records_ids_and_commits(
    offline: Path, hosts: Callable[..., Path], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    source = adapters("llama")
    put_in_cache(offline, "org/my-adapter", source)
    put_in_cache(offline, "org/host", hosts("llama"), OLDER)
    report = fix_adapter(FixSettings("org/my-adapter", base="org/host@main", unaligned=str(hosts("llama", seed=7))))
    out = tmp_path / "my-adapter-csulora"
    assert report.out == "my-adapter-csulora"
    assert (report.inputs["adapter"].name, report.inputs["adapter"].commit) == ("org/my-adapter", COMMIT)
    assert (report.inputs["host"].name, report.inputs["host"].commit) == ("org/host", OLDER)
    assert 'base_model: "org/host"' in (out / "README.md").read_text()
    assert not any(path.is_symlink() for path in out.iterdir())
    assert str(tmp_path) not in (out / "csulora.json").read_text() + (out / "README.md").read_text()


# A small Hub


class Hub(ThreadingHTTPServer):
    """Serves models as the Hub does, as far as huggingface_hub asks."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Path] = {}
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repo, kind, rest = (
            "/".join(parts[2:4] if is_api else parts[:2]),
            *self._rest(parts[4:] if is_api else parts[2:]),
        )
        if repo == "org/gated":
            return self._fail(401 if is_api else 403, "GatedRepo", "Access to model org/gated is restricted.")
        if repo == "org/broken":
            return self._fail(500, "", "out of order \x1b[31m")
        if repo not in self.server.repositories:  # the Hub says 401 to who is not logged in: it may be private
            return self._fail(401, "RepoNotFound", "Invalid username or password.")
        if rest[:1] not in (["main"], [COMMIT]):
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {rest[:1]}")
        folder = self.server.repositories[repo]
        files = sorted(path for path in folder.iterdir())
        if is_api and kind == "revision":
            siblings = [{"rfilename": path.name} for path in files]
            return self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []})
        if is_api and kind == "tree":
            return self._json(
                [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _blob_id(p)} for p in files]
            )
        file = folder / rest[-1]
        if not file.exists():
            return self._fail(404, "EntryNotFound", "Entry not found")
        self.server.fetched.append(file.name)
        return self._answer(200, file.read_bytes(), {"ETag": f'"{_blob_id(file)}"', "X-Repo-Commit": COMMIT})

    @staticmethod
    def _rest(parts: list[str]) -> tuple[str, list[str]]:
        return (parts[0], parts[1:]) if parts else ("revision", ["main"])

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message.replace("\x1b", "")} | ({"X-Error-Code": code} if code else {})
        self._answer(status, json.dumps({"error": message}).encode(), headers)

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _blob_id(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on 127.0.0.1 that huggingface_hub asks in the place of the real one."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(f"{CONSTANTS}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{CONSTANTS}.ENDPOINT", server.url)
    monkeypatch.setattr(
        f"{CONSTANTS}.HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    from huggingface_hub.utils import _http

    _http.close_session()
    yield server
    server.shutdown()
    server.server_close()
    _http.close_session()


def test_an_adapter_is_fetched_and_cached(hub: Hub, adapters: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "published"
    source.mkdir()
    for file in adapters("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "optimizer.pt").write_bytes(b"large and not wanted")
    (source / "evil.py").write_text("raise SystemExit")
    hub.repositories["org/name"] = source
    found = locate("org/name", ADAPTER_FILES)
    assert (found.repo_id, found.commit) == ("org/name", COMMIT)
    assert len(read_adapter(found.folder).sites) == 14
    assert "adapter_model.safetensors" in hub.fetched
    assert not {"optimizer.pt", "evil.py"} & set(hub.fetched)
    hub.fetched.clear()
    assert locate("org/name@main", ADAPTER_FILES).folder == found.folder
    assert locate(f"org/name@{COMMIT}", ADAPTER_FILES).folder == found.folder


def test_a_cached_model_is_taken_while_the_hub_is_down(
    hub: Hub, hosts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/host"] = hosts("llama")
    found = locate("org/host", MODEL_FILES)
    monkeypatch.setattr(f"{CONSTANTS}.HF_HUB_OFFLINE", True)
    assert locate("org/host", MODEL_FILES) == found


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ("org/nothing", "org/nothing is neither a folder here nor a repository on the Hub", "hf auth login"),
        ("org/gated", "org/gated is gated on the Hub", "Accept its terms"),
        ("org/name@v9", "org/name@v9 has no revision v9", "revision"),
        ("org/broken", "org/broken is no folder here, and the Hub cannot be reached", "network"),
    ],
)
def test_what_the_hub_refuses_is_a_hub_error(
    given: str, message: str, hint: str, hub: Hub, adapters: Callable[..., Path]
) -> None:
    hub.repositories["org/name"] = adapters("llama")
    with pytest.raises(HubError) as caught:
        locate(given, ADAPTER_FILES)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\x1b" not in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 4


def published(folder: Path, *names: str) -> Path:
    """A repository of small files."""
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_repository_of_one_gguf_file_is_that_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/gguf"] = published(tmp_path / "published", "tiny.gguf", "README.md", "config.json")
    found = locate_model("org/gguf", MODEL_FILES, "host")
    assert (found.repo_id, found.commit, found.gguf, found.label) == ("org/gguf", COMMIT, "tiny.gguf", "org/gguf")
    assert (found.folder / "tiny.gguf").read_bytes() == b"tiny.gguf"
    assert locate_model(f"org/gguf@{COMMIT}", MODEL_FILES, "host").folder == found.folder
    monkeypatch.setattr(f"{CONSTANTS}.HF_HUB_OFFLINE", True)
    assert locate_model("org/gguf", MODEL_FILES, "host") == found


def test_of_several_gguf_files_only_the_named_one_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/gguf"] = published(tmp_path / "published", "q4.gguf", "q8.gguf", "config.json")
    with pytest.raises(HostError, match=r"the host org/gguf has 2 GGUF files and no safetensors: q4") as caught:
        locate_model("org/gguf", MODEL_FILES, "host")
    assert caught.value.hint == "Name one of them: org/gguf/q4.gguf"
    for given in ("org/gguf/q8.gguf", "org/gguf/q8.gguf@main"):
        found = locate_model(given, MODEL_FILES, "host")
        assert (found.given, found.repo_id, found.commit, found.gguf) == (given, "org/gguf", COMMIT, "q8.gguf")
    assert "q4.gguf" not in hub.fetched
    with pytest.raises(HubError, match=r"org/gguf/q5\.gguf is not in its repository"):
        locate_model("org/gguf/q5.gguf", MODEL_FILES, "host")


def test_gguf_files_beside_safetensors_are_not_fetched(hub: Hub, hosts: Callable[..., Path], tmp_path: Path) -> None:
    hub.repositories["org/both"] = folder = published(tmp_path / "published", "q4.gguf")
    for file in hosts("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert locate_model("org/both", MODEL_FILES, "host").gguf is None
    assert "q4.gguf" not in hub.fetched


def test_a_listing_that_fails_is_a_hub_error(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/gguf"] = published(tmp_path / "published", "q4.gguf", "config.json")

    def fail(*_args: object, **_options: object) -> None:
        raise RuntimeError("the line is cut \x1b[31m")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", fail)
    with pytest.raises(HubError, match=r"cannot list the files of org/gguf: the line is cut \\x1b"):
        locate_model("org/gguf", MODEL_FILES, "host")


def test_a_repository_without_an_adapter_is_noticed(hub: Hub, hosts: Callable[..., Path], tmp_path: Path) -> None:
    hub.repositories["org/host"] = hosts("llama")
    with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
        fix_adapter(FixSettings("org/host", base=str(hosts("llama")), out=tmp_path / "out"))
    assert "model.safetensors" not in hub.fetched


def test_no_hub_at_all_is_a_hub_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{CONSTANTS}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{CONSTANTS}.ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(HubError, match="the Hub cannot be reached"):
        locate("org/name", ADAPTER_FILES)
