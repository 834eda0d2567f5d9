"""What a model costs: parameters, multiply-adds, activations, memory, latency and throughput on this machine."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ImageSpec
from ..evaluation import eval_mode, model_cost
from ..hardware import describe_hardware
from .measurement import Figures, Measurement, Part, Sample
from .setting import Setting
from .subject import Subject

BATCH = 128
"""Images at once for the throughput."""
REPEATS = 30
SECONDS = 3.0
"""A timing ends after so many repeats or so long, whichever comes first, but not before three repeats."""


def activations(model: nn.Module, image: Tensor) -> int:
    """Values that the convolutions and linear layers of `model` give for one image (1, C, H, W).

    As Radosavovic et al. count them ("Designing Network Design Spaces", CVPR 2020), linear layers included.
    """
    counted = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal counted
        counted += output.numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with eval_mode(model), torch.inference_mode():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return counted


def peak_memory(model: nn.Module, images: Tensor) -> int:
    """Bytes of weights, images and live activations at the fullest moment of a forward pass.

    On CUDA what the allocator says; elsewhere the sum of torch's own allocations, as its profiler records them.
    """
    resident = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers(), images])
    with eval_mode(model), torch.inference_mode():
        if images.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(images.device)
            model(images)
            return torch.cuda.max_memory_allocated(images.device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(images)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return resident + peak


def seconds_each(run: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    """Median wall-clock time of `run`, after two runs to warm up."""
    times: list[float] = []
    for _ in range(2):
        run()
    wait()
    while len(times) < 3 or (len(times) < REPEATS and sum(times) < SECONDS):
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(subject: Subject, setting: Setting) -> Measurement:
    if subject.rank > 0:  # two that are timed at once would slow each other down; the first process's times are written
        return Measurement()
    model, size, device = subject.model, subject.spec.input_size, subject.device
    parameters, macs = model_cost(model, size)
    image = torch.randn(1, *size, device=device).to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, *size, device=device).to(memory_format=torch.channels_last)
    facts: dict[str, Any] = {
        "params": parameters,
        "macs": macs,
        "activations": activations(model, image),
        "peak_mib_batch1": round(peak_memory(model, image) / 2**20, 2),
        f"peak_mib_batch{BATCH}": round(peak_memory(model, images) / 2**20, 2),
    }
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    problems = []
    with eval_mode(model), torch.inference_mode():
        for name, prepare in (("eager", _as_it_is), ("compiled", _compiled), ("onnx", _onnx)):
            try:
                run = prepare(model, image)
                facts[f"latency_ms_{name}"] = round(1e3 * seconds_each(partial(run, image), wait), 3)
                facts[f"images_per_second_{name}"] = round(BATCH / seconds_each(partial(run, images), wait), 1)
            except Exception as error:  # what a compiler or an exporter refuses has no common base
                problems.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    return Measurement({}, facts | _machine(device), tuple(problems))


def _as_it_is(model: nn.Module, image: Tensor) -> Callable[[Tensor], Any]:
    return model


def _compiled(model: nn.Module, image: Tensor) -> Callable[[Tensor], Any]:
    return torch.compile(model, dynamic=True)


def _onnx(model: nn.Module, image: Tensor) -> Callable[[Tensor], Any]:
    if image.device.type != "cpu":
        raise ValueError("measured on the CPU alone")
    try:
        import onnxruntime

        from ..deployment import PIXELS, export_network, to_onnx
    except ImportError as error:
        raise ValueError(f"needs {error.name}, which is not installed; pip install 'tffd_zoo[deploy]'") from error
    network = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    size = (image.shape[1], image.shape[2], image.shape[3])
    proto = to_onnx(export_network(network, ImageSpec(size)), PIXELS, "logits")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {PIXELS: images.contiguous().numpy()})


def _machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on; a load above the number of cores says that the machine had other work."""
    return {
        "hardware": describe_hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def figures(samples: Mapping[str, Sample]) -> Figures:
    return {}


PART = Part("cost", measure, figures)
