"""Signatures: made and checked by model-signing, wanted where a signer is named, refused where anything was changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from small_export import small_export

from tffd_zoo.export import rewrite_card
from tffd_zoo.export_record import verify_export, write_sums
from tffd_zoo.loading import load_model
from tffd_zoo.signing import SIGNER, sign_export


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A new private and public key."""
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "private.pem", folder / "public.pem"
    pem = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A signed export, and the public key of its signer."""
    folder = tmp_path_factory.mktemp("signed")
    private, public = make_keys(folder / "keys")
    export = small_export(folder / "run") / "export"
    sign_export(export, private)
    return export, public


def test_a_signed_export_loads_where_its_signer_is_trusted(
    signed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    export, public = signed
    monkeypatch.setenv(SIGNER, str(public))
    assert load_model(f"local-dir:{export}").num_classes == 10
    assert caplog.text == ""


def test_a_signature_that_nobody_can_check_is_said_to_be_unchecked(
    signed: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SIGNER, raising=False)
    load_model(f"local-dir:{signed[0]}")
    assert "is signed, but not checked" in caplog.text


def test_another_signer_no_signature_and_other_files_are_refused(
    signed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, public = signed
    _, stranger = make_keys(tmp_path / "stranger")
    monkeypatch.setenv(SIGNER, str(stranger))
    with pytest.raises(ValueError, match="is not signed with the key"):
        load_model(f"local-dir:{export}")

    monkeypatch.setenv(SIGNER, str(public))
    changed = tmp_path / "changed"
    shutil.copytree(export, changed)
    (changed / "README.md").write_text("another card")
    write_sums(changed)  # the hashes are right again, the signature over them is not
    verify_export(changed)
    with pytest.raises(ValueError, match="is not signed with the key"):
        load_model(f"local-dir:{changed}")
    rewrite_card(changed)  # what is written anew is signed anew
    with pytest.raises(ValueError, match=f"is not signed, and {SIGNER} asks for it"):
        load_model(f"local-dir:{changed}")


def test_a_key_that_is_none_is_named(signed: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(ValueError, match=r"key\.pem cannot sign"):
        sign_export(signed[0], tmp_path / "key.pem")
