"""An export on the hub: refused before anything is uploaded, shown, and one commit. The hub is one of our own."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_hub
import huggingface_hub
import pytest
import yaml
from fake_upload import TOKEN, FakeUploads, Repository
from tiny_models import KINDS, TINY, checkpoint

from beit_jax.cli.main import main
from beit_jax.publishing import card
from beit_jax.weights.native import save

NAME = "someone/tiny-beit"
LICENSED = ["--license", "apache-2.0"]
HUB = {"source": "microsoft/beit-base", "revision": "c0ffee", "files": {"model.safetensors": "ab"}}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUploads]:
    """The hub, which is the one huggingface_hub asks, signed in."""
    with FakeUploads() as server:
        fake_hub.use(server.url, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A converted checkpoint of the hub."""
    return written(
        tmp_path, {"source": "microsoft/beit-base", "revision": "c0ffee", "files": {"model.safetensors": "ab"}}
    )


def written(tmp_path: Path, provenance: dict[str, Any], kind: str = "classification") -> Path:
    directory = tmp_path / "run" / "model"
    directory.mkdir(parents=True)
    save(directory, replace(checkpoint(KINDS[kind]), provenance=provenance))
    return directory


@pytest.fixture
def export(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `beit-jax export NATIVE DEST ...`; returns the exit code and what it wrote."""

    def run(*options: str) -> tuple[int, str, str]:
        code = main(["export", str(native), str(tmp_path / "dest"), *options])
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


Export = Callable[..., tuple[int, str, str]]


def metadata(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_what_is_uploaded_is_what_was_written_and_shown(hub: FakeUploads, export: Export, tmp_path: Path) -> None:
    code, out, error = export("--push", NAME, *LICENSED, "--private")
    assert (code, error) == (0, ""), hub.requests
    repository = hub.repositories[NAME]
    assert repository.private
    del repository.files[".gitattributes"]
    assert repository.files == {path.name: path.read_bytes() for path in (tmp_path / "dest").iterdir()}
    assert set(repository.files) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    shown = out[: out.index("uploaded ")]
    for name, content in repository.files.items():
        assert any(name in line and f"{len(content):,} bytes" in line for line in shown.splitlines()), (name, shown)
    assert "a new private repository" in shown
    assert "/commit/c0ffee" in out
    assert len([request for request in hub.written() if "/commit/" in request]) == 1


def test_the_card_says_what_it_is_and_how_to_load_it(hub: FakeUploads, export: Export) -> None:
    assert export("--push", NAME, *LICENSED)[0] == 0
    text = hub.repositories[NAME].files["README.md"].decode()
    assert metadata(text) == {
        "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "image-classification",
        "base_model": "microsoft/beit-base", "tags": ["beit", "vision", "beit-jax"],
    }  # fmt: skip
    for said in (
        "3 classes: ant, bee, cat.", "[microsoft/beit-base](https://huggingface.co/microsoft/beit-base) at revision "
        "`c0ffee`", "`model.safetensors`: SHA-256 `ab`", f'AutoModelForImageClassification.from_pretrained("{NAME}")',
        f'beit_jax.from_pretrained("{NAME}")', "as the uploader states it: apache-2.0",
    ):  # fmt: skip
        assert said in text, said
    assert "## Scores" not in text
    assert "/run/" not in text


def test_a_trained_models_card_has_its_data_and_scores(tmp_path: Path) -> None:
    """And where it began, from the run's own record; and no path that the record holds."""
    record = {
        "source": "beit-jax train digits_finetune", "recipe": {"name": "digits_finetune", "data": "/home/me/digits"},
        "data": {"dataset": "digits", "split": "train", "records": 1347}, "step": 420,
        "scores": {"accuracy": 0.9778, "accuracy_top5": 1.0, "validation_loss": float("nan")},
    }  # fmt: skip
    directory = written(tmp_path, record)
    (directory.parent / "run.json").write_text(json.dumps({"start": HUB}))
    subject = card.Subject(NAME, "mit", "hf", TINY, record, card.start_of(directory))
    text = card.card(subject)
    found = metadata(text)
    assert found["base_model"] == "microsoft/beit-base"
    (result,) = found["model-index"]
    assert [(m["type"], m["value"]) for r in result["results"] for m in r["metrics"]] == [
        ("accuracy", 0.9778), ("accuracy_top5", 1.0)
    ]  # fmt: skip
    for said in ("trained by `beit-jax train digits\\_finetune`, 420 steps", "data: digits, split train, 1,347 records",
                 "| accuracy | 0.9778 |", "On the validation images of digits"):  # fmt: skip
        assert said in text, said
    assert "/home" not in text and "nan" not in text
    assert card.start_of(tmp_path / "elsewhere" / "model") is None


def test_a_local_source_is_no_name_and_no_path() -> None:
    record = {"source": "/home/someone/beit", "revision": None, "files": {"x.pth": None}, "naming": "timm"}
    text = card.card(card.Subject(NAME, "mit", "hf", TINY, record))
    assert "base_model" not in metadata(text)
    assert "/home" not in text
    assert "a local checkpoint, by the names of timm" in text


@pytest.mark.parametrize("layout", ["hf", "timm", "original", "peft", "stablehlo", "onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_card_is_yaml_and_python(kind: str, layout: str) -> None:
    text = card.card(card.Subject(NAME, "mit", layout, KINDS[kind], {}, notes=("# a <note>\nof two lines",)))
    assert metadata(text)["pipeline_tag"].startswith("image-")
    blocks = text.split("```python\n")[1:]
    assert blocks
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")
    assert "* \\# a \\<note\\> of two lines" in text or "* \\# a \\<note\\>\\\\nof two lines" in text


def test_labels_are_text_and_no_markup() -> None:
    config = replace(TINY, labels=("<script>", "[a](http://b)", "`c`"))
    text = card.card(card.Subject(NAME, "mit", "hf", config, {}))
    assert "<script>" not in text and "[a](http" not in text


def test_a_card_of_ones_own_is_kept(hub: FakeUploads, export: Export, tmp_path: Path) -> None:
    assert export("--push", NAME, *LICENSED)[0] == 0
    readme = tmp_path / "dest" / "README.md"
    readme.write_text(readme.read_text() + "stale")
    code, out, error = export("--push", NAME, *LICENSED, "--overwrite", "--into-existing")
    assert (code, error) == (0, "")
    assert b"stale" not in hub.repositories[NAME].files["README.md"]  # written again
    assert "replaces a file of this name" in out
    readme.write_text("mine")
    code, out, _ = export("--push", NAME, *LICENSED, "--overwrite", "--into-existing")
    assert code == 0
    assert hub.repositories[NAME].files["README.md"] == b"mine"
    assert "as you wrote it" in out


# --- Refused before anything is computed or uploaded ------------------------------------------------------------------


def refused(found: tuple[int, str, str], *needles: str) -> None:
    code, out, error = found
    assert (code, out) == (2, "")
    assert error.count("\n") == 1, error
    for needle in needles:
        assert needle in error, error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--push", "tiny-beit", *LICENSED], "expected OWNER/NAME"),
        (["--push", "../x", *LICENSED], "expected OWNER/NAME"),
        (["--push", "a/b/c", *LICENSED], "expected OWNER/NAME"),
        (["--push", "https://huggingface.co/a/b", *LICENSED], "expected OWNER/NAME"),
        (["--push", NAME], "give --license apache-2.0"),
        (["--push", NAME, "--license", "My own!"], "--license"),
        (["--private"], "--private: of --push OWNER/NAME"),
        (LICENSED, "--license: of --push OWNER/NAME"),
        (["--into-existing"], "--into-existing: of --push OWNER/NAME"),
    ],
)
def test_options_are_refused_without_asking_anyone(
    options: list[str], said: str, hub: FakeUploads, export: Export, tmp_path: Path
) -> None:
    refused(export(*options), said)
    assert hub.requests == []
    assert not (tmp_path / "dest").exists()


def test_without_a_token_one_line_says_how_to_get_one(
    hub: FakeUploads, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    refused(export("--push", NAME, *LICENSED), "hf auth login")
    assert hub.requests == []
    assert not (tmp_path / "dest").exists()


def test_a_wrong_token_is_one_line(
    hub: FakeUploads, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused(export("--push", NAME, *LICENSED), "answered 401", "hf auth login")
    assert hub.written() == []
    assert not (tmp_path / "dest").exists()


def test_offline_mode_and_no_network_are_one_line(
    hub: FakeUploads, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(export("--push", NAME, *LICENSED), "HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(export("--push", NAME, *LICENSED), "the hub cannot be reached", "nothing was uploaded")
    assert not (tmp_path / "dest").exists()


def test_a_repository_with_something_else_in_it_is_refused(hub: FakeUploads, export: Export, tmp_path: Path) -> None:
    hub.repositories[NAME] = Repository({".gitattributes": b"", "README.md": b"", "weights.bin": b"theirs"})
    refused(export("--push", NAME, *LICENSED), "holds README.md and 1 more", "--into-existing")
    assert hub.written() == []
    assert not (tmp_path / "dest").exists()
    assert export("--push", NAME, *LICENSED, "--into-existing")[0] == 0
    assert hub.repositories[NAME].files["weights.bin"] == b"theirs"


def test_an_empty_repository_is_filled_and_a_public_one_is_not_called_private(
    hub: FakeUploads, export: Export, tmp_path: Path
) -> None:
    hub.repositories[NAME] = Repository({".gitattributes": b""})
    refused(export("--push", NAME, *LICENSED, "--private"), "exists and is public")
    assert export("--push", NAME, *LICENSED)[0] == 0
    assert not [request for request in hub.requests if "create" in request]


def test_a_refused_upload_leaves_the_export(hub: FakeUploads, export: Export, tmp_path: Path) -> None:
    hub.refusals["/api/repos/create"] = 403
    code, out, error = export("--push", NAME, *LICENSED)
    assert code == 2
    assert "answered 403" in error and "nothing was uploaded" in error and error.count("\n") == 1
    assert (tmp_path / "dest" / "model.safetensors").exists()
    assert "uploaded " not in out


def test_what_cannot_be_exported_is_said_before_the_hub_is_asked(
    hub: FakeUploads, native: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(native), str(native), "--push", NAME, *LICENSED]) == 2
    assert "already exists" in capsys.readouterr().err
    assert hub.requests == []
