"""A digest of the library's code: another one for other code, the same in a checkout and an installation."""

from pathlib import Path

import pytest

from beit_jax import version


def test_every_room_counts() -> None:
    rooms = {"/".join(name.split("/")[:3]) for name in version.source_files()}
    assert {
        "beit_jax/version.py",
        "beit_jax/models/attention.py",
        "beit_jax/convert/formats",
        "beit_jax/train/loop",
    } <= {
        *rooms,
        *version.source_files(),
    }


@pytest.mark.parametrize("change", ["content", "name", "another file"])
def test_other_code_has_another_digest(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = version.source_digest()
    files, changed = version.source_files(), tmp_path / "layers.py"
    content = files["beit_jax/models/layers.py"].read_bytes()
    changed.write_bytes(content + b"#" if change == "content" else content)
    name = "beit_jax/models/layers.py" if change == "content" else "beit_jax/models/blocks.py"
    if change == "name":
        del files["beit_jax/models/layers.py"]
    monkeypatch.setattr(version, "source_files", lambda: files | {name: changed})
    assert version.source_digest() != before
    monkeypatch.undo()
    assert version.source_digest() == before
