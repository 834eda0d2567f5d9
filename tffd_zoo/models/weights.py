"""Weight files: fetched from the Hub at a pinned commit, and checked before a tensor of theirs is used."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import safetensors.torch
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from .._version import __version__


def download(repo: str, commit: str, filename: str, cache_dir: Path | str | None = None) -> Path:
    """The path of a Hub repository's file in the local cache, fetched first if it is not there.

    It is the path of the bytes themselves, not of the link to them: deleting that is what makes the client fetch again.

    Raises:
        OSError: if it is not in the cache and cannot be fetched.
    """
    try:
        path = huggingface_hub.hf_hub_download(
            repo, filename, revision=commit, cache_dir=cache_dir, library_name="tffd_zoo", library_version=__version__
        )
    except Exception as error:  # the client's own errors, its HTTP library's and the system's have no common base
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        mend = (
            "HF_HUB_OFFLINE is set and the file is not in the cache: unset HF_HUB_OFFLINE, load the model once"
            if offline
            else "Check the connection and that you may read the repository, or set HF_HUB_OFFLINE=1 where it is cached"
        )
        endpoint = huggingface_hub.constants.ENDPOINT
        raise OSError(
            f"cannot fetch {filename} from {endpoint}/{repo} at {commit}: {reason_of(error)}. {mend}"
        ) from error
    return Path(path).resolve()


def read_verified(path: Path, size: int, sha256: str, mend: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file that has exactly this size (bytes) and SHA-256 (hex).

    The file is read once: the bytes that are hashed are the bytes that are parsed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is any other file; nothing of it has been parsed then. `mend` says what to do.
    """
    try:
        with path.open("rb") as file:
            data = file.read(size + 1)  # one more than expected tells a longer file without reading all of it
    except FileNotFoundError:
        raise FileNotFoundError(f"the weights {path} are missing. {mend}") from None
    if len(data) != size:
        came = f"{path.stat().st_size:,} bytes where {size:,} were released (sha256 {sha256})"
    elif (digest := hashlib.sha256(data).hexdigest()) != sha256:
        came = f"sha256 {digest} where {sha256} was released"
    else:
        return safetensors.torch.load(data)
    raise ValueError(f"{path} is not the released file: it has {came}. It was not loaded. {mend}")


def reason_of(error: BaseException) -> str:
    """The first line of an error and of what caused it; of a refused request, what the server said, not its address."""
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or type(error).__name__
        return f"{error.response.status_code} {said.splitlines()[0].rstrip('.')}"
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    cause = reason_of(error.__cause__) if error.__cause__ else line
    return line if cause == line else f"{line}: {cause}"
