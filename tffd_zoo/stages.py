"""Where a timm model keeps its stages: which feature maps Tf-FD works on, and the layers that make them.

All of it is read from the model, never from a table of names: from its `feature_info`, its parameter groups and, for the
layers, one dry run. So every timm architecture serves that has stages at all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.autograd.graph import Node

__all__ = ["Stages", "find_stages", "stage_activations", "stage_norms"]

ISOTROPIC_STAGES = 4
"""Stages that `find_stages` makes of a network whose blocks all keep one shape."""


@dataclass(frozen=True)
class Stages:
    """The stages of a model, shallow to deep: `model.forward_intermediates(images, indices=list(stages.indices))`."""

    indices: tuple[int, ...]
    """Positions in the model's `feature_info`, as `forward_intermediates` takes them."""
    names: tuple[str, ...]
    """Name of the module that ends each stage."""
    channels: tuple[int, ...]
    """Channels of each stage's feature."""
    reductions: tuple[int, ...]
    """Image size over feature size of each stage."""

    def __len__(self) -> int:
        return len(self.indices)


def find_stages(model: nn.Module, choose: Sequence[int] | None = None, *, minimum: int = 1) -> Stages:
    """Find the stages of a timm model among its `feature_info`.

    By default an entry is a stage if it adds a convolution or linear layer that timm does not count to the stem (the
    `stem` of the model's `group_matcher`). That leaves out ResNet's, RegNet's and DenseNet's entry 0, and also VGG's last
    one, which only pools the map of the entry before. In a network whose blocks all have one shape, such as a ViT, a
    block is not a stage: four blocks stand for them, evenly spaced and ending with the last (2, 5, 8, 11 of 12).

    Args:
        model: a timm model.
        choose: positions in `model.feature_info` to use instead, in any order; negative ones count from the end.
        minimum: stages that are needed (the inter-layer loss pairs them, so it needs two).

    Raises:
        ValueError: if the model offers fewer stages than `minimum`, or `choose` names one that it does not have.
    """
    info = _feature_info(model)
    indices = _default_stages(model, info) if choose is None else _chosen_stages(choose, info)
    if len(indices) < minimum:
        raise ValueError(
            f"{type(model).__name__} has {len(indices)} of the {minimum} stages needed (its feature_info: "
            f"{', '.join(entry['module'] for entry in info)}): choose more of these entries, or another architecture."
        )
    return Stages(
        indices=tuple(indices),
        names=tuple(info[i]["module"] for i in indices),
        channels=tuple(info[i]["num_chs"] for i in indices),
        reductions=tuple(info[i]["reduction"] for i in indices),
    )


def stage_norms(model: nn.Module, stages: Stages, input_size: tuple[int, int, int]) -> list[nn.Module]:
    """The BatchNorm behind every stage's feature, whose scale `bn_scale` ranks the channels by.

    It is the last affine BatchNorm on the main path to the feature, with nothing but channel-wise operations (the
    residual sum, an activation, a gate) between the two; never one on a shortcut. Where a convolution, a concatenation
    or another kind of norm makes the feature, as in pre-activation networks (ResNetV2, WRN, DenseNet), it is the first
    BatchNorm that reads it.

    Found on the autograd graph of one dry run on a random image, which leaves the model and the random state as they were.

    Args:
        model: a timm model.
        stages: its stages, from `find_stages`.
        input_size: (channels, height, width) of the images.

    Raises:
        ValueError: if a stage's feature has no such BatchNorm (ConvNeXt, ViT), naming the stage and its norm layers.
    """
    final, features = _dry_run(model, stages, input_size)
    by_weight = {
        module.weight.data_ptr(): module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
    }
    norms = []
    for name, feature in zip(stages.names, features, strict=True):
        node = _producing_norm(feature) or _consuming_norm(feature, final)
        norm = by_weight.get(node._saved_weight.data_ptr()) if node is not None and node._saved_weight is not None else None
        if norm is None or norm.num_features != feature.shape[1]:
            raise ValueError(
                f"bn_scale cannot rank stage {name}: no affine BatchNorm makes or reads its {feature.shape[1]} channels "
                f"(norm layers there: {_norm_layers(model, name)}). Choose lp, spread, entropy or hrank, or a network "
                "whose stages end in a BatchNorm, such as a ResNet."
            )
        norms.append(norm)
    return norms


