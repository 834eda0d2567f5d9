"""Turn a model into files that run without timm, and measure each: ONNX in three precisions and torch.export's.

    python -m tffd_zoo.deploy tffd_resnet20.c100 --data uoft-cs/cifar100 --to deployed/tffd_resnet20.c100

The folder is laid out as transformers.js reads it. `deploy.json` has the figures of every file, `README.md` shows them.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import tyro
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn

from ._version import __version__
from .atomic import replacing_folder
from .cli import run_cli
from .data import EVAL_SPLITS, ImageSource, ImageSpec, eval_loader, open_source
from .hardware import describe_hardware
from .known_data import portable_source
from .loading import check_model_name, load_model, number_classes, temperature_of
from .markdown import markdown_table
from .ranges import COUNT
from .threads import threads_kept

Classify = Callable[[np.ndarray], np.ndarray]
"""Runs a file: pixel values to logits, or images to probabilities."""

RECORD = "deploy.json"
PRECISIONS = {"float32": "", "float16": "_fp16", "int8": "_quantized"}
"""And how transformers.js marks them in a file's name."""
NETWORK, CLASSIFIER = "model", "classifier"
THREADS = (1, 2)
BATCH = 64
CLOSE = 1e-3
"""A float32 file may differ from PyTorch by so much, absolute and relative."""
MOST_INT8_LOSS = 0.5
"""Points of top-1; a larger loss is said aloud."""
RESNETS = re.compile(r"(tffd_)?(wide_)?resnet|tffd_wrn")
"""Architectures that are ResNets, which is what transformers.js calls `resnet`."""
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's numbers."""


@dataclass(frozen=True)
class DeployConfig:
    """Turn a model into ONNX (float32, float16, int8) and torch.export files, each checked, timed and evaluated."""

    model: tyro.conf.Positional[str]
    """Registered name with or without tag (tffd_resnet20.c100), hf-hub:org/name[@revision] or local-dir:FOLDER."""
    data: str
    """Images to calibrate and to evaluate on: a Hub id, a folder of parquet, an image folder, or 'digits'."""
    to: Path
    """Where the files go; absent, empty, or an earlier deployment."""
    split: str | None = None
    """Split that every file is evaluated on, whole; validation, or else test, when not given."""
    train_split: str = "train"
    """Split whose images calibrate int8."""
    calibration_images: Annotated[int, COUNT] = 512
    """So many of them, spread evenly over the split."""
    timings: Annotated[int, COUNT] = 100
    """Latencies are medians of so many runs on one image."""
    image_column: str | None = None
    """Column of the images; found by its type when not given."""
    label_column: str | None = None
    """Column of the labels; found by its type when not given."""
    reduce_range: bool = False
    """Weights of 7 bits in int8, for x86 CPUs without VNNI (before about 2019), where sums of 8 bits can overflow."""


@dataclass(frozen=True)
class FileRecord:
    """One file and its figures."""

    file: str
    """Path in the folder."""
    precision: str
    takes: str
    """`pixel_values`: (batch, 3, H, W) float32, or `images`: (batch, height, width, 3) uint8 of any one size."""
    gives: str
    """`logits` or `probabilities`: (batch, classes) float32."""
    bytes: int
    top1: float
    """Percent of the whole split."""
    same_class: float
    """Percent of the images that get the class that PyTorch gives them."""
    largest_difference: float
    """Of any logit or probability from PyTorch's, over the split."""
    latency_ms: Mapping[str, float]
    """Median time for one image, by the number of threads."""


def main(config: DeployConfig) -> None:
    """Write the folder that `config` asks for, and print its table.

    Raises:
        ValueError, OSError: the model or the data cannot be used, or a file does not compute what PyTorch does.
    """
    check_model_name(config.model)
    test, train = (
        open_source(config.data, split, image_column=config.image_column, label_column=config.label_column)
        for split in (config.split or EVAL_SPLITS, config.train_split)
    )
    record = deploy(
        config.model,
        test,
        train,
        config.to,
        calibration_images=config.calibration_images,
        reduce_range=config.reduce_range,
        timings=config.timings,
    )
    print(f"{table(record)}\n\n{summary(record)}\n{config.to}")


