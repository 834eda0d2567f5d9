"""Publish an export on the Hugging Face Hub: one commit, downloaded again, compared, and only then tagged.

    python hub/publish.py runs/tffd-tffd_resnet20-s0 --repo org/tffd_resnet20.c100 --dry-run
    python hub/publish.py runs/tffd-tffd_resnet20-s0 --repo org/tffd_resnet20.c100

It may be stopped anywhere and run again: what has arrived is not sent twice, and nobody is pointed to a release by its
tag before it was found complete.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import timm
import torch
import tyro
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from release import MANIFEST, metrics_of, no_twin, release_of
from safetensors.torch import load_file
from torch import Tensor

from tffd_zoo._version import __version__
from tffd_zoo.cli import run_cli
from tffd_zoo.eval import EvalConfig
from tffd_zoo.eval import main as evaluate
from tffd_zoo.export import rewrite_card
from tffd_zoo.export_record import (
    ALL_FILES,
    CONFIG,
    METRICS,
    SIGNATURE,
    SUMS,
    ExportInfo,
    file_sha256,
    find_export,
    verify_export,
)
from tffd_zoo.json_files import read_json
from tffd_zoo.model_card import Twin, known_twin
from tffd_zoo.models import HubFile, PlainTwin, add_release, known_release, releases
from tffd_zoo.models.weights import reason_of
from tffd_zoo.ranges import NOT_NEGATIVE, POSITIVE
from tffd_zoo.signing import sign_export

HUB_FILES = {".gitattributes"}
"""What the Hub itself puts into a repository."""
PATIENCE = 5
"""How often a request is repeated that came too early for the Hub."""
NO_COMMIT = "0" * 40
"""Stands for the commit before it is made."""


T = TypeVar("T")


@dataclass(frozen=True)
class PublishConfig:
    """Publish an export on the Hugging Face Hub, with the token of HF_TOKEN or `hf auth login`; safe to repeat."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-OR-EXPORT")]
    """An export, or the folder of a run that has one."""
    repo: str
    """Repository on the Hub, organisation/name; made when there is none."""
    tag: str = "v1"
    """Tag of the release; other files need another tag."""
    private: bool = False
    """Make the repository private."""
    evaluate: str | None = None
    """Evaluate the weights on this data first (a Hub id, a folder or 'digits'); stop unless metrics.json is right."""
    tolerance: Annotated[int, NOT_NEGATIVE] = 0
    """Images by which that may differ: another device rounds differently."""
    twin: Path | None = None
    """Export of the plain run that the card compares with; the released one of tag ce_<tag> when not given."""
    hours: Annotated[float | None, POSITIVE] = None
    """Wall-clock hours of training, for the manifest, where the export does not say."""
    add_to_manifest: bool = False
    """Put the release into this package's manifest, in place of one of the same name."""
    sign: Path | None = None
    """Sign what is sent with this private key (elliptic curve, PEM); needs tffd_zoo[sign]."""
    dry_run: bool = False
    """Show what would be sent, and send nothing."""