def stage_activations(model: nn.Module, stages: Stages, input_size: tuple[int, int, int]) -> list[nn.Module]:
    """The activation layer whose output is the stage's feature, for every stage: its input is the pre-activation.

    Found by one dry run on a random image, which leaves the model and the random state as they were. An activation may
    work in place, so a hook that keeps its input must clone it.

    Args:
        model: a timm model.
        stages: its stages, from `find_stages`.
        input_size: (channels, height, width) of the images.

    Raises:
        ValueError: if a stage's feature does not come straight out of an activation layer, or that layer runs more than
            once in a forward pass.
    """
    calls: Counter[nn.Module] = Counter()
    outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        calls[module] += 1
        outputs[id(output)] = (module, output, output._version)  # holding the tensor keeps its id its own

    handles = [module.register_forward_hook(record) for module in model.modules() if _is_activation(module)]
    try:
        _, features = _dry_run(model, stages, input_size)
    finally:
        for handle in handles:
            handle.remove()

    activations = []
    for name, feature in zip(stages.names, features, strict=True):
        module, _, version = outputs.get(id(feature), (None, None, None))
        # A version that went on means that something wrote to the output in place, such as a residual sum.
        if module is None or version != feature._version:
            raise ValueError(
                f"stage {name} does not end in an activation layer, so it has no pre-activation to tap: choose a loss that "
                "takes any feature (l2, at, sp, ickd), or a network whose stages end in one, such as a ResNet."
            )
        if calls[module] > 1:
            raise ValueError(
                f"the activation that ends stage {name} runs {calls[module]} times in a forward pass, so its input cannot "
                "be told apart: choose a loss that takes any feature (l2, at, sp, ickd)."
            )
        activations.append(module)
    return activations


# --- feature_info -----------------------------------------------------------------------------------------------------


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None)
    info = list(getattr(info, "info", info) or [])  # timm keeps a list, or a FeatureInfo around one
    missing = "forward_intermediates" if not hasattr(model, "forward_intermediates") else "feature_info"
    if missing == "forward_intermediates" or not info:
        raise ValueError(
            f"{type(model).__name__} has no {missing}, which tells where a model's features are: use a classification model "
            "from timm.create_model (without features_only=True), or give yours both in timm's form."
        )
    return info


def _chosen_stages(choose: Sequence[int], info: Sequence[dict[str, Any]]) -> list[int]:
    count = len(info)
    indices = sorted({i % count for i in choose})
    if not choose or len(indices) < len(choose) or any(not -count <= i < count for i in choose):
        raise ValueError(
            f"stages {list(choose)} cannot be chosen: give different positions from 0 to {count - 1}, which are "
            + ", ".join(f"{i} {entry['module']}" for i, entry in enumerate(info))
        )
    return indices


