"""The manifest: one entry for each release, from which timm's pretrained cfgs are made.

`manifest.json` holds `releases` and, so that class names are written once, the `label_sets` that they share.
"""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import timm
from huggingface_hub import constants
from safetensors import SafetensorError
from timm.models import DefaultCfg, PretrainedCfg, generate_default_cfgs, resolve_model_input_args
from torch import Tensor

from ..atomic import replacing_file, write_text
from ..data.loaders import ImageSpec
from ..evaluation import COUNTS, FIGURES, EvalResult
from ..json_files import read_json
from .weights import download, read_verified

MANIFEST = Path(__file__).with_name("manifest.json")
WHEEL_LIMIT = 50_000_000  # bytes; PyPI's users download them all, whichever model they want
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
PLAIN_TAG, PLUS_TAG = "ce_", "kd_"
"""Prefixes of the tags beside Tf-FD's own, which comes first and is timm's default."""

T = TypeVar("T")


@dataclass(frozen=True)
class WheelFile:
    """A safetensors file that travels with the package, in `weights/` beside the manifest."""

    path: Path
    """Where the file is."""

    def __post_init__(self) -> None:
        _require(self.path.suffix == ".safetensors", f"{self.path.name} is not a .safetensors file")

    def fetch(self, cache_dir: Path | str | None = None) -> Path:
        """The file itself; there is nothing to download."""
        return self.path

    def mend(self) -> str:
        """What to do when it is not the file that was released."""
        return "Reinstall the package from where it came: pip install --force-reinstall --no-deps CLONE-OR-WHEEL"

    def pretrained_cfg(self) -> dict[str, str]:
        """The fields of timm's pretrained cfg that name this source."""
        return {"file": str(self.path)}


@dataclass(frozen=True)
class HubFile:
    """A safetensors file in a Hub repository, at one commit."""

    repo: str
    """Repository, `organisation/name`."""
    commit: str
    """Full commit id, 40 hex digits: branches and tags can move."""
    filename: str = "model.safetensors"
    """Path in the repository."""

    def __post_init__(self) -> None:
        _require(re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo), f"repo {self.repo!r} is not organisation/name")
        _require(re.fullmatch(r"[0-9a-f]{40}", self.commit), f"commit {self.commit!r} is not 40 hex digits")
        _require(self.filename.endswith(".safetensors"), f"{self.filename} is not a .safetensors file")

    def fetch(self, cache_dir: Path | str | None = None) -> Path:
        """The file in the local cache, downloaded if need be; OSError if it cannot be."""
        return download(self.repo, self.commit, self.filename, cache_dir)

    def mend(self) -> str:
        """What to do when it is not the file that was released."""
        return (
            f"Delete that file and load again; if this comes back, {constants.ENDPOINT}/{self.repo} does not serve "
            "what was released: do not use it, and report it"
        )

    def pretrained_cfg(self) -> dict[str, str]:
        """The fields of timm's pretrained cfg that name this source."""
        return {"hf_hub_id": f"{self.repo}@{self.commit}", "hf_hub_filename": self.filename}


