"""Look inside a model: feature maps in salience order, the spread of salience, and how far the channels repeat another.

    python -m tffd_zoo.inspect tffd_resnet20.ce_c100 cat.png --against tffd_resnet20.c100
    python -m tffd_zoo.inspect local-dir:runs/RUN/export --data uoft-cs/cifar100 --images 512

Per stage the picture shows the salient maps and, each in the place of its teacher, the redundant ones, as the
intra-layer loss pairs them; beside them the histogram of salience and the singular values of the channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro
from timm.data import create_transform
from timm.data.model_config import resolve_input_data_config
from timm.models import parse_model_name
from torch import Tensor

from .classifier import as_rgb
from .cli import run_cli
from .data import EVAL_SPLITS, ImageSource, ImageSpec, eval_loader, open_source
from .known_data import portable_source
from .loading import check_model_name, load_model
from .losses import pair_channels
from .markdown import markdown_table
from .pictures import COLOURS, NEUTRAL, house_style, save_png
from .ranges import COUNT, NOT_NEGATIVE, PART_INSIDE, Range, check_ranges
from .salience import SalienceMetric, stage_salience
from .stages import Stages, find_stages, stage_norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 64
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class InspectConfig:
    """Draw what the channels of a model's stages show, how salient they are, and how alike.

    Of an IMAGE, of images of a data set (--data), or the maps of the one and the figures of the others. The figures of
    one image say little: give --data for them.
    """

    model: tyro.conf.Positional[str]
    """Registered name with or without tag (tffd_resnet20.c100), hf-hub:org/name[@revision] or local-dir:FOLDER."""
    image: tyro.conf.Positional[Path | None] = None
    """The image whose maps are drawn; the first of the data set when not given."""
    against: str | None = None
    """A second model to set beside it, such as the plain twin."""
    data: str | None = None
    """Take the figures from images of this data set: a Hub id, a folder of parquet, an image folder, or 'digits'."""
    split: str | None = None
    """Split of the data set; validation, or else test, when not given."""
    images: Annotated[int, COUNT] = 256
    """So many images of it, spread evenly over the split; their features are kept in memory."""
    stages: Annotated[tuple[int, ...] | None, NOT_NEGATIVE] = None
    """Stages by position in the model's feature_info; those that Tf-FD uses when not given."""
    salience: SalienceMetric = "lp"
    """What makes a channel salient."""
    p: Annotated[int, Range(1, 2)] = 2
    """The p of salience 'lp': 1 or 2."""
    ratio: Annotated[float, PART_INSIDE] = 0.5
    """Part of the channels that is salient."""
    maps: Annotated[int, COUNT] = 32
    """Draw at most so many salient and so many redundant maps of a stage."""
    out: Path = Path("inspect.png")
    """Where the picture goes."""


@dataclass(frozen=True)
class StageView:
    """One stage of one model on some images."""

    name: str
    """Module that ends the stage."""
    maps: Tensor
    """(C, H, W): the feature of the one image that is drawn."""
    salience: Tensor
    """(C,)"""
    teachers: Tensor
    """(C,) int64: the channel that each channel learns from; a salient one is its own."""
    singular_values: Tensor
    """(C,) of the channels over all images and places, descending."""
    likeness: float
    """Mean cosine of a redundant channel and its teacher."""
    any_likeness: float
    """Mean cosine of any two channels, to hold `likeness` against."""

    @property
    def salient(self) -> Tensor:
        """The salient channels, the most salient first."""
        return self._ordered(self.teachers == torch.arange(len(self.teachers)))

    @property
    def redundant(self) -> Tensor:
        """The redundant channels, the most salient first: the j-th learns from the (j mod K)-th salient one."""
        return self._ordered(self.teachers != torch.arange(len(self.teachers)))

    def _ordered(self, chosen: Tensor) -> Tensor:
        order = self.salience.argsort(descending=True, stable=True)
        return order[chosen[order]]

    @property
    def effective_rank(self) -> float:
        return effective_rank(self.singular_values)


@dataclass(frozen=True)
class Look:
    """What there is to see."""

    models: Mapping[str, Sequence[StageView]]
    """Stages by the name of their model."""
    image: Tensor
    """(3, H, W) in [0, 1]: what the maps are of, as the first model gets it."""
    images: str
    """What the figures are of."""


# --- the figures ------------------------------------------------------------------------------------------------------


def effective_rank(singular_values: Tensor) -> float:
    """exp(-sum p ln p) with p_i = sigma_i / sum_j sigma_j: C for C orthogonal channels of one norm, 1 for C copies.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. Zero for all zeros.
    """
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(singular_values / total).sum().exp().item()