def _default_stages(model: nn.Module, info: Sequence[dict[str, Any]]) -> list[int]:
    shapes = {(entry["num_chs"], entry["reduction"]) for entry in info}
    if len(info) > ISOTROPIC_STAGES and len(shapes) == 1:
        return [len(info) * (k + 1) // ISOTROPIC_STAGES - 1 for k in range(ISOTROPIC_STAGES)]

    # timm registers modules in the order they run in, so what lies between two entries' modules is what the later adds.
    modules = [name for name, _ in model.named_modules()]
    is_stem = _stem_matcher(model)
    weights = [name.rpartition(".")[0] for name, p in model.named_parameters() if p.ndim > 1 and not is_stem(name)]
    positions = [modules.index(name) for name in weights]

    stages: list[int] = []
    done = -1
    for index, entry in enumerate(info):
        inside = [name == entry["module"] or name.startswith(entry["module"] + ".") for name in modules]
        end = max(position for position, is_inside in enumerate(inside) if is_inside)
        adds = any(done < position <= end for position in positions)
        owns = any(inside[position] for position in positions)  # entries may share a module, as in CoaT
        if adds or (stages and owns):
            stages.append(index)
        done = end
    return stages


def _stem_matcher(model: nn.Module) -> Callable[[str], bool]:
    """Whether timm counts a parameter to the stem."""
    matcher = model.group_matcher() if hasattr(model, "group_matcher") else None
    if callable(matcher):
        layers = group_parameters(model, matcher, reverse=True)
        return lambda name: layers[name] == 0
    stem = (matcher or {}).get("stem")
    return re.compile(stem).match if stem else lambda name: False


# --- the dry run ------------------------------------------------------------------------------------------------------


def _dry_run(model: nn.Module, stages: Stages, input_size: tuple[int, int, int]) -> tuple[Tensor, list[Tensor]]:
    """`forward_intermediates` of one random image with its autograd graph: the final map and the stage features."""
    parameter = next(model.parameters())
    images = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    with _in_eval_mode(model), torch.random.fork_rng(devices=[]), torch.enable_grad():
        # Gradient from the image on, so that frozen layers are on the graph too.
        final, features = model.forward_intermediates(
            images.requires_grad_(), indices=list(stages.indices), output_fmt="NCHW"
        )
    return final, features


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train()  # some models cache in eval mode (LeViT its attention biases) and clear the cache here
        for module, mode in modes.items():
            module.training = mode


# --- the autograd graph -----------------------------------------------------------------------------------------------
# A node is an operation of the forward pass; its `next_functions` are the operations that made its inputs.

_MIXES_CHANNELS = re.compile("Convolution|Linear|Addmm|Mm|Bmm|Attention|LayerNorm|GroupNorm")


def _producing_norm(feature: Tensor) -> Node | None:
    """The BatchNorm nearest to the feature on its main path, if only channel-wise operations lie between."""
    depth = _depths(feature)
    node, size = feature.grad_fn, feature.numel()
    while node is not None and not _MIXES_CHANNELS.search(node.name()):
        if "BatchNorm" in node.name():
            return node
        inputs = [i for i, output in node.next_functions if i in depth and _numel(i, output) == size]
        # A residual sum: the main path is the longer branch, and with equal lengths (RepVGG) the one that ran last.
        # A gated product (squeeze-and-excite): the gate is computed from the feature, so the feature is the shorter one.
        choose = min if node.name().startswith("Mul") else max
        node = choose(inputs, key=lambda i: (depth[i], i._sequence_nr()), default=None)
    return None


def _consuming_norm(feature: Tensor, final: Tensor) -> Node | None:
    """The first BatchNorm that reads the feature itself."""
    readers = [n for n in _depths(final) if "BatchNorm" in n.name() and n.next_functions[0][0] is feature.grad_fn]
    return min(readers, key=lambda node: node._sequence_nr(), default=None)


def _depths(tensor: Tensor) -> dict[Node, int]:
    """Every operation behind the tensor, with the number of operations on the longest path to it from the image."""
    nodes: set[Node] = set()
    frontier = [tensor.grad_fn]
    while frontier:
        node = frontier.pop()
        if node is not None and node not in nodes and not node.name().endswith("AccumulateGrad"):
            nodes.add(node)
            frontier.extend(i for i, _ in node.next_functions)
    depth: dict[Node, int] = {}
    for node in sorted(nodes, key=lambda node: node._sequence_nr()):  # inputs come before what reads them
        depth[node] = 1 + max((depth.get(i, 0) for i, _ in node.next_functions), default=0)
    return depth


def _numel(node: Node, output: int) -> int:
    return torch.Size(node._input_metadata[output].shape).numel()


# --- names of layers --------------------------------------------------------------------------------------------------


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    return not any(module.children()) and (
        home == "torch.nn.modules.activation" or home.startswith("timm.layers.activations")
    )


def _norm_layers(model: nn.Module, stage: str) -> str:
    names = [
        f"{stage}.{name} ({type(module).__name__})".replace("..", ".")
        for name, module in model.get_submodule(stage).named_modules()
        if "norm" in type(module).__name__.lower()
    ]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"