@dataclass(frozen=True)
class Metrics:
    """The figures of one evaluation, and of what."""

    dataset: str
    """Hub id or name of the dataset."""
    split: str
    """Split of the dataset."""
    result: EvalResult
    """The figures; how long it took is not kept."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """What else the figures depend on: which weights of the run (`weights`, `held_out`), `precision`, `device` and
    versions, `revision` and `fingerprint` of the data. The preprocessing is the entry's `input`."""

    def __post_init__(self) -> None:
        result = self.result
        _require(
            0 <= result.correct1 <= result.correct5 <= result.images != 0,
            f"{result.correct1} and {result.correct5} correct of {result.images} images cannot be",
        )
        for percent, correct in ((result.top1, result.correct1), (result.top5, result.correct5)):
            exact = 100 * correct / result.images
            _require(
                abs(percent - exact) < 1e-3, f"{correct} correct of {result.images} are {exact} %, not {percent} %"
            )
        for name, value in result.figures.items():
            low, high = FIGURES[name].low, FIGURES[name].high
            _require(low <= value <= high, f"{name} {value} is out of range, which is {low:g} to {high:g}")

    @property
    def averaged(self) -> bool:
        """Whether they are of the moving average of a run's weights."""
        return self.evaluation.get("weights", "last").endswith("_ema")

    def to_json(self) -> dict[str, Any]:
        """One flat record, as the manifest holds it."""
        return {
            "dataset": self.dataset,
            "split": self.split,
            **replace(self.result, seconds=None).to_json(),
            "evaluation": dict(self.evaluation),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Metrics:
        """What `to_json` wrote, also before the figures were known that have come since."""
        known = {"dataset", "split", "evaluation", *COUNTS, *FIGURES}
        if unknown := values.keys() - known:
            raise ValueError(f"Metrics has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
        if missing := {"dataset", "split"} - values.keys():
            raise ValueError(f"Metrics lacks {', '.join(sorted(missing))}")
        evaluation = dict(values.get("evaluation", {}))
        return cls(values["dataset"], values["split"], EvalResult.from_json(values), evaluation)


@dataclass(frozen=True)
class PlainTwin:
    """The plain run beside a release: the same recipe and seed with cross-entropy alone, not released itself."""

    recipe: Mapping[str, Any]
    """As of the release."""
    metrics: Metrics
    """Measured as those of the release are."""


@dataclass(frozen=True)
class Training:
    """How long and on what the weights were trained."""

    epochs: float
    """Passes over the training set."""
    hours: float
    """Wall-clock time."""
    seed: int
    """Seed of the run."""
    hardware: str
    """Machine, in words."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0 and self.hours > 0, "epochs and hours must be positive")
        _require(bool(self.hardware), "hardware must say what the weights were trained on")


@dataclass(frozen=True)
class Release:
    """One released weight: what it is, where it lies, how it was made and what it reaches."""

    architecture: str
    """Registered name of the architecture, e.g. `tffd_resnet20`."""
    tag: str
    """Tag under which timm lists it: `c100` for Tf-FD, `ce_c100` for its plain twin, `kd_c100` for Tf-FD+."""
    file: WheelFile | HubFile
    """Where the weights lie."""
    size: int
    """Bytes of the file."""
    sha256: str
    """SHA-256 of the file, 64 hex digits."""
    input: ImageSpec
    """How it wants its images."""
    label_set: str
    """Name that the class names have in the manifest, e.g. `cifar100`."""
    label_names: tuple[str, ...]
    """Name of each class, in the order of the logits."""
    license: str
    """SPDX identifier, lower case."""
    recipe: Mapping[str, Any]
    """The resolved recipe of the run, as exported: `recipe_sha256` in the weights' metadata is its hash. Data that it
    read from a local folder go by the folder's name; `metrics.dataset` says which data set that is."""
    metrics: Metrics
    training: Training
    temperature: float | None = None
    """What `predict` divides the logits by, fitted on training images that were held out; None: not calibrated."""
    plain_twin: PlainTwin | None = None
    """Its plain twin, where the weights of that are not released; None: they are, or none was trained."""

    def __post_init__(self) -> None:
        _require(self.temperature is None or self.temperature > 0, f"temperature {self.temperature} is not positive")
        for part in (self.architecture, self.tag, self.label_set):
            _require(re.fullmatch(r"[a-z0-9_]+", part), f"{part!r} may hold only a-z, 0-9 and _")
        _check_input(self.input)
        _require(self.size > 0, f"size {self.size} is not positive")
        _require(re.fullmatch(r"[0-9a-f]{64}", self.sha256), f"sha256 {self.sha256!r} is not 64 hex digits")
        _require(bool(self.license), "license must be given")
        _require(bool(self.recipe), "recipe must say how the weights were trained")
        _require(len(self.label_names) > 0, "label_names must name the classes")
        _require(len(set(self.label_names)) == len(self.label_names), "two classes have the same name")

    @property
    def name(self) -> str:
        """What `timm.create_model` takes: `architecture.tag`."""
        return f"{self.architecture}.{self.tag}"

    def pretrained_cfg(self) -> dict[str, Any]:
        """The fields of timm's pretrained cfg that this release sets."""
        return {
            **self.file.pretrained_cfg(),
            "num_classes": len(self.label_names),
            "label_names": self.label_names,
            "input_size": self.input.input_size,
            "mean": self.input.mean,
            "std": self.input.std,
            "interpolation": self.input.interpolation,
            "crop_pct": self.input.crop_pct,
            "crop_mode": self.input.crop_mode,
            "license": self.license,
        }

    def load(self, cache_dir: Path | str | None = None) -> dict[str, Tensor]:
        """The state dict, from a file whose size and SHA-256 are the released ones.

        Raises:
            ValueError: if the file is any other.
            OSError: if it is missing or cannot be downloaded.
        """
        return read_verified(self.file.fetch(cache_dir), self.size, self.sha256, self.file.mend())

    def to_json(self) -> dict[str, Any]:
        """The entry as JSON holds it, complete with its class names."""
        twin = self.plain_twin
        file = {"wheel": self.file.path.name} if isinstance(self.file, WheelFile) else asdict(self.file)
        entry = {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "file": file,
            "input": _input_json(self.input),
            "label_names": list(self.label_names),
            "recipe": dict(self.recipe),
            "metrics": self.metrics.to_json(),
            "training": asdict(self.training),
            "plain_twin": twin and {"recipe": dict(twin.recipe), "metrics": twin.metrics.to_json()},
        }
        return {name: value for name, value in entry.items() if value is not None}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], folder: Path) -> Release:
        """The release that `to_json` wrote; `folder` is where a wheel file lies.

        Raises:
            ValueError: if a field is missing, unknown or out of range.
        """
        try:
            _require_fields(cls, entry)
            file = entry["file"]
            parts = {
                "file": _wheel_file(folder, **file) if file.keys() == {"wheel"} else _build(HubFile, file),
                "input": _input_of(entry["input"]),
                "label_names": tuple(entry["label_names"]),
                "metrics": Metrics.from_json(entry["metrics"]),
                "training": _build(Training, entry["training"]),
                "plain_twin": _plain_twin_of(entry.get("plain_twin")),
            }
            return cls(**{**entry, **parts})
        except (ValueError, TypeError, AttributeError) as error:
            name = f"{entry.get('architecture')}.{entry.get('tag')}" if isinstance(entry, Mapping) else repr(entry)
            raise ValueError(f"manifest entry {name}: {error}") from error


