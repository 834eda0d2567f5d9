"""Where a timm model keeps its stages: which feature maps Tf-FD works on, and the layers that make them.

All of it is read from the model, never from a table of names: from its `feature_info` and parameter groups and, for the
layers, from one dry run. So every timm architecture serves that has stages at all.
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
from timm.utils import unwrap_model
from torch import Tensor, nn

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
    """Find the stages of a timm model among the entries of its `feature_info`.

    By default an entry is a stage if it adds a convolution or linear layer that timm does not count to the stem
    (`stem` in the model's `group_matcher`). That leaves out entry 0 of a ResNet, RegNet or DenseNet, and the last one
    of a VGG, which only pools the map before it. Where all entries have one shape, as the blocks of a ViT do, a block
    is no stage: four of them are taken, evenly spaced and ending with the last (2, 5, 8 and 11 of 12).

    Args:
        model: a timm model.
        choose: positions in `model.feature_info` to take instead; negative ones count from the end.
        minimum: how many stages are needed; the inter-layer loss pairs them, so it needs two.

    Raises:
        ValueError: if the model offers fewer stages than `minimum`, or `choose` names one that it does not have, or it
            is wrapped.
    """
    if unwrap_model(model) is not model:
        raise ValueError(
            f"{type(model).__name__} wraps the model, and its stages are read past the wrapper: pass the model itself, "
            "then compile or wrap the whole task (task.compile(), DistributedDataParallel(task))"
        )
    info = _feature_info(model)
    indices = _default_stages(model, info) if choose is None else _chosen_stages(choose, info)
    if len(indices) < minimum:
        raise ValueError(
            f"{minimum} stages are needed and {type(model).__name__} gives {len(indices)}; choose more of its features "
            f"({_listing(info)}), or an architecture with more"
        )
    return Stages(
        indices=tuple(indices),
        names=tuple(info[i]["module"] for i in indices),
        channels=tuple(info[i]["num_chs"] for i in indices),
        reductions=tuple(info[i]["reduction"] for i in indices),
    )


def stage_norms(model: nn.Module, stages: Stages, input_size: tuple[int, int, int]) -> list[nn.Module]:
    """The BatchNorm behind every stage's feature, whose scale `bn_scale` ranks the channels by.

    It is the last affine BatchNorm on the main path to the feature, with nothing but channel-wise operations (an
    activation, a gate, the residual sum) between the two; never one on a shortcut. Where something else makes the
    feature, as in the pre-activation networks (ResNetV2, WRN, DenseNet), it is the first BatchNorm that reads it.

    Found in the autograd graph of one dry run on a random image, which leaves the model and the random state untouched.
    timm starts the last scale of a residual block at zero: see `tffd_zoo.salience.bn_scale` for what that means.

    Args:
        model: a timm model.
        stages: its stages, from `find_stages`.
        input_size: (channels, height, width) of the images.

    Raises:
        ValueError: if a stage's feature has no such BatchNorm (ConvNeXt, ViT), naming the stage and its norm layers.
    """
    logits, features = _dry_run(model, stages, input_size)
    by_weight = {m.weight: m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine}
    norms: list[nn.Module] = []
    for name, feature in zip(stages.names, features, strict=True):
        node = _producing_norm(feature) or _consuming_norm(feature, logits)
        weight = None if node is None else node.next_functions[1][0]  # the inputs are the feature, the scale, the shift
        norm = None if weight is None else by_weight.get(weight.variable)
        if norm is None or norm.num_features != feature.shape[1]:
            raise ValueError(
                f"bn_scale cannot rank the {feature.shape[1]} channels of stage {name}: no affine BatchNorm makes or "
                f"reads them (norm layers there: {_norm_layers(model, name)}); choose lp, spread, entropy or hrank, or "
                "an architecture whose stages end in a BatchNorm, such as a ResNet"
            )
        norms.append(norm)
    return norms


def stage_activations(model: nn.Module, stages: Stages, input_size: tuple[int, int, int]) -> list[nn.Module]:
    """The activation layer whose output is the stage's feature, for every stage; its input is the pre-activation.

    Found by one dry run on a random image, which leaves the model and the random state untouched. A layer may work in
    place: whoever keeps its input has to clone it.

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
        # A later version means that something was written into the output since, such as a residual sum.
        if module is None or version != feature._version:
            raise ValueError(
                f"stage {name} does not end in an activation layer, so there is no pre-activation to tap; choose a "
                "loss for any feature (l2, at, sp, ickd), or an architecture whose stages end in one, such as a ResNet"
            )
        if calls[module] > 1:
            raise ValueError(
                f"the activation layer that ends stage {name} runs {calls[module]} times in one pass, so its inputs "
                "cannot be told apart; choose a loss for any feature (l2, at, sp, ickd)"
            )
        activations.append(module)
    return activations


# --- feature_info -----------------------------------------------------------------------------------------------------


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None)
    info = list(getattr(info, "info", info) or [])  # timm keeps a list, or a FeatureInfo around one
    missing = "feature_info" if hasattr(model, "forward_intermediates") else "forward_intermediates"
    if missing == "forward_intermediates" or not info:
        raise ValueError(
            f"{type(model).__name__} has no {missing} to find its features with; pass a classification model as "
            "timm.create_model gives it (without features_only), or add both in timm's form"
        )
    return info


def _chosen_stages(choose: Sequence[int], info: Sequence[dict[str, Any]]) -> list[int]:
    count = len(info)
    indices = sorted({i % count for i in choose})
    if not choose or len(indices) < len(choose) or any(not -count <= i < count for i in choose):
        raise ValueError(f"stages {list(choose)} cannot be chosen; give different positions out of {_listing(info)}")
    return indices


