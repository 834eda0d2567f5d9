"""A model as files that run without timm: ONNX in three precisions and torch.export's, each alone and as a classifier.

Alone, a file maps pixel values (N, 3, H, W), resized and normalised by the caller, to logits. As a classifier it maps
images (N, height, width, 3), uint8 and of any one size, to probabilities: preprocessing and softmax are inside.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import interpolate

from .data import ImageSpec

OPSET = 18
"""The first whose Resize can smooth before it shrinks, as Pillow does."""
PIXELS, LOGITS, IMAGES, PROBABILITIES = "pixel_values", "logits", "images", "probabilities"
DIMENSIONS = {PIXELS: ("batch", "", "", ""), IMAGES: ("batch", "height", "width", "")}
"""Names of what may be of any size."""
RESIZABLE = ("bilinear", "bicubic")

Array = np.ndarray


class Preprocess(nn.Module):
    """timm's evaluation transform in tensor operations that every runtime has: uint8 images to pixel values.

    Shorter side to `crop / crop_pct`, centre crop, normalisation. As Pillow does, it resizes across and then down, and
    rounds to whole grey levels after each: results are Pillow's but for one level here and there.

    Raises:
        ValueError: the spec asks for another kind of resizing or cropping.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        _, height, width = spec.input_size
        if height != width or spec.crop_mode != "center" or spec.interpolation not in RESIZABLE:
            raise ValueError(
                f"preprocessing by {spec.interpolation}, crop mode {spec.crop_mode}, to {height} x {width} pixels "
                "cannot be put into a file, only a square centre crop, bilinear or bicubic; change the model's config"
            )
        self.crop = height
        self.shorter_side = math.floor(height / spec.crop_pct)
        self.interpolation = spec.interpolation
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float().contiguous()
        height, width = pixels.shape[-2:]
        shorter: int = torch.sym_min(height, width)  # type: ignore[assignment]
        new_height, new_width = self.shorter_side * height // shorter, self.shorter_side * width // shorter
        for size in ((height, new_width), (new_height, new_width)):
            pixels = interpolate(pixels, size=size, mode=self.interpolation, antialias=True).round().clamp(0, 255)
        rows, columns = (self._middle(side) for side in (new_height, new_width))
        pixels = pixels.index_select(-2, rows).index_select(-1, columns)
        return (pixels / 255 - self.mean) / self.std

    def _middle(self, side: int) -> Tensor:
        """Indices of the crop; half a pixel goes to the even side, as torchvision's rounding has it."""
        half, odd = (side - self.crop) // 2, (side - self.crop) % 2
        return half + odd * (half % 2) + torch.arange(self.crop)


class Classifier(nn.Module):
    """Images to probabilities: `Preprocess`, the network, softmax of the logits over `temperature`."""

    def __init__(self, network: nn.Module, spec: ImageSpec, temperature: float = 1.0) -> None:
        super().__init__()
        self.preprocess = Preprocess(spec)
        self.network = network
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        return (self.network(self.preprocess(images)) / self.temperature).softmax(dim=-1)


# --- torch.export -----------------------------------------------------------------------------------------------------


def export_network(network: nn.Module, spec: ImageSpec) -> ExportedProgram:
    """The network for pixel values of any batch size."""
    return _export(network, torch.zeros(2, *spec.input_size), {0: Dim("batch")})


def export_classifier(network: nn.Module, spec: ImageSpec, temperature: float = 1.0) -> ExportedProgram:
    """The network with preprocessing and softmax, for images of any one size."""
    return _export_images(Classifier(network, spec, temperature))


def export_preprocessing(spec: ImageSpec) -> ExportedProgram:
    return _export_images(Preprocess(spec))


def _export_images(module: nn.Module) -> ExportedProgram:
    images = torch.zeros(2, 60, 50, 3, dtype=torch.uint8)
    return _export(module, images, {0: Dim("batch"), 1: Dim("height", min=2), 2: Dim("width", min=2)})


def _export(module: nn.Module, example: Tensor, dynamic: Mapping[int, Dim]) -> ExportedProgram:
    program = torch.export.export(module.eval(), (example,), dynamic_shapes=(dict(dynamic),))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # file names of this machine
    return program


def save_program(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a `.pt2`; `torch.export.load(path, extra_files=dict.fromkeys(metadata, ""))` gives the metadata back."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=dict(metadata))
    path.write_bytes(buffer.getvalue())


# --- ONNX -------------------------------------------------------------------------------------------------------------


def to_onnx(program: ExportedProgram, input_name: str, output_name: str) -> onnx.ModelProto:
    """The program as ONNX, float32, at `OPSET`."""
    converted = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=[input_name],
        output_names=[output_name],
        verbose=False,
    )
    assert converted is not None
    model = converted.model_proto
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph):
        del part.metadata_props[:]  # torch's notes on each node
    del graph.value_info[:]  # shapes that a runtime works out for itself
    (given,) = graph.input
    names = dict(zip((dim.dim_param for dim in _dimensions(given)), DIMENSIONS[input_name], strict=True))
    for dim in (*_dimensions(given), *_dimensions(graph.output[0])):
        if dim.dim_param:
            dim.dim_param = names[dim.dim_param]
    return model


def _dimensions(value: onnx.ValueInfoProto) -> Sequence[onnx.TensorShapeProto.Dimension]:
    return value.type.tensor_type.shape.dim


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and arithmetic in float16; what goes in and comes out stays float32."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())  # the converter works in place
    halved = OnnxModel(convert_float_to_float16(copy, keep_io_types=True))
    halved.topological_sort()  # the converter puts the first cast last
    return halved.model


def to_int8(model: onnx.ModelProto, calibration: Iterable[Array], *, reduce_range: bool = False) -> onnx.ModelProto:
    """Static quantisation by ONNX Runtime: QDQ nodes, weights int8 per channel, activations uint8.

    Args:
        model: float32, pixel values to logits.
        calibration: batches of pixel values, whose lowest and highest activations set the scales.
        reduce_range: weights of 7 bits. x86 CPUs without VNNI (before about 2019) add two products of 8 by 8 bits in 16
            and can overflow.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "quantised"))
        onnx.save_model(model, given)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            _Calibration(calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(quantised)


class _Calibration(CalibrationDataReader):
    def __init__(self, batches: Iterable[Array]) -> None:
        self.batches: Iterator[Array] = iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self.batches, None)
        return None if batch is None else {PIXELS: batch}


def with_preprocessing(
    network: onnx.ModelProto, preprocessing: onnx.ModelProto, temperature: float = 1.0
) -> onnx.ModelProto:
    """The classifier: `preprocessing`, then `network`, then softmax of the logits over `temperature`."""
    first = onnx.compose.add_prefix(preprocessing, "preprocess/", rename_inputs=False, rename_outputs=False)
    first.ir_version = network.ir_version
    merged = onnx.compose.merge_models(first, network, io_map=[(PIXELS, PIXELS)])
    graph = merged.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(temperature), "temperature"))
    graph.node.append(onnx.helper.make_node("Div", [LOGITS, "temperature"], ["scaled_logits"]))
    graph.node.append(onnx.helper.make_node("Softmax", ["scaled_logits"], [PROBABILITIES], axis=-1))
    graph.output[0].name = PROBABILITIES
    onnx.checker.check_model(merged)
    return merged


def save_onnx(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a `.onnx` with `metadata`, which a session gives back as `get_modelmeta().custom_metadata_map`."""
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save_model(model, path)


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU with so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