def releases(manifest: Path | None = None) -> tuple[Release, ...]:
    """Every release; those of one architecture together, Tf-FD's own first.

    Raises:
        ValueError: if the manifest is not valid; the message names the entry and the field.
    """
    return _read(manifest or MANIFEST)


def release(name: str, manifest: Path | None = None) -> Release:
    """The release of this name, `architecture.tag`, or of this architecture (its first).

    Raises:
        ValueError: if there is none; the message lists those there are.
    """
    if found := known_release(name, manifest):
        return found
    names = ", ".join(candidate.name for candidate in releases(manifest)) or "none"
    raise ValueError(f"no release is called {name!r}; there are: {names}")


def known_release(name: str, manifest: Path | None = None) -> Release | None:
    """As :func:`release`; None where there is none of that name."""
    return next(
        (candidate for candidate in releases(manifest) if name in (candidate.name, candidate.architecture)), None
    )


def plain_twin_name(name: str) -> str | None:
    """What the plain twin of the release `name` is called, `architecture.ce_tag`; None where that is plain itself."""
    architecture, _, tag = name.partition(".")
    return None if tag.startswith(PLAIN_TAG) else f"{architecture}.{PLAIN_TAG}{tag.removeprefix(PLUS_TAG)}"


def find_release(cfg: PretrainedCfg) -> Release | None:
    """The release whose file timm would load for `cfg`; None where that is a file or state dict of the user's own."""
    if cfg.source or cfg.state_dict:
        return None
    source = {"file": cfg.file} if cfg.file else {"hf_hub_id": cfg.hf_hub_id, "hf_hub_filename": cfg.hf_hub_filename}
    return next((candidate for candidate in releases() if candidate.file.pretrained_cfg() == source), None)