def main(config: PublishConfig) -> None:
    """Publish what `config` asks for, and say how to load it.

    Raises:
        ValueError, OSError: what is wrong, what is on the Hub now, and what to do, in one line.
    """
    _check_names(config)
    with tempfile.TemporaryDirectory() as folder:
        twin = verify_export(config.twin) if config.twin else None
        info = prepare(config, Path(folder) / "release", twin)
        if config.sign:
            sign_export(info.folder, config.sign)
        release = release_of(info, HubFile(config.repo, NO_COMMIT), config.hours, _plain_twin(info, twin))
        logits = check_weights(info)
        if config.evaluate:
            check_metrics(info, config.evaluate, config.tolerance)
        else:
            print(f"not evaluated again: {METRICS} is taken at its word; pass --evaluate DATA to have it checked")
        print(f"{info.name} to {config.repo}, tag {config.tag}{', private' if config.private else ''}:")
        for name, sha256 in _contents(info).items():
            print(f"  {(info.folder / name).stat().st_size:>12,} bytes  {sha256}  {name}")
        if config.dry_run:
            print("nothing was sent")
            return
        commit = send(info, config)
        verify(info, config, commit, logits)
        tag(config, commit)

    print(f"published: {HfApi().endpoint}/{config.repo}/tree/{config.tag}, commit {commit}\nload it:")
    if info.config["architecture"].startswith("tffd_"):
        print("  import tffd_zoo  # registers the architecture with timm")
    print(f'  timm.create_model("hf-hub:{config.repo}@{config.tag}", pretrained=True)')
    release = replace(release, file=HubFile(config.repo, commit))
    if config.add_to_manifest:
        add_release(release, replaces=True, manifest=MANIFEST)
    print(f"{'added to the manifest' if config.add_to_manifest else 'manifest entry'}:")
    print(json.dumps(release.to_json(), indent=2, ensure_ascii=False))


def prepare(config: PublishConfig, folder: Path, twin: ExportInfo | None) -> ExportInfo:
    """Copy the export to `folder`, which must not exist, with the card of this release, and check all of it.

    Raises:
        FileNotFoundError: there is no export.
        ValueError: it was changed, or holds something that no release has.
    """
    source = find_export(config.source)
    info = verify_export(source)
    strangers = info.sha256.keys() - ALL_FILES
    if strangers:
        raise ValueError(f"{source} holds {', '.join(sorted(strangers))}, which no release has; export again")
    shutil.copytree(source, folder)
    beside = Twin(twin.name, twin.recipe, twin.metrics) if twin else known_twin(info.name, info.recipe, releases())
    return rewrite_card(folder, twin=beside, repo=config.repo)


def check_weights(info: ExportInfo) -> Tensor:
    """Load the very files that will be sent, as their users will, and return what the model makes of two images.

    Raises:
        ValueError: a weight or a logit is not finite, or there is not a logit for every label.
    """
    bad = [name for name, tensor in load_file(info.weights).items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"weight {bad[0]!r} of {info.name} is not finite; export other weights (nothing was sent)")
    logits = _logits(f"local-dir:{info.folder}")
    if logits.shape != (2, len(info.config["label_names"])) or not torch.isfinite(logits).all():
        raise ValueError(
            f"{info.name} gives {tuple(logits.shape)} logits for two images, {len(info.config['label_names'])} labels, "
            "and all of them have to be finite; export again (nothing was sent)"
        )
    return logits


def check_metrics(info: ExportInfo, data: str, tolerance: int) -> None:
    """Evaluate the weights on `data`, as they were evaluated for `metrics.json`, and compare.

    Raises:
        ValueError: the figures are others, by more than `tolerance` images.
    """
    settings, columns = info.metrics["evaluation"], info.recipe["data"]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "metrics.json"
        evaluate(
            EvalConfig(
                models=(f"local-dir:{info.folder}",),
                data=data,
                split=settings["split"],
                precision=settings.get("precision", "no"),
                image_column=columns["image_column"],  # None where it was found by its type, as it is then here
                label_column=columns["label_column"],
                json=record,
            )
        )
        (found,) = json.loads(record.read_text())
    for key, allowed in {"images": 0, "correct1": tolerance, "correct5": tolerance}.items():
        if abs(found[key] - info.metrics[key]) > allowed:
            raise ValueError(
                f"{METRICS} says {key} {info.metrics[key]:,}, but on {data} it is {found[key]:,}; "
                "name the data that the figures are from, or export again with the right ones (nothing was sent)"
            )