def channel_gram(features: Tensor) -> Tensor:
    """Gram matrix X X^T, (C, C) float64, of the channels' values over all images and places, X of shape (C, N H W).

    Not centred: a copy of a channel is a multiple of it.
    """
    channels = features.shape[1]
    gram = torch.zeros(channels, channels, dtype=torch.float64)
    for part in features.split(BATCH):
        values = part.double().transpose(0, 1).reshape(channels, -1)
        gram += values @ values.T
    return gram


def singular_values(gram: Tensor) -> Tensor:
    """Singular values of X, descending, from its Gram matrix X X^T."""
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


def cosines(gram: Tensor) -> Tensor:
    """Cosine of every two channels over all images and places, (C, C); a channel of zeros is like none (0)."""
    norms = gram.diagonal().sqrt().clamp_min(TINY)
    return gram / norms.outer(norms)


def view_stages(
    model: Any, stages: Stages, image: Tensor, images: Iterable[Tensor], config: InspectConfig
) -> list[StageView]:
    """See every stage of `model`, in eval mode.

    Args:
        model: a timm model.
        stages: its stages.
        image: (1, 3, H, W), whose maps are kept.
        images: batches, whose salience and singular values are taken.
        config: how to score and pair the channels.
    """

    @torch.no_grad()
    def features_of(batch: Tensor) -> list[Tensor]:
        indices = list(stages.indices)
        return model.forward_intermediates(batch, indices=indices, output_fmt="NCHW", intermediates_only=True)

    model.eval()
    channels, height, width = image.shape[1:]
    norms = stage_norms(model, stages, (channels, height, width)) if config.salience == "bn_scale" else None
    maps = [feature[0] for feature in features_of(image)]
    features = [torch.cat(parts) for parts in zip(*map(features_of, images), strict=True)]
    saliences = stage_salience(features, config.salience, p=config.p, norms=norms)
    views = []
    for name, shown, feature, salience in zip(stages.names, maps, features, saliences, strict=True):
        gram, teachers = channel_gram(feature), pair_channels(salience, config.ratio)
        cosine, own = cosines(gram), torch.arange(len(teachers))
        redundant, others = own[teachers != own], ~torch.eye(len(own), dtype=torch.bool)
        views.append(
            StageView(
                name=name,
                maps=shown,
                salience=salience,
                teachers=teachers,
                singular_values=singular_values(gram),
                likeness=cosine[redundant, teachers[redundant]].mean().item(),
                any_likeness=cosine[others].mean().item(),
            )
        )
    return views


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(look: Look, config: InspectConfig) -> Figure:
    """One row per stage: the maps of every model, then the salience and the singular values of all."""
    from matplotlib.figure import Figure

    models = look.models
    depth = max(len(views) for views in models.values())
    width_ratios = [0.5, *[1.0] * (2 * len(models)), 0.85, 0.85]
    figure = Figure(figsize=(2.9 * sum(width_ratios), 2.5 * depth + 0.6), layout="constrained")
    figure.suptitle(f"Maps of the image; salience and ranks over {look.images}.", fontsize=10, x=0.01, ha="left")
    panels = figure.subplots(depth, len(width_ratios), squeeze=False, width_ratios=width_ratios)
    for stage, (left, *maps, histogram, spectrum) in enumerate(panels):
        left.set_axis_off()
        present = {name: views[stage] for name, views in models.items() if stage < len(views)}
        for position, name in enumerate(models):
            pair = maps[2 * position : 2 * position + 2]
            if name not in present:  # the other model has more stages
                for axes in pair:
                    axes.set_axis_off()
                continue
            view, colour = present[name], (COLOURS[0], NEUTRAL)[position]
            channels, height, width = view.maps.shape
            _draw_maps(pair[0], view.maps, view.salient, config.maps)
            _draw_maps(pair[1], view.maps, view.redundant, config.maps)
            _title(pair[0], f"{_shortened(name)}\n{view.name}, {channels} x {height} x {width}: salient", colour)
            likeness = f"mean cosine {view.likeness:.2f}; any two {view.any_likeness:.2f}"
            _title(pair[1], f"redundant, where their teachers are\n({likeness})", colour)
            values = view.singular_values / view.singular_values.sum().clamp_min(TINY)
            rank = f"effective rank {view.effective_rank:.1f} of {channels}"
            spectrum.plot(range(1, channels + 1), values.numpy(), color=colour, label=rank)
        relative = [view.salience / view.salience.mean().clamp_min(TINY) for view in present.values()]
        bins = torch.linspace(0, torch.cat(relative).max().clamp_min(TINY).item(), 25).tolist()
        for values, colour in zip(relative, (COLOURS[0], NEUTRAL), strict=False):
            histogram.hist(values.numpy(), bins, histtype="stepfilled", color=colour, alpha=0.5)
        _title(histogram, f"channels by salience ({config.salience}),\nmean of the stage = 1")
        histogram.yaxis.get_major_locator().set_params(integer=True)
        _title(spectrum, "singular values of the channels,\nshare of their sum")
        spectrum.set(yscale="log", ylim=(1e-4, 1.5))
        spectrum.legend(loc="lower left")
    panels[0][0].imshow(look.image.permute(1, 2, 0).numpy(), interpolation="nearest")
    panels[0][0].set_anchor("NW")
    _title(panels[0][0], "image")
    return figure


