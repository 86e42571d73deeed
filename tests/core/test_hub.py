"""Names and paths become folders, through a stub of the hub on this machine; every failure is one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.file_download
import pytest

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files import hub
from gpt2_multi.files.hub import ARCHIVE
from gpt2_multi.model.config import GPT2Config

CONFIG = json.dumps({"model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 8}).encode()


class StubHub(ThreadingHTTPServer):
    """The requests that snapshot_download makes, answered from memory: {repo: {revision: {file: content}}}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.seen: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self.status: int | None = None  # what every request gets instead of an answer
        self.error_code = ""
        self.cut = 0  # bytes that are missing at the end of every file sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def sha(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


class _Answers(BaseHTTPRequestHandler):
    server: StubHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.seen.append((self.command, path, self.headers.get("Authorization")))
        if self.server.status:
            return self.refuse(self.server.status, self.server.error_code)
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repo, (verb, revision, *name) = "/".join(parts[:2]), [*parts[2:], "main", ""][: max(len(parts) - 2, 2)]
        revisions = self.server.repos.get(repo)
        if revisions is None:
            return self.refuse(401 if api else 404, "RepoNotFound")
        if verb == "main":
            verb, revision = "revision", "main"
        files = next((found for key, found in revisions.items() if revision in (key, sha(key))), None)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        commit = next(sha(key) for key in revisions if revision in (key, sha(key)))
        if verb == "revision":
            names = [{"rfilename": name} for name in files]  # which versions before 1 read instead of the tree
            return self.send_json({"id": repo, "sha": commit, "siblings": names})
        if verb == "tree":
            return self.send_json(
                [{"type": "file", "path": path, "size": len(data), "oid": sha(path)} for path, data in files.items()]
            )
        return self.send_file(files["/".join(name)], commit)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, value: object) -> None:
        self.send_file(json.dumps(value).encode(), "", "application/json")

    def send_file(self, data: bytes, commit: str, kind: str = "application/octet-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) - self.server.cut] if commit else data)


@contextlib.contextmanager
def serving() -> Iterator[StubHub]:
    with StubHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    """A running hub with one model, which huggingface_hub takes for the real one, and an empty cache."""
    with serving() as server:
        server.repos["stub/model"] = {
            "main": {"config.json": CONFIG, "vocab.json": b"{}", "pytorch_model.bin": b"x" * 99, "README.md": b"hello"},
            "v2": {"config.json": CONFIG.replace(b"3", b"5")},
        }
        use(monkeypatch, server.url, tmp_path / "cache")
        yield server
        close_session()


def close_session() -> None:
    """Forget the connections to a stub; before version 1 the call had another name."""
    from huggingface_hub import utils

    (getattr(huggingface_hub, "close_session", None) or utils.reset_sessions)()


def use(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    at(monkeypatch, url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    for module in (huggingface_hub.constants, huggingface_hub.file_download):  # the latter before version 1
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def refusal(name: str | os.PathLike[str], **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_returned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("gpt2") == Path("gpt2")


def test_demo_is_the_package_s_own_folder() -> None:
    import gpt2_multi

    assert hub.resolve("demo") == Path(gpt2_multi.__file__).parent / "demo"


@pytest.mark.parametrize("name", ["./nope", "../nope", "/x/y", "~/nope", "nope/", "a/b/c", "C:\\nope", ""])
def test_a_missing_path_is_never_asked_of_the_hub(stub: StubHub, name: str) -> None:
    assert "there is no such folder; check the path" in refusal(name)
    assert stub.seen == []


def test_a_path_object_is_never_asked_of_the_hub(stub: StubHub) -> None:
    assert "there is no such folder" in refusal(Path("stub") / "model")
    assert stub.seen == []


def test_a_file_is_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    assert "expected a model folder, found a file" in refusal(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["a b", "-x", "a..b", "nul\0byte", "x" * 5000])
def test_a_name_that_the_hub_could_not_have(stub: StubHub, name: str) -> None:
    assert "neither a folder here nor a name that the hub could have; expected owner/name" in refusal(name)


def test_a_model_is_fetched_without_what_it_does_not_need(stub: StubHub) -> None:
    folder = hub.resolve("stub/model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin", "vocab.json"]
    assert (folder / "config.json").read_bytes() == CONFIG


def test_of_several_formats_the_first_is_fetched(stub: StubHub) -> None:
    weights = ("pytorch_model.bin", "model-00001-of-00001.safetensors", "tf_model.h5", "flax_model.msgpack")
    stub.repos["stub/all"] = {"main": {"config.json": CONFIG, **dict.fromkeys(weights, b"x")}}
    assert sorted(path.name for path in hub.resolve("stub/all").iterdir()) == ["config.json", weights[1]]
    stub.repos["stub/flax"] = {"main": {"config.json": CONFIG, "flax_model.msgpack": b"x"}}
    assert sorted(path.name for path in hub.resolve("stub/flax").iterdir()) == ["config.json", "flax_model.msgpack"]


def test_allow_patterns_say_what_is_fetched(stub: StubHub) -> None:
    folder = hub.resolve("stub/model", allow_patterns=["*.bin"])
    assert [path.name for path in folder.iterdir()] == ["pytorch_model.bin"]


def test_a_subfolder_and_a_variant_are_fetched(stub: StubHub) -> None:
    files = ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors")
    index = "model.safetensors.index.fp16.json"
    stub.repos["stub/model"]["main"] |= {f"a/{name}": b"1" for name in (*files, index, "config.json", "other.bin")}
    stub.repos["stub/model"]["main"] |= {"a/model.safetensors": b"2", "model.fp16.safetensors": b"3"}
    found = hub.resolve("stub/model", subfolder="a", variant="fp16")
    assert sorted(path.name for path in found.iterdir()) == ["config.json", *files, index]
    found = hub.resolve("stub/model", variant="fp16", kinds=["pytorch", "safetensors"], force_download=True)
    assert (found / "model.fp16.safetensors").read_bytes() == b"3" and not (found / "pytorch_model.bin").exists()
    assert hub.resolve("stub/model", subfolder="a", local_files_only=True, allow_patterns=["config.json"]).name == "a"


@pytest.mark.parametrize("short", ARCHIVE)
def test_short_names_are_hub_names(stub: StubHub, short: str) -> None:
    stub.repos[ARCHIVE[short].hub_id] = {"main": {"config.json": CONFIG}}
    assert (hub.resolve(short) / "config.json").read_bytes() == CONFIG


def test_a_revision_is_asked_for(stub: StubHub) -> None:
    assert GPT2Config.from_pretrained("stub/model", revision="v2").n_layer == 5
    assert GPT2Config.from_pretrained("stub/model").n_layer == 3
    assert "the hub has no revision 'v3' of it" in refusal("stub/model", revision="v3")


def test_the_token_goes_with_every_request(stub: StubHub) -> None:
    hub.resolve("stub/model", token="hf_secret")
    assert {token for _, _, token in stub.seen} == {"Bearer hf_secret"}


def test_without_a_token_none_is_sent(stub: StubHub) -> None:
    hub.resolve("stub/model")
    assert {token for _, _, token in stub.seen} == {None}


def test_the_cache_answers_where_the_hub_is_down(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.resolve("stub/model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    at(monkeypatch, f"http://127.0.0.1:{port}")  # nobody listens there
    asked = len(stub.seen)
    assert hub.resolve("stub/model") == first
    assert len(stub.seen) == asked


def test_a_hub_that_never_answers_is_given_up(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and says nothing
        at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "could not be fetched (timed out); check the network" in refusal("stub/model")


def test_local_files_only_asks_nobody(stub: StubHub) -> None:
    message = refusal("stub/model", local_files_only=True)
    assert message.endswith("the hub may not be asked; fetch it once without local_files_only")
    assert stub.seen == []
    folder = hub.resolve("stub/model")
    asked = len(stub.seen)
    assert hub.resolve("stub/model", local_files_only=True) == folder
    assert len(stub.seen) == asked


def test_a_partly_cached_model_is_not_taken_for_a_whole_one(stub: StubHub) -> None:
    hub.resolve("stub/model", allow_patterns=["config.json"])
    assert "not (or not whole) in the cache" in refusal("stub/model", local_files_only=True)


def test_offline_mode(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal("stub/model").endswith("fetch it once without HF_HUB_OFFLINE")
    assert stub.seen == []


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "", "neither a folder here nor a model on the hub that this token can see (404)"),
        (401, "", "neither a folder here nor a model on the hub that this token can see (401)"),
        (403, "GatedRepo", "the hub refuses access (403); ask for access on its page"),
        (403, "", "the hub refuses access (403); ask for access on its page"),
        (500, "", "the hub answered with an error (500) and the cache lacks the model; try again later"),
    ],
)
def test_refusals_of_the_hub(stub: StubHub, status: int, code: str, expected: str) -> None:
    stub.status, stub.error_code = status, code
    assert expected in refusal("stub/model")


def test_a_model_that_the_hub_does_not_have(stub: StubHub) -> None:
    assert "neither a folder here nor a model on the hub" in refusal("stub/other")


def test_a_model_without_any_file_to_load(stub: StubHub) -> None:
    stub.repos["stub/empty"] = {"main": {"README.md": b"hello"}}
    assert "the hub has none of config.json, " in refusal("stub/empty")


def test_a_truncated_download_is_never_taken_for_a_file(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    stub.cut = len(CONFIG)  # so that no attempt gets further than the one before
    assert "stub/model: could not be fetched (" in refusal("stub/model")
    stub.cut = 0
    assert (hub.resolve("stub/model") / "config.json").read_bytes() == CONFIG


def test_a_model_loads_through_the_hub(stub: StubHub, tmp_path: Path) -> None:
    torch, pt = pytest.importorskip("torch"), pytest.importorskip("gpt2_multi.pt")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=7)
    model = pt.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "saved", max_shard_size="1KB")
    stub.repos["stub/model"]["main"] = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    loaded = pt.GPT2LMHeadModel.from_pretrained("stub/model")
    assert GPT2Config.from_pretrained("stub/model").vocab_size == 11
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_the_environment_s_settings_are_honoured(stub: StubHub, tmp_path: Path) -> None:
    code = "import sys; from gpt2_multi.files.hub import resolve; print(resolve('stub/model'))"
    env = {**os.environ, "HF_ENDPOINT": stub.url, "HF_HOME": str(tmp_path / "home")}
    env = {name: value for name, value in env.items() if name not in ("HF_HUB_CACHE", "HF_HUB_OFFLINE")}
    run = [sys.executable, "-c", code]
    first = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    assert Path(first.stdout.strip()).is_relative_to(tmp_path / "home")
    again = subprocess.run(run, env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True)
    assert again.stdout == first.stdout