def deploy(
    name: str,
    test: ImageSource,
    train: ImageSource,
    folder: Path,
    *,
    calibration_images: int = 512,
    reduce_range: bool = False,
    timings: int = 100,
) -> dict[str, Any]:
    """Write a model's files to `folder`, whole or not at all, and return what `deploy.json` holds.

    Args:
        name: as `load_model` takes it.
        test: every file is evaluated on all of it.
        train: int8 is calibrated on images of it.
        folder: absent, empty, or an earlier deployment.
        calibration_images: how many.
        reduce_range: 7 bits for int8's weights.
        timings: how many runs a latency is the median of.

    Raises:
        ValueError: a file does not compute what PyTorch does, `folder` holds something else, or the extra `deploy` is
            not installed.
    """
    try:
        from . import deployment as files
    except ModuleNotFoundError as error:
        raise ValueError(f"deploying needs {error.name}; pip install 'tffd_zoo[deploy]'") from error

    _check_replaceable(folder)
    model = load_model(name).eval()
    test = number_classes(name, model, test)
    temperature = temperature_of(name)
    spec = ImageSpec(**resolve_input_data_config(model, use_test_size=True))
    chosen = torch.linspace(0, len(train) - 1, min(calibration_images, len(train))).long()
    calibration = [batch.images.numpy() for batch in eval_loader(train.subset(chosen), spec, BATCH)]
    metadata = _metadata(name, model, test, spec)

    with replacing_folder(folder) as aside:
        (aside / "onnx").mkdir()
        preprocessing = files.to_onnx(files.export_preprocessing(spec), files.IMAGES, files.PIXELS)
        program = files.export_network(model, spec)
        network = files.to_onnx(program, files.PIXELS, files.LOGITS)
        networks = {
            "float32": network,
            "float16": files.to_half(network),
            "int8": files.to_int8(network, calibration, reduce_range=reduce_range),
        }
        for precision, suffix in PRECISIONS.items():
            files.save_onnx(networks[precision], aside / "onnx" / f"{NETWORK}{suffix}.onnx", metadata)
            classifier = files.with_preprocessing(networks[precision], preprocessing, temperature)
            files.save_onnx(classifier, aside / "onnx" / f"{CLASSIFIER}{suffix}.onnx", metadata)
        files.save_program(program, aside / f"{NETWORK}.pt2", metadata)
        classifier_program = files.export_classifier(model, spec, temperature)
        files.save_program(classifier_program, aside / f"{CLASSIFIER}.pt2", metadata)

        record = {
            "model": metadata["model"],
            "tffd_zoo_version": __version__,
            "license": metadata["license"],
            "labels": json.loads(metadata["labels"]),
            "input": asdict(spec),
            "temperature": temperature,
            "batch": "dynamic",
            "opset": files.OPSET,
            "ir_version": network.ir_version,
            "calibration": {"split": train.split, "images": len(chosen), "weight_bits": 7 if reduce_range else 8},
            "evaluation": {
                "data": portable_source(test.name, test.revision),
                "split": test.split,
                "revision": test.revision,
                "fingerprint": test.fingerprint,
                "images": len(test),
            },
            "versions": {
                "torch": torch.__version__,
                "timm": timm.__version__,
                "onnxruntime": files.onnxruntime.__version__,
            },
            "hardware": describe_hardware(torch.device("cpu")),
            "timings": timings,
            **_measure(model, test, spec, temperature, aside, timings),
        }
        check_close(record)
        (aside / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _write_transformers_js(aside, record, metadata["architecture"])
        (aside / "README.md").write_text(readme(record), encoding="utf-8")
    return record


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and ((folder / RECORD).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"{folder} exists and is no deployment; name another folder or move it away")


def _metadata(name: str, model: nn.Module, source: ImageSource, spec: ImageSpec) -> dict[str, str]:
    """What every file says of itself."""
    cfg = getattr(model, "pretrained_cfg", {})
    architecture, tag = cfg.get("architecture") or name, cfg.get("tag")
    return {
        "model": f"{architecture}.{tag}" if tag else architecture,
        "architecture": architecture,
        "license": cfg.get("license") or "",
        "labels": json.dumps(list(cfg.get("label_names") or source.label_names), ensure_ascii=False),
        "preprocessing": json.dumps(asdict(spec)),
        "tffd_zoo_version": __version__,
    }


# --- figures ----------------------------------------------------------------------------------------------------------


@threads_kept()
def _measure(
    model: nn.Module, test: ImageSource, spec: ImageSpec, temperature: float, folder: Path, timings: int
) -> dict[str, Any]:
    """Evaluate and time PyTorch and every file of `folder` on the same images."""
    loader = eval_loader(test, spec, BATCH)
    pixels = [batch.images.numpy() for batch in loader]
    with torch.inference_mode():
        logits = torch.cat([model(torch.from_numpy(batch)) for batch in pixels])
    expected = {"logits": logits, "probabilities": (logits / temperature).softmax(dim=-1)}

    def latency(open_with: Callable[[int], Classify], one: np.ndarray) -> dict[str, float]:
        return {str(threads): _median_ms(open_with(threads), one, timings) for threads in THREADS}

    records = []
    for path in sorted([*folder.glob("*.pt2"), *folder.glob("onnx/*.onnx")]):
        alone = path.stem.startswith(NETWORK)
        gives = "logits" if alone else "probabilities"
        opener = _program_opener(path) if path.suffix == ".pt2" else _session_opener(path)
        run, batches = opener(1), pixels if alone else _image_batches(test)
        found = torch.cat([torch.from_numpy(run(batch)) for batch in batches])
        one = pixels[0][:1] if alone else next(_image_batches(test))[:1]
        suffix = path.stem.removeprefix(NETWORK if alone else CLASSIFIER)
        records.append(
            FileRecord(
                file=path.relative_to(folder).as_posix(),
                precision=next(precision for precision, mark in PRECISIONS.items() if mark == suffix),
                takes="pixel_values" if alone else "images",
                gives=gives,
                bytes=path.stat().st_size,
                top1=_percent(found.argmax(dim=1) == test.labels),
                same_class=_percent(found.argmax(dim=1) == logits.argmax(dim=1)),
                largest_difference=(found - expected[gives]).abs().max().item(),
                latency_ms=latency(opener, one),
            )
        )
    return {
        "pytorch": {
            "top1": _percent(logits.argmax(dim=1) == test.labels),
            "largest_logit": logits.abs().max().item(),
            "latency_ms": latency(lambda threads: _torch_runner(model, threads), pixels[0][:1]),
        },
        "files": [asdict(record) for record in records],
    }


def _image_batches(source: ImageSource) -> Iterator[np.ndarray]:
    """Images as they are, those that follow each other at one size together."""
    images = (np.asarray(source.decode(index)) for index in range(len(source)))
    for _, alike in itertools.groupby(images, key=np.shape):
        while batch := list(itertools.islice(alike, BATCH)):
            yield np.stack(batch)


def _session_opener(path: Path) -> Callable[[int], Classify]:
    from .deployment import open_session

    def opened(threads: int) -> Classify:
        session = open_session(path, threads)
        name = session.get_inputs()[0].name
        return lambda array: session.run(None, {name: array})[0]

    return opened


def _program_opener(path: Path) -> Callable[[int], Classify]:
    module = torch.export.load(path).module()
    return lambda threads: _torch_runner(module, threads)


def _torch_runner(module: nn.Module, threads: int) -> Classify:
    def run(array: np.ndarray) -> np.ndarray:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            return module(torch.tensor(array)).numpy()

    return run


def _median_ms(run: Classify, one: np.ndarray, repeats: int) -> float:
    """Median time for one image, after a few to warm up."""
    for _ in range(min(10, repeats)):
        run(one)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(one)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _percent(correct: Tensor) -> float:
    return 100 * correct.double().mean().item()


def check_close(record: Mapping[str, Any]) -> None:
    """Refuse float32 networks that do not give PyTorch's logits; what rounds is told by its figures.

    Raises:
        ValueError: names the file.
    """
    for file in record["files"]:
        allowed = CLOSE * (1 + record["pytorch"]["largest_logit"])
        if file["precision"] == "float32" and file["gives"] == "logits" and not file["largest_difference"] <= allowed:
            raise ValueError(
                f"{file['file']} is off PyTorch's logits by {file['largest_difference']:.3g}, more than {allowed:.3g}: "
                "this version of torch or onnxscript translates the model wrongly; try another"
            )


# --- what is written of it --------------------------------------------------------------------------------------------


def table(record: Mapping[str, Any]) -> str:
    """The figures of PyTorch and of every file."""
    header = ["file", "precision", "input", "output", "MB", "top-1 %", "same class %", "off by"]
    header += [f"ms, {threads} thread{'s' * (threads > 1)}" for threads in THREADS]

    def times(latency: Mapping[str, float]) -> list[str]:
        return [f"{latency[str(threads)]:.2f}" for threads in THREADS]

    pytorch = record["pytorch"]
    what = ["PyTorch", "float32", "pixel values", "logits"]
    rows = [[*what, "", f"{pytorch['top1']:.2f}", "100.00", "0", *times(pytorch["latency_ms"])]]
    for file in record["files"]:
        figures = [f"{file['bytes'] / 1e6:.2f}", f"{file['top1']:.2f}", f"{file['same_class']:.2f}"]
        figures += [f"{file['largest_difference']:.1g}"]
        what = [f"`{file['file']}`", file["precision"], file["takes"].replace("_", " "), file["gives"]]
        rows.append(what + figures + times(file["latency_ms"]))
    return markdown_table(header, rows)


def summary(record: Mapping[str, Any]) -> str:
    """What int8 costs, in a sentence."""
    (int8,) = (file for file in record["files"] if file["precision"] == "int8" and file["gives"] == "logits")
    change = int8["top1"] - record["pytorch"]["top1"]
    verdict = "within" if change >= -MOST_INT8_LOSS else "more than"
    return f"int8 changes top-1 by {change:+.2f} points, {verdict} the {MOST_INT8_LOSS} that may be lost."


def readme(record: Mapping[str, Any]) -> str:
    """The card of the folder."""
    evaluation, spec, calibration, versions = (record[k] for k in ("evaluation", "input", "calibration", "versions"))
    _, height, width = spec["input_size"]
    shorter_side = math.floor(height / spec["crop_pct"])
    tags = [f"license: {record['license']}"] if record["license"] else []
    front = "\n".join(
        ["---", "library_name: transformers.js", "pipeline_tag: image-classification", *tags, "tags: [onnx]", "---"]
    )
    return f"""{front}

# {record["model"]}, to run without PyTorch

{table(record)}

Over all {evaluation["images"]:,} images of {evaluation["data"]}, {evaluation["split"]}. *Same class*: as PyTorch gives.
*Off by*: largest difference of any output from PyTorch's. Times are for one image, median of {record["timings"]}, with
ONNX Runtime {versions["onnxruntime"]} and PyTorch {versions["torch"]} on {record["hardware"]}. {summary(record)}

- ONNX opset {record["opset"]}, IR version {record["ir_version"]}; the batch size is dynamic everywhere.
- `{NETWORK}*` take `pixel_values`, (batch, 3, {height}, {width}) float32: images resized ({spec["interpolation"]}) to a
  shorter side of {shorter_side}, their centre cropped, values in [0, 1] normalised by mean {list(spec["mean"])} and
  std {list(spec["std"])}. They give `logits`.
- `{CLASSIFIER}*` take `images`, (batch, height, width, 3) uint8, RGB, of any one size, and give `probabilities`: the
  softmax of the logits over the temperature {record["temperature"]:g}.
- Class names are in the metadata (`labels`, JSON): `get_modelmeta().custom_metadata_map` of an ONNX Runtime session,
  `extra_files` of `torch.export.load`. `{RECORD}` has them too, and all figures.
- float16 keeps its input and output in float32. int8: weights per channel in {calibration["weight_bits"]} bits,
  activations uint8, calibrated on {calibration["images"]} images of the {calibration["split"]} split.

```python
import json, numpy, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("onnx/classifier_quantized.onnx")
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
image = numpy.asarray(Image.open("image.png").convert("RGB"))
(probabilities,) = session.run(None, {{"images": image[None]}})
print(labels[probabilities[0].argmax()])
```
"""


def _write_transformers_js(folder: Path, record: Mapping[str, Any], architecture: str) -> None:
    """Write what transformers.js wants beside `onnx/`; `config.json` only where it knows the kind of network."""
    spec = record["input"]
    _, height, width = spec["input_size"]
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",  # shorter side, centre crop, rescale, normalise
        "do_resize": True,
        "size": {"shortest_edge": math.floor(height / spec["crop_pct"])},
        "resample": RESAMPLE[spec["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": spec["mean"],
        "image_std": spec["std"],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    if RESNETS.match(architecture):
        names = dict(enumerate(record["labels"]))
        config = {
            "model_type": "resnet",
            "architectures": ["ResNetForImageClassification"],
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main, DeployConfig)
