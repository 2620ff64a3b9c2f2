"""A name becomes local files of one commit, or one line that says why not. The hub is one of our own, on loopback.

The letters are the rows of the fault catalogue these tests were written from.
"""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fake_hub
import huggingface_hub
import pytest
from fake_hub import FakeHub, Request

from beit_jax.convert.files.checkpoint import open_checkpoint
from beit_jax.errors import BeitJaxError
from beit_jax.hub import CONFIG, PROCESSOR, WEIGHT_FILES, WEIGHTS, Source, resolve
from beit_jax.weights import read_metadata

NAME = "org/model"
FILES = {CONFIG: b'{"some": "config"}', PROCESSOR: b'{"some": "processor"}', "model.safetensors": b"weights" * 1000}
INDEX = "model.safetensors.index.json"
SHARDS = {"model-00001-of-00002.safetensors": b"first", "model-00002-of-00002.safetensors": b"second"}
DIGITS = Path(__file__).parents[1] / "beit_jax" / "digits"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "huggingface" / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub, which is the one huggingface_hub asks; its cache is `cache`."""
    with FakeHub() as server:
        fake_hub.use(server.url, cache, monkeypatch)
        yield server
        huggingface_hub.close_session()


def refusal(*needles: str, name: str | Path = NAME, **options: Any) -> str:
    """The message with which a name is refused: one printable line, which begins with the name and holds `needles`."""
    with pytest.raises(BeitJaxError) as caught:
        resolve(name, **options)
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 600
    for needle in needles:
        assert needle in message, message
    return message


def contents(source: Source) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in source.directory.iterdir()}


def index_of(shards: dict[str, Any]) -> bytes:
    return json.dumps({"weight_map": shards}).encode()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def unplug(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the hub's port is one where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        fake_hub.use(f"http://127.0.0.1:{unused.getsockname()[1]}", cache, monkeypatch)


# Local paths and nonsense


def test_a_local_directory_or_file_is_itself(hub: FakeHub, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"")
    assert resolve(tmp_path) == resolve(str(tmp_path)) == Source(tmp_path, str(tmp_path), None)
    assert resolve(tmp_path).directory == resolve(file).directory == tmp_path
    assert resolve(file).path == file
    assert hub.requests == []


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == Source(tmp_path / "model", "~/model")


def test_a_local_path_wins_over_the_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(NAME, FILES)
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    assert resolve(NAME) == Source(Path(NAME), NAME)
    assert hub.requests == []


def test_a_revision_of_a_local_path_is_refused(tmp_path: Path) -> None:
    refusal(str(tmp_path), "revision", "local path", name=tmp_path, revision="main")


@pytest.mark.parametrize(
    "name",
    [
        *("", "beit", "a/b/c", "../model", "./model", "/org/model", "-x/y", "https://huggingface.co/org/model"),
        *("org/na me", "org/model.git", "org/a--b", "org/..", "~nobody-of-this-name/model", "öl/bild"),
        *("org/\x1b[31mred", "org/nul\0", "org/two\nlines", "org/half\ud800"),
        pytest.param("x" * 5000, id="5000 letters"),
        pytest.param("org/" + "x" * 300, id="300 letters after the slash"),
    ],
)
def test_nonsense_is_refused_without_asking_anyone(hub: FakeHub, name: str) -> None:
    refusal("no such file or directory, and not a hub name", name=name)
    assert hub.requests == []


def test_an_empty_revision_is_refused(hub: FakeHub) -> None:
    refusal("the revision is empty", revision="")
    assert hub.requests == []


# What is downloaded


def test_a_hub_name_becomes_its_files_at_their_commit(hub: FakeHub, cache: Path) -> None:
    commit = hub.push(NAME, FILES | {"README.md": b"", "pytorch_model.bin": b"", "tf_model.h5": b""})
    source = resolve(NAME)
    assert (source.name, source.revision) == (NAME, commit)
    assert source.path == source.directory
    assert source.path.is_relative_to(cache)
    assert contents(source) == FILES


def test_the_cache_directory_can_be_chosen(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    hub.push(NAME, FILES)
    assert resolve(NAME, cache_dir=tmp_path / "mine").path.is_relative_to(tmp_path / "mine")
    assert not cache.exists()


def test_a_home_directory_in_the_cache_directory_is_expanded(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    hub.push(NAME, FILES)
    source = resolve(NAME, cache_dir=Path("~/mine"))
    assert source.path.is_relative_to(tmp_path / "mine")
    hub.requests.clear()
    assert resolve(NAME, revision=source.revision, cache_dir=Path("~/mine")).path == source.path
    assert hub.requests == []


@pytest.mark.parametrize("number", range(len(WEIGHT_FILES)))
def test_weights_are_chosen_in_order_of_preference(hub: FakeHub, number: int) -> None:
    """B7: the most preferred of those there are, and no other byte."""
    available = {file: index_of({}) if file.endswith(".json") else b"weights" for file in WEIGHT_FILES[number:]}
    hub.push(NAME, {CONFIG: b"{}"} | available)
    assert set(contents(resolve(NAME))) == {CONFIG, WEIGHT_FILES[number]}
    assert hub.asked("GET") == [CONFIG, WEIGHT_FILES[number]]


def test_an_index_brings_its_shards(hub: FakeHub) -> None:
    first, second = SHARDS
    files = {CONFIG: b"{}", INDEX: index_of({"a": first, "b": second, "c": first}), **SHARDS}
    hub.push(NAME, files | {"model-00003-of-00003.safetensors": b"not listed"})
    assert contents(resolve(NAME)) == files
    assert hub.asked("GET").count(first) == 1


def test_a_listed_shard_that_the_hub_lacks_is_named(hub: FakeHub) -> None:
    first, second = SHARDS
    hub.push(NAME, {CONFIG: b"{}", INDEX: index_of({"a": first, "b": second}), first: b""})
    refusal(NAME, INDEX, second, "does not have")


@pytest.mark.parametrize(
    "entry", ["../secret", "..", ".", "", "/etc/passwd", "folder/x", "C:x", "\\\\host\\x", "nul\0", None, 3, ["x"]]
)
def test_only_plain_file_names_of_an_index_are_fetched(hub: FakeHub, entry: Any) -> None:
    """B1: the rest is for the reader to refuse, before it opens any shard."""
    first, second = SHARDS
    hub.push(NAME, {CONFIG: b"{}", INDEX: index_of({"a": first, "b": entry, "c": second}), **SHARDS})
    source = resolve(NAME)
    assert set(contents(source)) == {CONFIG, INDEX, *SHARDS}
    assert hub.asked("GET") == [CONFIG, INDEX, *SHARDS]
    with pytest.raises(BeitJaxError, match="expected the name of a file beside it"):
        open_checkpoint(source.path)


@pytest.mark.parametrize(
    "index",
    [
        *(b"", b"{", b"\xff", b"[]", b"3", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": "\\ud800"}}'),
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)
def test_a_broken_index_is_refused_in_one_line(hub: FakeHub, index: bytes) -> None:
    """B5: by whoever reads it first."""
    hub.push(NAME, {CONFIG: b"{}", INDEX: index})
    with pytest.raises(BeitJaxError) as caught:
        open_checkpoint(resolve(NAME).path)
    assert str(caught.value).isprintable()


def test_a_model_without_processor_is_complete(hub: FakeHub) -> None:
    files = {name: content for name, content in FILES.items() if name != PROCESSOR}
    hub.push(NAME, files)
    assert contents(resolve(NAME)) == files


def test_branches_tags_and_commits_are_revisions(hub: FakeHub) -> None:
    old = hub.push(NAME, FILES)
    tagged = hub.push(NAME, FILES | {CONFIG: b"tagged"}, branch="refs/pr/1")
    new = hub.push(NAME, FILES | {CONFIG: b"new"})
    for revision, commit in ((None, new), ("main", new), ("refs/pr/1", tagged), (old, old)):
        source = resolve(NAME, revision=revision)
        assert source.revision == commit
        assert contents(source) == hub.models[NAME].commits[commit]


def test_all_files_are_of_one_commit_when_the_branch_moves(hub: FakeHub) -> None:
    """B11: the later files of the commit that the first one resolved to, which is the one recorded."""
    old = hub.push(NAME, FILES)

    def move(request: Request) -> None:
        if request.file == PROCESSOR and len(hub.models[NAME].commits) == 1:
            hub.push(NAME, {name: content + b" of another day" for name, content in FILES.items()})

    hub.before = move
    source = resolve(NAME)
    assert len(hub.models[NAME].commits) == 2, "the branch did not move"
    assert source.revision == old
    assert contents(source) == FILES
    assert {request.revision for request in hub.requests if request.file != CONFIG} == {old}


def test_what_the_cache_knows_is_not_asked_again(hub: FakeHub) -> None:
    commit = hub.push(NAME, {name: content for name, content in FILES.items() if name != PROCESSOR})
    source = resolve(NAME)
    hub.requests.clear()
    assert resolve(NAME) == source
    assert [(request.method, request.file) for request in hub.requests] == [("HEAD", CONFIG)], "did the branch move?"
    hub.requests.clear()
    assert resolve(NAME, revision=commit) == source
    assert hub.requests == []


def test_a_file_that_a_new_commit_adds_is_found(hub: FakeHub) -> None:
    """The cache remembers that a commit lacks a file; of another commit that says nothing."""
    hub.push(NAME, {"README.md": b""})
    refusal(NAME, f"holds no {CONFIG}")
    commit = hub.push(NAME, FILES)
    assert resolve(NAME).revision == commit


# B10: refusals that tell one cause from another


@pytest.mark.parametrize("file", [CONFIG, PROCESSOR, "model.safetensors"])
@pytest.mark.parametrize(
    ("answer", "needle"),
    [
        (fake_hub.NO_MODEL, "no such path and no such model on the hub"),
        (fake_hub.UNAUTHORISED, "no such model on the hub (or it is private: set HF_TOKEN)"),
        (fake_hub.BAD_TOKEN, "the hub answered 401 Unauthorized; check HF_TOKEN"),
        (fake_hub.GATED, "access is restricted; accept its terms on the hub and set HF_TOKEN"),
        (fake_hub.NO_REVISION, "no such revision"),
        (fake_hub.Answer(403, None, "nothing for you\x1b[31m"), "the hub answered 403 Forbidden; check what HF_TOKEN"),
        (fake_hub.Answer(400), "the hub answered 400 Bad Request"),
        (fake_hub.Answer(429), "the hub answered 429 Too Many Requests; wait"),
        (fake_hub.Answer(500), "the hub answered 500 Internal Server Error"),
        (fake_hub.Answer(503), "the hub answered 503 Service Unavailable"),
        (fake_hub.NOT_A_HUB, "does not seem to be served by a Hugging Face Hub endpoint. If HF_ENDPOINT is set"),
        (fake_hub.HANG_UP, "the download of its config.json failed (RemoteProtocolError"),
    ],
)
def test_the_hubs_refusals_are_told_apart(hub: FakeHub, file: str, answer: fake_hub.Answer, needle: str) -> None:
    hub.push(NAME, FILES)
    hub.refusals[NAME, file] = answer
    refusal(f"{NAME}: ", needle.replace(CONFIG, "weights" if file == "model.safetensors" else file))


def test_an_unknown_model_is_refused(hub: FakeHub) -> None:
    refusal("org/other: no such path and no such model on the hub", name="org/other")


def test_an_unknown_revision_is_named(hub: FakeHub) -> None:
    hub.push(NAME, FILES)
    refusal(f"{NAME} at revision v2: no such revision", revision="v2")
    refusal(f"{NAME} at revision \\x1b[31m: no such revision", revision="\x1b[31m")


def test_a_model_without_config_or_weights_says_so(hub: FakeHub) -> None:
    hub.push(NAME, {"model.safetensors": b""})
    refusal(f"{NAME}: holds no {CONFIG}")
    hub.push(NAME, {CONFIG: b"{}", "tf_model.h5": b""})
    refusal(f"{NAME}: holds none of {', '.join(WEIGHT_FILES)}")


@pytest.mark.parametrize("status", [403, 500, 503])
@pytest.mark.parametrize("file", [PROCESSOR, "model.safetensors"])
def test_an_error_is_not_taken_for_a_missing_file(hub: FakeHub, file: str, status: int) -> None:
    """Nothing less preferred is taken, and nothing optional left out, because the hub was in trouble."""
    hub.push(NAME, FILES | {"pytorch_model.bin": b""})
    hub.refusals[NAME, file] = fake_hub.Answer(status)
    refusal(NAME, f"answered {status}")
    assert file not in hub.asked("GET")
    assert "pytorch_model.bin" not in hub.asked("HEAD")
    hub.refusals.clear()
    assert contents(resolve(NAME)) == FILES


# B10: without a network


def test_no_network_and_nothing_in_the_cache(cache: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    unplug(cache, monkeypatch)
    refusal(NAME, f"the cache lacks its {CONFIG}, and the hub cannot be reached (ConnectError: ")


def test_no_network_and_everything_in_the_cache(cache: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(NAME, {name: content for name, content in FILES.items() if name != PROCESSOR})
    source = resolve(NAME)
    unplug(cache, monkeypatch)
    assert resolve(NAME) == source


def test_no_network_and_part_of_it_in_the_cache(cache: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(NAME, FILES)
    huggingface_hub.hf_hub_download(NAME, CONFIG)
    unplug(cache, monkeypatch)
    refusal(NAME, f"the cache lacks its {PROCESSOR}, and the hub cannot be reached")


def test_offline_mode_and_nothing_in_the_cache(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(NAME, FILES)
    go_offline(monkeypatch)
    refusal(NAME, f"the cache lacks its {CONFIG}, and offline mode is on (HF_HUB_OFFLINE)")
    refusal(f"{NAME} at revision v1", "offline mode is on", revision="v1")
    assert hub.requests == []


@pytest.mark.parametrize("left_out", [None, PROCESSOR])
def test_offline_mode_and_everything_in_the_cache(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, left_out: str | None
) -> None:
    hub.push(NAME, {name: content for name, content in FILES.items() if name != left_out})
    source = resolve(NAME)
    hub.requests.clear()
    go_offline(monkeypatch)
    assert resolve(NAME) == resolve(NAME, revision=source.revision) == source
    assert hub.requests == []


def test_offline_mode_takes_what_another_program_downloaded(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.push(NAME, FILES | {"pytorch_model.bin": b"pickle"})
    for file in (CONFIG, PROCESSOR, "pytorch_model.bin"):
        huggingface_hub.hf_hub_download(NAME, file)
    go_offline(monkeypatch)
    source = resolve(NAME)
    assert source.revision == commit
    assert set(contents(source)) == {CONFIG, PROCESSOR, "pytorch_model.bin"}


@pytest.mark.parametrize(("missing", "called"), [(PROCESSOR, PROCESSOR), ("model.safetensors", "weights")])
def test_offline_mode_does_not_take_unknown_for_absent(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, missing: str, called: str
) -> None:
    hub.push(NAME, FILES)
    for file in FILES.keys() - {missing}:
        huggingface_hub.hf_hub_download(NAME, file)
    go_offline(monkeypatch)
    refusal(NAME, f"the cache lacks its {called}, and offline mode is on")


# B12: downloads that end early


def names_below(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*")}


def test_a_broken_connection_leaves_no_file_and_a_second_try_succeeds(hub: FakeHub, cache: Path) -> None:
    hub.push(NAME, FILES)
    hub.cuts["model.safetensors"] = 3000
    refusal(NAME, "the download of its weights failed (RemoteProtocolError: ", "nothing incomplete was kept, run again")
    assert names_below(cache / "models--org--model" / "snapshots") >= {CONFIG, PROCESSOR}
    assert "model.safetensors" not in names_below(cache)
    assert not [name for name in names_below(cache) if name.endswith(".incomplete")]
    assert len(list((cache / "models--org--model" / "blobs").iterdir())) == 2

    hub.cuts.clear()
    assert contents(resolve(NAME)) == FILES


def test_a_connection_that_breaks_once_is_resumed(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.push(NAME, FILES)
    hub.cuts["model.safetensors"] = 3000

    def heal(request: Request) -> None:
        if request.start:
            hub.cuts.clear()

    hub.before = heal
    assert contents(resolve(NAME)) == FILES
    assert [request.start for request in hub.requests if request.file == "model.safetensors"] == [0, 0, 3000]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_leaves_nothing(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(url: str, temp_file: BinaryIO, **options: Any) -> None:
        temp_file.write(b"what still fits")
        raise OSError(number, os.strerror(number))

    hub.push(NAME, FILES)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", full)
        refusal(f"{NAME}: the disk of the cache is full")
    assert not names_below(cache) & {CONFIG, PROCESSOR, "model.safetensors"}
    assert not [name for name in names_below(cache) if name.endswith(".incomplete")]
    assert contents(resolve(NAME)) == FILES


def test_a_cache_that_cannot_be_written_is_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.push(NAME, FILES)
    (tmp_path / "file").write_bytes(b"")
    refusal(NAME, "the cache cannot be used", str(tmp_path / "file"), cache_dir=tmp_path / "file")


# The command


def run(hub: FakeHub, cache: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "beit_jax", *arguments],
        env=fake_hub.environment(hub.url, cache),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_convert_takes_a_hub_name_and_records_the_commit(tmp_path: Path, cache: Path) -> None:
    files = {name: (DIGITS / name).read_bytes() for name in (CONFIG, PROCESSOR, "model.safetensors")}
    with FakeHub() as hub:
        commit = hub.push("org/digits", files, branch="v1")
        hub.push("org/digits", files | {CONFIG: b"not this one"})
        done = run(hub, cache, tmp_path, "convert", "org/digits", "native", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert set(names_below(tmp_path / "native")) == {CONFIG, PROCESSOR, WEIGHTS}
    provenance = json.loads(read_metadata(tmp_path / "native" / WEIGHTS)["provenance"])
    assert (provenance["source"], provenance["revision"]) == ("org/digits", commit)
    assert list(provenance["files"]) == ["model.safetensors"]


def test_convert_of_an_unknown_model_is_one_line_and_writes_nothing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "work").mkdir()
    with FakeHub() as hub:
        done = run(hub, cache, tmp_path / "work", "convert", "org/unknown", "native")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: org/unknown: no such path and no such model on the hub")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    assert list((tmp_path / "work").iterdir()) == []


# Adapters: never ignored


def test_an_adapter_beside_the_weights_comes_with_them(hub: FakeHub) -> None:
    hub.push(NAME, FILES | {"adapter_config.json": b"{}"})
    with pytest.raises(BeitJaxError, match=r"adapter_config.json: an adapter.*merge_and_unload"):
        open_checkpoint(resolve(NAME).path)


def test_an_adapter_without_a_model(hub: FakeHub) -> None:
    """It comes as it is; where a model is read it is refused with the way out, which is to name its base."""
    hub.push(NAME, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"})
    found = resolve(NAME).path
    assert {path.name for path in found.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(BeitJaxError, match=r"adapter_config.json: an adapter.*--base"):
        open_checkpoint(found)


def test_an_adapter_without_weights(hub: FakeHub) -> None:
    hub.push(NAME, {"adapter_config.json": b"{}"})
    refusal("an adapter without weights")