def _title(axes: Any, text: str, colour: str = NEUTRAL) -> None:
    axes.set_title(text, fontsize=8.5, color=colour)


def _shortened(name: str, most: int = 36) -> str:
    """A model's name that fits above its maps: of a folder the last part that says something."""
    source, model_id = parse_model_name(name)
    if source == "local-dir":
        name = next(part for part in reversed(Path(model_id).absolute().parts) if part != "export")
    return name if len(name) <= most else f"{name[: most - 3]}..."


def _draw_maps(axes: Any, maps: Tensor, channels: Tensor, most: int) -> None:
    """Maps in reading order, each from its own lowest value (dark) to its highest (bright)."""
    axes.set_axis_off()
    tiles = maps[channels[:most]].float()
    if not len(tiles):
        return
    low, high = tiles.amin((1, 2), keepdim=True), tiles.amax((1, 2), keepdim=True)
    tiles = mosaic((tiles - low) / (high - low).clamp_min(TINY))
    axes.imshow(tiles.numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axes.set_anchor("NW")


def mosaic(tiles: Tensor) -> Tensor:
    """(T, H, W) as one picture, about as many tiles in a row as in a column, with gaps of nan between them."""
    count, height, width = tiles.shape
    square = math.ceil(math.sqrt(count))
    columns = next(columns for columns in range(square, count + 1) if count % columns == 0)
    if columns > 2 * square:  # a prime number of tiles, or nearly
        columns = square
    rows, gap = math.ceil(count / columns), max(1, height // 16)
    canvas = tiles.new_full((rows * (height + gap) - gap, columns * (width + gap) - gap), torch.nan)
    for position, tile in enumerate(tiles):
        top, left = position // columns * (height + gap), position % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return canvas


# --- the command ------------------------------------------------------------------------------------------------------


def main(config: InspectConfig) -> None:
    """Draw the picture that `config` asks for, and print its figures.

    Raises:
        ValueError, OSError: a model, the image or the data cannot be used.
    """
    look = look_inside(config)
    with house_style():
        save_png(draw(look, config), config.out)
    print(f"{table(look)}\n\nover {look.images}; {config.out}")


def look_inside(config: InspectConfig) -> Look:
    """See the models of `config` on its images, each prepared as the model wants them.

    Raises:
        ValueError, OSError: a model, the image or the data cannot be used.
    """
    check_ranges(config)
    if config.against == config.model:
        raise ValueError(f"--against names the same model, {config.model}; give another one")
    names = [config.model, *([config.against] if config.against else [])]
    for name in names:
        check_model_name(name)
    source = _open_images(config.data, config) if config.data is not None else None
    if config.image is not None:
        picture = as_rgb(config.image)
    elif source is not None:
        picture = source.decode(0)
    else:
        raise ValueError("there is nothing to look at: name an IMAGE, or a data set with --data")

    models: dict[str, list[StageView]] = {}
    shown = []
    for name in names:
        model = load_model(name)
        spec = ImageSpec(**resolve_input_data_config(model, use_test_size=True))
        image = create_transform(**dataclasses.asdict(spec))(picture)[None]
        batches = [image] if source is None else (batch.images for batch in eval_loader(source, spec, BATCH))
        models[name] = view_stages(model, find_stages(model, config.stages), image, batches, config)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
        shown.append((image[0] * std + mean).clamp(0, 1))
    images = "this one image"
    if source is not None:
        images = f"{len(source)} images of split {source.split} of {portable_source(source.name, source.revision)}"
    return Look(models, shown[0], images)


def table(look: Look) -> str:
    """The figures of every stage."""
    header = ["model", "stage", "channels", "effective rank", "cosine to teacher", "of any two"]
    rows = []
    for name, views in look.models.items():
        for view in views:
            figures = [f"{view.effective_rank:.1f}", f"{view.likeness:.3f}", f"{view.any_likeness:.3f}"]
            rows.append([name, view.name, str(len(view.salience)), *figures])
    return markdown_table(header, rows)


def _open_images(data: str, config: InspectConfig) -> ImageSource:
    source = open_source(data, config.split or EVAL_SPLITS)
    count = min(config.images, len(source))
    return source.subset([len(source) * position // count for position in range(count)])


if __name__ == "__main__":
    run_cli(main, InspectConfig)