def default_cfgs(architectures: Mapping[str, Mapping[str, Any]], manifest: Path | None = None) -> dict[str, DefaultCfg]:
    """timm's default cfgs of these architectures: one for each release, or the bare one where there is none yet.

    Args:
        architectures: each architecture's pretrained cfg without weights.
        manifest: the manifest to read, the package's own by default.
    """
    cfgs: dict[str, Mapping[str, Any]] = {}
    released = defaultdict(list)
    for release in releases(manifest):
        released[release.architecture].append(release)
    for architecture, bare in architectures.items():
        for release in released[architecture]:
            reduction = bare["input_size"][-1] // bare["pool_size"][-1]
            pool_size = tuple(-(-side // reduction) for side in release.input.input_size[1:])
            cfgs[release.name] = {**bare, **release.pretrained_cfg(), "pool_size": pool_size}
        if not released[architecture]:
            cfgs[architecture] = bare
    return generate_default_cfgs(cfgs)


def add_release(new: Release, *, replaces: bool = False, manifest: Path | None = None) -> Release:
    """Add a release to the manifest and, if its weights travel in the wheel, their file to the package.

    The weights are first loaded as a user would load them: hash, architecture and class count must agree. The file of a
    `WheelFile` is copied under a name that holds its hash, so that the manifest, replaced last and at once, always
    names a file that fits. timm lists the release from the next start of Python on.

    Args:
        new: the release; `file.path` of a `WheelFile` is where the weights are now.
        replaces: whether a release of this name may be there already and be replaced.
        manifest: the manifest to change, the package's own by default.

    Returns:
        The release as it now stands in the manifest.

    Raises:
        ValueError: if the weights are not those the release describes, the name is taken, the class names differ from
            those the manifest has under `label_set`, or the wheel would become too large. Nothing has changed then.
        OSError: if a file cannot be read, downloaded or written.
    """
    manifest = manifest or MANIFEST
    others = [release for release in releases(manifest) if release.name != new.name]
    replaced = [release for release in releases(manifest) if release.name == new.name]
    if replaced and not replaces:
        raise ValueError(f"{new.name} is released already; --replace (replaces=True) puts this one in its place")
    for release in others:
        if release.label_set == new.label_set and release.label_names != new.label_names:
            raise ValueError(f"{release.name} has other class names under {new.label_set!r}: give these another name")

    _require_fit(new)
    if isinstance(new.file, WheelFile):
        in_wheel = sum(release.size for release in [*others, new] if isinstance(release.file, WheelFile))
        if in_wheel > WHEEL_LIMIT:
            raise ValueError(
                f"with {new.name} the wheel would hold {in_wheel:,} bytes of weights, more than {WHEEL_LIMIT:,}: "
                "publish it to the Hub and release that file"
            )
        path = manifest.parent / "weights" / f"{new.name}-{new.sha256[:8]}.safetensors"
        path.parent.mkdir(exist_ok=True)
        with replacing_file(path) as aside:
            aside.write_bytes(new.file.path.read_bytes())
        new = replace(new, file=WheelFile(path))

    _write([*others, new], manifest)
    for release in replaced:
        if isinstance(release.file, WheelFile) and release.file != new.file:
            release.file.path.unlink(missing_ok=True)
    return new


def _require_fit(release: Release) -> None:
    """Load the weights into their architecture, every key and shape."""
    try:
        state_dict = release.load()
    except SafetensorError as error:
        raise ValueError(f"the weights of {release.name} are not a safetensors file: {error}") from error
    if not timm.is_model(release.architecture):
        raise ValueError(f"{release.architecture} is not a registered architecture: see timm.list_models('tffd_*')")
    shape = resolve_model_input_args(release.architecture, {"input_size": release.input.input_size})
    model = timm.create_model(**shape, num_classes=len(release.label_names), device="meta")
    try:
        model.load_state_dict(state_dict, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights of {release.name} do not fit {release.architecture}: {error}") from error


@functools.cache
def _read(manifest: Path) -> tuple[Release, ...]:
    mend = "restore it from the repository or reinstall the package"
    content = read_json(manifest, mend)
    try:
        entries = [{**entry, "label_names": content["label_sets"][entry["label_set"]]} for entry in content["releases"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{manifest} is not a manifest of releases and the label_sets they name: {error!r}; {mend}"
        ) from error
    try:
        found = [Release.from_json(entry, manifest.parent / "weights") for entry in entries]
    except ValueError as error:
        raise ValueError(f"{manifest}: {error}; {mend}") from error
    names = [release.name for release in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{manifest}: {name} is there {names.count(name)} times")
    return tuple(sorted(found, key=_rank))


def _write(released: Sequence[Release], manifest: Path) -> None:
    content: dict[str, Any] = {"label_sets": {}, "releases": []}
    for release in sorted(released, key=_rank):
        entry = release.to_json()
        content["label_sets"][release.label_set] = entry.pop("label_names")
        content["releases"].append(entry)
    write_text(manifest, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    _read.cache_clear()


def _rank(release: Release) -> tuple[str, bool, str]:
    """Sort key: by architecture, Tf-FD's own weights before the baselines."""
    return release.architecture, release.tag.startswith((PLAIN_TAG, PLUS_TAG)), release.tag


def _plain_twin_of(entry: Mapping[str, Any] | None) -> PlainTwin | None:
    if entry is None:
        return None
    _require_fields(PlainTwin, entry)
    return PlainTwin(entry["recipe"], Metrics.from_json(entry["metrics"]))


def _input_json(spec: ImageSpec) -> dict[str, Any]:
    """A spec as the manifest holds it: `size` for `input_size`, and no crop_mode where that is timm's usual one."""
    entry = {name.removeprefix("input_"): value for name, value in asdict(spec).items()}
    return {name: value for name, value in entry.items() if (name, value) != ("crop_mode", "center")}


def _input_of(entry: Mapping[str, Any]) -> ImageSpec:
    """The spec that `_input_json` wrote."""
    known = {each.name.removeprefix("input_"): each.name for each in fields(ImageSpec)}
    if missing := known.keys() - entry.keys() - {"crop_mode"}:
        raise ValueError(f"input lacks {', '.join(sorted(missing))}")
    if unknown := entry.keys() - known.keys():
        raise ValueError(f"input has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return ImageSpec(**{known[name]: value for name, value in entry.items()})


def _check_input(spec: ImageSpec) -> None:
    size = spec.input_size
    _require(len(size) == 3 and all(n > 0 for n in size), f"input size {size} is not (C, H, W)")
    _require(len(spec.mean) == len(spec.std) == size[0], "mean and std need one value for each channel")
    _require(all(s > 0 for s in spec.std), f"std {spec.std} is not positive")
    _require(spec.interpolation in INTERPOLATIONS, f"interpolation {spec.interpolation!r}: not in {INTERPOLATIONS}")
    _require(0 < spec.crop_pct <= 1, f"crop_pct {spec.crop_pct} is not in (0, 1]")


def _wheel_file(folder: Path, wheel: str) -> WheelFile:
    _require(Path(wheel).name == wheel, f"wheel {wheel!r} is not a plain file name")
    return WheelFile(folder / wheel)


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a flat dataclass from JSON, whose lists are the dataclass's tuples."""
    _require_fields(cls, values)
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _require_fields(cls: type, values: Mapping[str, Any]) -> None:
    names = {field.name for field in fields(cls)}
    needed = {field.name for field in fields(cls) if field.default is field.default_factory is MISSING}
    if missing := needed - values.keys():
        raise ValueError(f"{cls.__name__} lacks {', '.join(sorted(missing))}")
    if unknown := values.keys() - names:
        raise ValueError(f"{cls.__name__} has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(names))}")


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)
