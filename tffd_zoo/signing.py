"""Who released an export, where its hashes only tell that it is whole: signatures by sigstore's `model-signing`.

What is signed is `SHA256SUMS`, which covers every other file, so that a signature is checked without downloading all of
them. Anyone can do so: `model_signing verify key SHA256SUMS --signature model.sig --public_key KEY`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import ModuleType

from .export_record import SIGNATURE, SUMS

SIGNER = "TFFD_ZOO_SIGNER"
"""Environment variable with the file of the public key (PEM) whose signatures are trusted. Where it is set, an export
without one is refused."""

_logger = logging.getLogger(__name__)


def sign_export(folder: Path, private_key: Path) -> None:
    """Sign an export with an elliptic-curve key (PEM).

    Raises:
        ValueError: the key cannot be used, or `model-signing` is missing.
    """
    try:
        config = _model_signing().signing.Config().use_elliptic_key_signer(private_key=private_key)
        config.sign(folder / SUMS, folder / SIGNATURE)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{private_key} cannot sign: {' '.join(str(error).split())}") from error


def check_signature(name: str, sums: Path, signature: Path | None) -> None:
    """Hold the signature over `sums` against the signer that this machine trusts.

    Args:
        name: what is loaded, for messages.
        sums: its `SHA256SUMS`.
        signature: the signature beside it; None where there is none.

    Raises:
        ValueError: it is not the trusted signer's, or there is none where one is wanted.
    """
    key = os.environ.get(SIGNER)
    if key is None:
        if signature is not None:
            _logger.warning(
                "%s is signed, but not checked: set %s to the file of its signer's public key", name, SIGNER
            )
        return
    if signature is None:
        raise ValueError(f"{name} is not signed, and {SIGNER} asks for it; unset {SIGNER} to load it all the same")
    if not Path(key).is_file():
        raise ValueError(f"{SIGNER}: there is no file {key}; name the signer's public key")
    config = _model_signing().verifying.Config().use_elliptic_key_verifier(public_key=key)
    try:
        config.verify(sums, signature)
    except Exception as error:  # cryptography, protobuf and the library itself: no common base
        raise ValueError(
            f"{name} is not signed with the key {key} ({type(error).__name__}); do not use it, or trust its signer"
        ) from error


def _model_signing() -> ModuleType:
    try:
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise ValueError(f"signatures need model-signing ({error}): pip install 'tffd_zoo[sign]'") from error
    return model_signing