def send(info: ExportInfo, config: PublishConfig) -> str:
    """Put the files into the repository, in one commit, and return its hash; one that has them already is not repeated.

    Raises:
        ValueError: the repository holds something else, or the tag is taken by other files.
        OSError: the Hub could not be reached or refused; its `main` is as it was or complete.
    """
    api = _api()
    _check_token()
    mend = "check the connection, the token and its rights, and run the same command again"
    with _step("prepare the repository", f"nothing was sent; {mend}"):
        try:
            head = _patient(lambda: api.model_info(config.repo))
        except RepositoryNotFoundError:
            _patient(lambda: api.create_repo(config.repo, private=config.private, exist_ok=True))
            head = _patient(lambda: api.model_info(config.repo))
        tagged = _tagged(api, config)
        if tagged is not None and _holds(api, config.repo, tagged, info):
            return tagged
        held = {file.rfilename for file in head.siblings or ()} - HUB_FILES
        held_release = _name_of_release(config.repo, head.sha) if CONFIG in held else info.name
    if tagged is not None:
        obstacle = f"has {config.tag} already, at commit {tagged}, with other files; give this release another --tag"
    elif config.private and not head.private:
        obstacle = "is public already; change that in its settings, or drop --private"
    elif strangers := held - ALL_FILES:
        obstacle = f"holds {', '.join(sorted(strangers))}, which no release has; name another --repo"
    elif held_release != info.name:
        obstacle = f"holds {held_release}, and this is {info.name}; name another --repo"
    else:
        obstacle = None
    if obstacle:
        raise ValueError(f"{config.repo} {obstacle} (nothing was sent)")

    files = _contents(info)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, info.folder / name) for name in files),
        *(CommitOperationDelete(name) for name in sorted(held - files.keys())),
    ]
    with _step("commit", f"main of {config.repo} has all of this or nothing of it; run the same command again"):
        message = f"{info.name}, {config.tag}"
        commit = _patient(
            lambda: api.create_commit(config.repo, operations, commit_message=message, parent_commit=head.sha)
        )
    return commit.oid


def verify(info: ExportInfo, config: PublishConfig, commit: str, logits: Tensor) -> None:
    """Download the commit into an empty cache and compare every byte, and the logits of the model that timm loads.

    Raises:
        ValueError: something differs.
        OSError: it cannot be downloaded.
    """
    state = f"commit {commit} is on main of {config.repo} but not tagged; run the same command again"
    with tempfile.TemporaryDirectory() as cache:
        with _step("download what was published", state):
            folder = Path(snapshot_download(config.repo, revision=commit, cache_dir=cache))
        files = {path.name for path in folder.iterdir()} - HUB_FILES
        sent = _contents(info)
        wrong = [n for n in sorted(files | sent.keys()) if n not in files or file_sha256(folder / n) != sent.get(n)]
        if wrong:
            raise ValueError(f"the Hub does not serve what was sent: {', '.join(wrong)} came back changed; {state}")
        if not torch.equal(_logits(f"hf-hub:{config.repo}@{commit}", cache_dir=cache), logits):
            raise ValueError(f"the published model gives other logits than the export; {state}")


def tag(config: PublishConfig, commit: str) -> None:
    """Tag the commit; one that is so tagged already is fine."""
    api = _api()
    state = f"commit {commit} is on main of {config.repo}, complete but not tagged; run the same command again"
    with _step("tag", state):
        if _tagged(api, config) != commit:
            _patient(lambda: api.create_tag(config.repo, tag=config.tag, revision=commit))


def _plain_twin(info: ExportInfo, twin: ExportInfo | None) -> PlainTwin | None:
    """What the manifest tells of a twin that is not released: of the one named, else what it told of it before."""
    if twin is not None:
        another = no_twin(info, twin) or known_release(twin.name)
        return None if another else PlainTwin(twin.recipe, metrics_of(twin))
    known = known_release(info.name)
    return known.plain_twin if known and known.recipe == info.recipe else None


def _contents(info: ExportInfo) -> dict[str, str]:
    """Hash of every file to send."""
    unlisted = (name for name in (SUMS, SIGNATURE) if (info.folder / name).exists())
    return {**info.sha256, **{name: file_sha256(info.folder / name) for name in unlisted}}