def _listing(info: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{position}: {entry['module']}" for position, entry in enumerate(info))


def _default_stages(model: Any, info: Sequence[dict[str, Any]]) -> list[int]:
    shapes = {(entry["num_chs"], entry["reduction"]) for entry in info}
    if len(info) > ISOTROPIC_STAGES and len(shapes) == 1:
        return [len(info) * (k + 1) // ISOTROPIC_STAGES - 1 for k in range(ISOTROPIC_STAGES)]

    # timm registers modules in the order they run in, so what lies between two entries' modules is what the later adds.
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    is_stem = _stem_matcher(model)
    weights = [name.rpartition(".")[0] for name, p in model.named_parameters() if p.ndim > 1 and not is_stem(name)]

    stages: list[int] = []
    done = -1
    for index, entry in enumerate(info):
        inside = {name for name in order if name == entry["module"] or name.startswith(entry["module"] + ".")}
        if not inside:  # HRNet and a few others name places of their forward pass that are no modules
            if not (is_stem(entry["module"]) or entry["module"] == "stem"):
                stages.append(index)
            continue
        end = max(order[name] for name in inside)
        adds = any(done < order[name] <= end for name in weights)
        owns = any(name in inside for name in weights)  # entries may share a module, as in CoaT
        if adds or owns:
            stages.append(index)
        done = end
    return stages


def _stem_matcher(model: Any) -> Callable[[str], bool]:
    """Whether timm counts a parameter, by its name, to the stem."""
    matcher = model.group_matcher() if hasattr(model, "group_matcher") else None
    if callable(matcher):
        layers = group_parameters(model, matcher, reverse=True)
        return lambda name: layers.get(name) == 0
    stem = re.compile((matcher or {}).get("stem") or "(?!)")
    return lambda name: stem.match(name) is not None


# --- the dry run ------------------------------------------------------------------------------------------------------


def _dry_run(model: Any, stages: Stages, input_size: tuple[int, int, int]) -> tuple[Tensor, list[Tensor]]:
    """Logits and stage features of one random image, with their autograd graph."""
    parameter = next(model.parameters())
    images = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    gpus = [parameter.device] if parameter.is_cuda else []
    try:
        with _untouched(model), torch.random.fork_rng(devices=gpus), torch.enable_grad():
            final, features = model.forward_intermediates(images, indices=list(stages.indices), output_fmt="NCHW")
            return model.forward_head(final), features
    except (AssertionError, RuntimeError) as error:  # how timm and torch refuse a shape
        raise ValueError(f"{type(model).__name__} cannot take images of {input_size}: {error}") from error


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, with frozen parameters on the autograd graph too; afterwards as it was before."""
    modes = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.train()  # some models cache in eval mode (LeViT its attention biases) and clear the cache here
        for module, mode in modes.items():
            module.training = mode


# --- the autograd graph -----------------------------------------------------------------------------------------------
# A node is an operation of the forward pass; its `next_functions` are the operations that made its inputs.

_MIXES_CHANNELS = re.compile("Convolution|Linear|Addmm|Mm|Bmm|Attention|LayerNorm|GroupNorm")


def _producing_norm(feature: Tensor) -> Any:
    """The BatchNorm nearest to the feature on its main path, if only channel-wise operations lie between; else None."""
    depth = _depths(feature)
    node: Any = feature.grad_fn
    while node is not None and not _MIXES_CHANNELS.search(node.name()):
        if "BatchNorm" in node.name():
            return node
        inputs = [i for i, output in node.next_functions if i in depth and _numel(i, output) == feature.numel()]
        # Of a residual sum the main path is the longer branch or, where they are as long (RepVGG), the one that ran
        # last. Of a product with a gate, which is itself computed from the feature, it is the shorter one.
        choose = min if node.name().startswith("Mul") else max
        node = choose(inputs, key=lambda i: (depth[i], i._sequence_nr()), default=None)
    return None


def _consuming_norm(feature: Tensor, logits: Tensor) -> Any:
    """The first BatchNorm that reads the feature as it is; else None."""
    readers = [n for n in _depths(logits) if "BatchNorm" in n.name() and n.next_functions[0][0] is feature.grad_fn]
    return min(readers, key=lambda node: node._sequence_nr(), default=None)


def _depths(tensor: Tensor) -> dict[Any, int]:
    """Every operation behind a tensor, and how many operations the longest path from the image to it has."""
    nodes: set[Any] = set()
    frontier: list[Any] = [tensor.grad_fn]
    while frontier:
        node = frontier.pop()
        if node is not None and node not in nodes and not node.name().endswith("AccumulateGrad"):
            nodes.add(node)
            frontier.extend(i for i, _ in node.next_functions)
    depth: dict[Any, int] = {}
    for node in sorted(nodes, key=lambda node: node._sequence_nr()):  # an operation runs after those it reads
        depth[node] = 1 + max((depth.get(i, 0) for i, _ in node.next_functions), default=0)
    return depth


def _numel(node: Any, output: int) -> int:
    return torch.Size(node._input_metadata[output].shape).numel()


# --- names of layers --------------------------------------------------------------------------------------------------


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    return not any(module.children()) and (
        home == "torch.nn.modules.activation" or home.startswith("timm.layers.activations")
    )


def _norm_layers(model: nn.Module, stage: str) -> str:
    names = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if (name == stage or name.startswith(stage + ".")) and "norm" in type(module).__name__.lower()
    ]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"