@torch.inference_mode()
def _logits(name: str, **options: Any) -> Tensor:
    """What the model makes of two fixed images of noise."""
    try:
        model = timm.create_model(name, pretrained=True, **options).eval()
    except RuntimeError as error:  # how timm and torch refuse weights
        raise ValueError(f"timm cannot load {name}: {' '.join(str(error).split())}") from error
    size = model.pretrained_cfg["input_size"]
    return model(torch.randn(2, *size, generator=torch.Generator().manual_seed(0)))


# --- the Hub ----------------------------------------------------------------------------------------------------------


def _api() -> HfApi:
    return HfApi(library_name="tffd_zoo", library_version=__version__)


def _tagged(api: HfApi, config: PublishConfig) -> str | None:
    """The commit that the tag names."""
    tags = _patient(lambda: api.list_repo_refs(config.repo)).tags
    return next((found.target_commit for found in tags if found.name == config.tag), None)


def _holds(api: HfApi, repo: str, revision: str, info: ExportInfo) -> bool:
    """Whether a revision has the files of the export and no others."""
    found = _patient(lambda: api.verify_repo_checksums(repo, revision=revision, local_dir=info.folder))
    return not found.mismatches and not found.extra_paths and set(found.missing_paths) <= HUB_FILES


def _name_of_release(repo: str, revision: str | None) -> str:
    """What the config of a published model says that it is."""
    with tempfile.TemporaryDirectory() as cache:
        file = Path(hf_hub_download(repo, CONFIG, revision=revision, cache_dir=cache))
        config = read_json(file, f"name a --repo whose {CONFIG} can be read")
    ours = config.get("tffd_zoo")
    return f"{ours['architecture']}.{ours['tag']}" if ours else "a model of another kind"


def _patient(request: Callable[[], T]) -> T:
    """Return what `request` does; where the Hub says that there were too many (429), wait as long as it says first.

    Its client waits so for files, and not for the calls of its API.
    """
    for attempt in range(PATIENCE):
        try:
            return request()
        except HfHubHTTPError as error:
            if error.response.status_code != 429:
                raise
            asked = error.response.headers.get("Retry-After", "")
            seconds = int(asked) if asked.isdecimal() else 10 * 2**attempt
            print(f"the Hub asks for {seconds} s of patience (429)", file=sys.stderr)
            time.sleep(seconds)
    return request()


@contextmanager
def _step(what: str, state: str) -> Iterator[None]:
    """Name a step that talks to the Hub: any failure becomes one line with what is on the Hub then.

    The client's own errors, those of its HTTP library and of the system have no common base.
    """
    try:
        yield
    except Exception as error:
        raise OSError(f"could not {what}: {reason_of(error)}; {state}") from error


def _check_token() -> None:
    """Refuse to start without a token, or with one that HTTP cannot carry: an error message would quote it."""
    token = get_token()
    if token is None:
        raise ValueError("there is no token; set HF_TOKEN or run `hf auth login` (nothing was sent)")
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("the token holds characters that no token has; set HF_TOKEN again or run `hf auth login`")


def _check_names(config: PublishConfig) -> None:
    validate_repo_id(config.repo)
    if "/" not in config.repo:
        raise ValueError(f"--repo {config.repo} has no organisation; name it like organisation/name")
    # The Hub's tags are git's: no "..", no dot and no ".lock" at the end.
    plain = re.fullmatch(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]*(?<!\.)(?<!\.lock)", config.tag)
    if not plain:
        raise ValueError(f"--tag {config.tag!r} is no name of a tag on the Hub; name it like v1")
    if config.tag == "main" or re.fullmatch(r"[0-9a-f]{7,40}", config.tag):
        raise ValueError(f"--tag {config.tag} could be taken for a branch or a commit; name it like v1")
    if config.tolerance < 0:
        raise ValueError(f"--tolerance {config.tolerance} is no number of images; 0 is the strictest")


if __name__ == "__main__":
    run_cli(main, PublishConfig)
