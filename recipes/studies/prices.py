"""What the benchmark measures, a part a function: each price is a ratio of steps that took turns."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_model
from timm import create_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tffd_zoo.allocator import HUGE_PAGES, tune_memory
from tffd_zoo.data import ImageSource, ImageSpec, eval_loader, open_source
from tffd_zoo.evaluation import evaluate, model_cost
from tffd_zoo.recipe import Compilation, Recipe, vary
from tffd_zoo.run_record import METRICS_LINES, read_metrics, weights_file
from tffd_zoo.small_maps import speed_up_small_maps
from tffd_zoo.stages import find_stages
from tffd_zoo.tasks import CANONICAL
from tffd_zoo.training import train
from tffd_zoo.training.build import (
    compile_step,
    image_spec,
    make_loaders,
    make_optimizer,
    make_task,
    memory_format,
    open_sources,
)

from .. import train_imagenet
from .report.study import taught_by
from .studies import NEIGHBOURS, PLUS, SHORT
from .timing import Row, Step, compare, interleave, peak_memory, summary

PLAIN, TFFD = SHORT, vary(SHORT, "tffd", tffd=CANONICAL)
BF16: dict[str, Any] = {"run": {"precision": "bf16"}}
CHANNELS_LAST, NCHW = torch.channels_last, torch.contiguous_format


@dataclass(frozen=True)
class Bench:
    """What the parts share."""

    data: str
    """CIFAR-100."""
    source: ImageSource
    """Its test images."""
    jpeg: str | None
    """Photographs."""
    jpeg_split: str
    accelerator: Accelerator
    scratch: Path
    effort: float = 1.0

    def rounds(self, usual: int) -> int:
        return max(2, round(usual * self.effort))


@contextmanager
def open_bench(
    data: str, jpeg: str | None = None, jpeg_split: str = "validation", effort: float = 1.0
) -> Iterator[Bench]:
    """What the parts share, in a process whose memory is tuned as that of the recipes."""
    tune_memory()
    with TemporaryDirectory() as scratch:
        yield Bench(data, open_source(data, "test"), jpeg, jpeg_split, Accelerator(), Path(scratch), effort)


# --- steps ------------------------------------------------------------------------------------------------------------


class TrainingStep:
    """One training step of a recipe, on one batch of noise: forward, losses, backward, update."""

    def __init__(
        self,
        recipe: Recipe,
        bench: Bench,
        *,
        compiled: Compilation = False,
        layout: torch.memory_format | None = None,
        small_maps: bool = True,
    ) -> None:
        torch.manual_seed(0)
        model = create_model(recipe.model, num_classes=bench.source.num_classes)
        if small_maps:
            speed_up_small_maps(model)
        spec = image_spec(recipe, model)
        device = bench.accelerator.device
        layout = memory_format(recipe, bench.accelerator) if layout is None else layout
        task = make_task(recipe, model, spec, bench.source, batches_per_epoch=391)
        self.task: Any = task.to(device).to(memory_format=layout).train()
        compile_step(self.task, compiled)
        reduced = recipe.run.precision == "bf16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=reduced)
        optim = dataclasses.replace(recipe.optim, opt="sgd", lr=1e-3)  # so that noise does not drive it to infinity
        self.optimizer = make_optimizer(optim, self.task, bench.accelerator)
        size = recipe.optim.batch_size
        self.images = torch.randn(size, *spec.input_size, device=device).to(memory_format=layout)
        self.targets = torch.randint(bench.source.num_classes, (size,), device=device)
        self.indices = torch.arange(size)

    def __call__(self) -> None:
        self.step(self.images, self.targets, self.indices)

    def step(self, images: Tensor, targets: Tensor, indices: Tensor) -> None:
        with self.autocast:
            loss = self.task(images, targets, indices)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def memory(self) -> int:
        """Peak bytes of a step in the steady state."""
        self()
        momenta = [
            value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        return peak_memory(self, self.task, [self.images, self.targets, *momenta])


# Models, image sizes and batches of the targets, and how many rounds tell their ratios.
STEPS = (("tffd_resnet20", 32, 128, 50), ("tffd_resnet18", 64, 64, 16), ("tffd_resnet50", 224, 8, 8))


def twins(model: str, size: int, batch: int) -> dict[str, Recipe]:
    """The recipes of Tf-FD and of plain training for `model`."""
    tffd, plain = (TFFD, PLAIN) if size == 32 else (train_imagenet.TFFD, train_imagenet.PLAIN)
    changes: dict[str, Any] = {"model": model, "data": {"image_size": size}, "optim": {"batch_size": batch}}
    return {"tffd": vary(tffd, "tffd", **changes), "plain": vary(plain, "plain", **changes)}


def steps(bench: Bench) -> Iterator[Row]:
    """Tf-FD's step over the plain one, compiled and eager, in the default layout."""
    for how, compiled in (("compiled", True), ("eager", False)):
        for model, size, batch, rounds in STEPS:
            pair = {k: TrainingStep(r, bench, compiled=compiled) for k, r in twins(model, size, batch).items()}
            times = interleave(pair, bench.rounds(rounds), warmup=4 if compiled else 2)
            target = 1.02 if compiled else 1.05 if size == 32 else None
            yield compare(
                "steps", f"{model.removeprefix('tffd_')} at {size} px, batch {batch}, {how}",
                times["tffd"], times["plain"], bound="<=" if target else None, target=target,
            )  # fmt: skip
            torch.compiler.reset()


def remains(bench: Bench) -> Iterator[Row]:
    """The profile of an eager step: what its operations take with Tf-FD, less without; the eight that take most.

    Beside it what memory allows: the time to copy the features of all stages once, in float32. Whatever a loss needs of
    them it has to read, and a gradient to write.
    """
    narrow, wide = twins(*STEPS[0][:3]), twins("tffd_wrn16_2", 32, 64)
    relations = {"intra_loss": "sp", "inter_loss": "sp"}
    cases = {
        "resnet20, batch 128, float32": narrow,
        "resnet20, batch 128, bf16": _in_bf16(narrow),
        "resnet20, batch 128, bf16, sp": _in_bf16({**narrow, "tffd": vary(narrow["tffd"], "sp", tffd=relations)}),
        "wrn16_2, batch 64, bf16": _in_bf16(wide),
    }
    for case, recipes in cases.items():
        taken: dict[str, list[dict[str, float]]] = {}
        for name, recipe in recipes.items():
            step = TrainingStep(recipe, bench)
            for _ in range(3):
                step()
            for _ in range(bench.rounds(10)):
                with profile(activities=[ProfilerActivity.CPU]) as profiled:
                    step()
                times = {event.key: event.self_cpu_time_total / 1000 for event in profiled.key_averages()}
                taken.setdefault(name, []).append(times)
        extra = {
            key: [
                with_.get(key, 0.0) - without.get(key, 0.0)
                for with_, without in zip(taken["tffd"], taken["plain"], strict=True)
            ]
            for key in taken["tffd"][0]
        }
        whole = [sum(each.values()) for each in taken["plain"]]
        added = [sum(each) for each in zip(*extra.values(), strict=True)]
        yield summary("remains", f"{case}: the plain step", whole, unit="ms")
        yield summary("remains", f"{case}: all that Tf-FD adds", added, unit="ms")
        yield summary("remains", f"{case}: one copy of the features", copies(recipes["tffd"], bench), unit="ms")
        for key in sorted(extra, key=lambda key: -statistics.median(extra[key]))[:8]:
            yield summary("remains", f"{case}: `{key}`", extra[key], unit="ms")


def _in_bf16(recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    return {name: vary(recipe, name, **BF16) for name, recipe in recipes.items()}


def copies(recipe: Recipe, bench: Bench) -> list[float]:
    """Milliseconds that it takes to copy the stages' features in float32, each time anew."""
    model = create_model(recipe.model, num_classes=bench.source.num_classes)
    stages, size = find_stages(model), image_spec(recipe, model).input_size[-1]
    features = [
        torch.randn(recipe.optim.batch_size, channels, size // reduction, size // reduction)
        for channels, reduction in zip(stages.channels, stages.reductions, strict=True)
    ]
    targets = [torch.empty_like(feature) for feature in features]

    def copy() -> None:
        for target, feature in zip(targets, features, strict=True):
            target.copy_(feature)

    return [1000 * seconds for seconds in interleave({"copy": copy}, bench.rounds(10))["copy"]]


def layouts(bench: Bench) -> Iterator[Row]:
    """A plain eager step in channels_last over one in NCHW: what the default layout of an architecture rests on."""
    cases = (
        ("resnet20", 32, 128), ("resnet110", 32, 32), ("resnet8x4", 32, 64), ("wrn40_2", 32, 32), ("vgg8", 32, 64),
        ("resnet18", 32, 128), ("resnet18", 224, 8), ("resnet50", 224, 4),
    )  # fmt: skip
    for name, size, batch in cases:
        changes: dict[str, Any] = {
            "model": f"tffd_{name}", "data": {"image_size": size}, "optim": {"batch_size": batch},
        }  # fmt: skip
        recipe = vary(PLAIN, name, **changes)
        steps: dict[str, Step] = {
            "last": TrainingStep(recipe, bench, layout=CHANNELS_LAST), "first": TrainingStep(recipe, bench, layout=NCHW)
        }  # fmt: skip
        times = interleave(steps, bench.rounds(5), warmup=1)
        yield compare("layouts", f"{name} at {size} px, batch {batch}", times["last"], times["first"])


def precision(bench: Bench) -> Iterator[Row]:
    """Eager steps in bf16: plain ones over those in float32; KD and Tf-FD, its losses eager or compiled, over plain."""
    losses = {"l2": 1.05, "at": 1.15, "sp": 1.15, "ickd": 1.15}
    ways: tuple[tuple[str, Compilation], ...] = (("", False), (", compiled", "losses"))
    for model, batch in (("tffd_resnet20", 128), ("tffd_wrn16_2", 64), ("tffd_resnet18", 64), ("tffd_vgg8", 64)):
        pair = twins(model, 32, batch)
        plain = vary(pair["plain"], "plain", **BF16)
        steps = {"float32": TrainingStep(pair["plain"], bench), "plain": TrainingStep(plain, bench)}
        targets: dict[str, float | None] = {}
        for loss, target in losses.items():
            recipe = vary(pair["tffd"], loss, tffd={"intra_loss": loss, "inter_loss": loss}, **BF16)
            assert recipe.tffd is not None
            for way, compiled in ways if recipe.tffd.fuses else ways[:1]:
                name = f"Tf-FD by {loss}{way}"
                steps[name], targets[name] = TrainingStep(recipe, bench, compiled=compiled), target
        if model == PLAIN.model:
            name = "KD, ResNet-110 teacher"
            steps[name], targets[name] = TrainingStep(vary(knowledge_distillation(bench), "KD", **BF16), bench), None
        times = interleave(steps, bench.rounds(20), warmup=2)
        what = f"{model.removeprefix('tffd_')} at 32 px, batch {batch}, eager"
        yield compare("precision", f"{what}: bf16 / float32, both plain", times["plain"], times["float32"])
        for name, most in targets.items():
            yield compare(
                "precision", f"{what}: {name} / plain, both bf16", times[name], times["plain"],
                bound="<=" if most else None, target=most,
            )  # fmt: skip
        torch.compiler.reset()


def memory(bench: Bench) -> Iterator[Row]:
    """Peak memory of a step; it does not vary from step to step."""
    float32 = twins(*STEPS[0][:3])
    bf16 = _in_bf16(float32)
    cases: tuple[tuple[str, dict[str, Recipe], Compilation], ...] = (
        ("float32, eager", float32, False),
        ("float32, compiled", float32, True),
        ("bf16, eager", bf16, False),
        ("bf16, eager but for its losses", bf16, "losses"),
    )
    for case, pair, compiled in cases:
        tffd = TrainingStep(pair["tffd"], bench, compiled=compiled).memory
        plain = TrainingStep(pair["plain"], bench, compiled=compiled is True).memory
        yield summary("memory", f"resnet20, batch 128, {case}: Tf-FD / plain", [tffd / plain], bound="<=", target=1.03)


def knowledge_distillation(bench: Bench) -> Recipe:
    """Plain training with the logits of a ResNet-110, its weights fresh."""
    teacher = bench.scratch / "teacher"
    weights_file(teacher, "last").parent.mkdir(parents=True, exist_ok=True)
    save_model(create_model("tffd_resnet110", num_classes=bench.source.num_classes), weights_file(teacher, "last"))
    return taught_by(vary(PLAIN, "kd", **PLUS.row("screen-kd-resnet20").change), teacher)


def methods(bench: Bench) -> Iterator[Row]:
    """The poster's chart: how long each method takes to learn from 128 images."""
    recipes = {
        "plain": PLAIN,
        "Tf-FD": TFFD,
        "CS-KD": vary(PLAIN, "cs-kd", **NEIGHBOURS.row("screen-cs-kd").change),
        "BYOT": vary(PLAIN, "byot", **NEIGHBOURS.row("screen-byot").change),
        "KD, ResNet-110 teacher": knowledge_distillation(bench),
    }
    times = interleave({k: TrainingStep(r, bench, compiled=True) for k, r in recipes.items()}, bench.rounds(15), 3)
    for name in [*recipes][1:]:
        yield compare("methods", f"{name} / plain", times[name], times["plain"])
    yield compare(
        "methods", "KD, ResNet-110 teacher / Tf-FD", times["KD, ResNet-110 teacher"], times["Tf-FD"],
        bound=">=", target=3.3,
    )  # fmt: skip


def arithmetic(bench: Bench) -> Iterator[Row]:
    """What multiply-adds allow: a training step is worth three forward passes, and a frozen teacher adds its own."""
    student, teacher = (
        model_cost(create_model(name, num_classes=bench.source.num_classes), (3, 32, 32))[1]
        for name in ("tffd_resnet20", "tffd_resnet110")
    )
    yield summary("arithmetic", "KD, ResNet-110 teacher / plain or Tf-FD", [(3 * student + teacher) / (3 * student)])


NEVER_AGAIN = 10**9
"""Every so many batches: the first alone, which is warm-up."""


def spread(dear: Sequence[float], usual: Sequence[float], every: int) -> list[float]:
    """Time of a step on average when one of `every` is dear; of both in the same rounds."""
    return [(d + (every - 1) * u) / every for d, u in zip(dear, usual, strict=True)]


def salience(bench: Bench) -> Iterator[Row]:
    """What the dearer saliences add, spread over the steps between two rankings."""
    cases: tuple[tuple[str, int, int | None], ...] = (("entropy", 1, None), ("hrank", 50, 8))
    for name, every, images in cases:
        recipes = {"plain": PLAIN} | {
            step: vary(TFFD, name, tffd={"salience": name, "salience_images": images, "rank_every": rank_every})
            for step, rank_every in (("ranking", 1), ("between", NEVER_AGAIN))
            if step == "ranking" or every > 1
        }
        timed = {step: TrainingStep(recipe, bench, compiled=True) for step, recipe in recipes.items()}
        times = interleave(timed, bench.rounds(12), warmup=3)
        on_average = spread(times["ranking"], times.get("between", times["ranking"]), every)
        how = f"every {every} steps" if every > 1 else "every step"
        what = f"{name}, {how}{f', {images} images' if images else ''} / plain"
        yield compare("salience", what, on_average, times["plain"], bound="<=", target=1.05)


# --- feeding and looping ----------------------------------------------------------------------------------------------


def feeding(bench: Bench) -> Iterator[Row]:
    """Images from the real loader beside noise that is there already; our loop beside a bare one."""
    recipe = vary(TFFD, "feeding", data={"source": bench.data}, run={"compile": False})
    step = TrainingStep(recipe, bench)
    sources = open_sources(recipe.data)
    spec, layout = image_spec(recipe, step.task.get_eval_model()), memory_format(recipe, bench.accelerator)
    loader = make_loaders(recipe, spec, *sources, layout, bench.accelerator).train
    batches = loader.epoch(0)

    def real() -> None:
        images, targets, indices, _ = next(batches)
        step.step(images, targets, indices)

    times = interleave({"noise": step, "real": real}, bench.rounds(40))
    yield compare(
        "feeding", "CIFAR-100, images/s from the real loader / from noise", times["noise"], times["real"],
        bound=">=", target=0.97,
    )  # fmt: skip

    window, windows = 20, 4
    ours, bare = [], []
    for attempt in range(bench.rounds(2)):
        folder = bench.scratch / f"loop{attempt}"
        run = {"output": folder, "log_every": window, "max_steps": window * (windows + 1)}
        train(vary(recipe, "loop", run=run))
        records = [r for r in read_metrics(folder / METRICS_LINES) if r["kind"] == "train"]
        ours += [r["images_per_second"] for r in records[1 : windows + 1]]
        stream = loader.epoch(0)
        for number in range(windows + 1):
            started = time.perf_counter()
            for _ in range(window):
                images, targets, indices, _ = next(stream)
                step.step(images, targets, indices)
            if number:
                bare.append(window * recipe.optim.batch_size / (time.perf_counter() - started))
    yield compare("feeding", "images/s of our loop / of a bare PyTorch loop", ours, bare, bound=">=", target=0.98)


def streaming(bench: Bench) -> Iterator[Row]:
    """JPEGs for training, decoded and augmented, without a network to train."""
    if bench.jpeg is None:
        return
    split = bench.jpeg_split
    data = {"source": bench.jpeg, "train_split": split, "eval_split": split, "workers": 2}
    loaders = {}
    for name, streamed in (("streamed", True), ("on-disk", False)):
        recipe = vary(train_imagenet.TFFD, name, data={**data, "streaming": streamed}, optim={"batch_size": 50})
        sources = open_sources(recipe.data)
        spec = image_spec(recipe, create_model(recipe.model))
        loaders[name] = make_loaders(recipe, spec, *sources, CHANNELS_LAST, bench.accelerator).train
    counts: dict[str, int] = {}

    def epoch(name: str) -> Callable[[], None]:
        def run() -> None:
            counts[name] = sum(len(batch.images) for batch in loaders[name].epoch(0))

        return run

    times = interleave({name: epoch(name) for name in loaders}, bench.rounds(3), warmup=0)
    assert counts["streamed"] == counts["on-disk"]
    yield compare("streaming", "images/s streamed / from the disk, 2 workers", times["on-disk"], times["streamed"])
    rates = [counts["on-disk"] / seconds for seconds in times["on-disk"]]
    yield summary("streaming", "images/s from the disk, 2 workers", rates, unit="images/s")


def evaluation(bench: Bench) -> Iterator[Row]:
    """Our evaluation beside a loop like that of timm's validate.py: decoding, loading and metrics included."""
    cases = [("CIFAR-100, ResNet-20", bench.data, "test", "tffd_resnet20", 32, 1.2, 2)]
    if bench.jpeg is not None:
        cases.append(("JPEG, ResNet-18 at 224 px", bench.jpeg, bench.jpeg_split, "tffd_resnet18", 224, 1.0, 2))
    for what, data, split, name, size, target, rounds in cases:
        source = open_source(data, split)
        model = create_model(name, num_classes=source.num_classes).eval()
        spec = ImageSpec.from_model(model, input_size=(3, size, size))
        last = create_model(name, num_classes=source.num_classes).eval().to(memory_format=CHANNELS_LAST)

        def ours(source: ImageSource = source, spec: ImageSpec = spec, model: nn.Module = last) -> None:
            loader = eval_loader(source, spec, 256, memory_format=CHANNELS_LAST)
            evaluate(model, loader, device="cpu", memory_format=CHANNELS_LAST, progress=False)

        def theirs(source: ImageSource = source, spec: ImageSpec = spec, model: nn.Module = model) -> None:
            validate_like_timm(source, spec, model)

        times = interleave({"ours": ours, "timm": theirs}, bench.rounds(rounds), warmup=0)
        yield compare(
            "evaluation", f"images/s of ours / of timm's loop: {what}", times["timm"], times["ours"],
            bound=">=", target=target,
        )  # fmt: skip


def validate_like_timm(source: ImageSource, spec: ImageSpec, model: nn.Module) -> None:
    """timm's loader with its defaults, and metrics read at every batch."""
    from timm.data.loader import create_loader
    from timm.utils.metrics import AverageMeter, accuracy

    class Images(torch.utils.data.Dataset[Any]):
        transform: Callable[[Any], Any]

        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(source.decode(index)), int(source.labels[index])

    loader = create_loader(
        Images(),
        spec.input_size,
        256,
        use_prefetcher=False,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        num_workers=4,  # validate.py's default
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        device=torch.device("cpu"),
    )
    criterion, losses, top1, top5 = nn.CrossEntropyLoss(), AverageMeter(), AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, targets in loader:
            logits = model(images)
            accuracies = accuracy(logits, targets, topk=(1, 5))
            for meter, value in zip((losses, top1, top5), (criterion(logits, targets), *accuracies), strict=True):
                meter.update(value.item(), len(images))


def importing(bench: Bench) -> Iterator[Row]:
    """What `import tffd_zoo` takes once timm is there."""
    code = "import time, timm; t = time.perf_counter(); import tffd_zoo; print(1000 * (time.perf_counter() - t))"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(bench.rounds(5) + 1)]
    values = [float(run.stdout) for run in runs[1:]]  # the first may have to read the files
    yield summary("importing", "import tffd_zoo after import timm", values, unit="ms", bound="<=", target=150)


def small_maps(bench: Bench) -> Iterator[Row]:
    """Plain eager steps of networks with small maps, their convolutions sped up / as they are."""
    for model, size in (("tffd_resnet18", 32), ("tffd_resnet18", 64), ("tffd_vgg8", 32)):
        for name, change in (("float32", {}), ("bf16", BF16)):
            recipe = vary(twins(model, size, 128)["plain"], "plain", **change)
            pair = {"sped up": TrainingStep(recipe, bench), "as it is": TrainingStep(recipe, bench, small_maps=False)}
            times = interleave(pair, bench.rounds(12), warmup=2)
            what = f"{model.removeprefix('tffd_')} at {size} px, batch 128, {name}"
            yield compare("small_maps", what, times["sped up"], times["as it is"])


def pages(bench: Bench) -> Iterator[Row]:
    """Steps in bf16 of a process whose tensors lie in huge pages, over one's in usual pages: a process a figure."""
    for model, batch in (("tffd_resnet20", 128), ("tffd_vgg8", 128)):
        for name in ("plain", "tffd"):
            code = "import sys; from recipes.studies.prices import print_seconds; print_seconds(*sys.argv[1:])"
            command = [sys.executable, "-c", code, bench.data, model, str(batch), name]
            times: dict[str, list[float]] = {"1": [], "0": []}
            for _ in range(bench.rounds(5)):
                for huge, seconds in times.items():
                    environment = os.environ | {HUGE_PAGES: huge}
                    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                    seconds.append(float(run.stdout))
            what = f"{model.removeprefix('tffd_')} at 32 px, batch {batch}, bf16, {name}: huge pages / usual ones"
            yield compare("pages", what, times["1"], times["0"])


def print_seconds(data: str, model: str, batch: str, name: str) -> None:
    """Print what a step of one of the `twins` takes in this process, the median of ten."""
    recipe = _in_bf16(twins(model, 32, int(batch)))[name]
    with open_bench(data) as bench:
        step = TrainingStep(recipe, bench, compiled="losses" if name == "tffd" else False)
        print(statistics.median(interleave({name: step}, 10, warmup=3)[name]))


def growth(bench: Bench) -> Iterator[Row]:
    """How the price of Tf-FD grows, in eager mode: the cases differ from the first in one thing each."""
    cases: dict[str, dict[str, Any]] = {
        "ResNet-20, batch 128, 32 px, 3 stages": {},
        "batch 32": {"optim": {"batch_size": 32}},
        "batch 256": {"optim": {"batch_size": 256}},
        "64 px, batch 32": {"data": {"image_size": 64}, "optim": {"batch_size": 32}},
        "4 times the channels (ResNet-20's blocks as in ResNet-32x4), batch 32": {
            "model": "tffd_resnet32x4", "optim": {"batch_size": 32},
        },
        "the first 2 stages": {"tffd": {"stages": (1, 2)}},
        "the middle stage, intra-layer alone": {"tffd": {"stages": (2,), "lambda_inter": 0.0}},
    }  # fmt: skip
    for what, changes in cases.items():
        without = {section: values for section, values in changes.items() if section != "tffd"}
        recipes = {"tffd": vary(TFFD, "growth", **changes), "plain": vary(PLAIN, "growth", **without)}
        timed = {name: TrainingStep(recipe, bench) for name, recipe in recipes.items()}
        times = interleave(timed, bench.rounds(6), warmup=1)
        yield compare("growth", what, times["tffd"], times["plain"])
    every = 100
    steps = {"plain": PLAIN, "usual": TFFD, "measured": vary(TFFD, "measured", run={"measure_every": 1})}
    times = interleave({name: TrainingStep(recipe, bench) for name, recipe in steps.items()}, bench.rounds(6), warmup=1)
    on_average = spread(times["measured"], times["usual"], every)
    yield compare("growth", f"shares measured every {every} batches", on_average, times["plain"])


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    part.__name__: part
    for part in (
        steps,
        remains,
        precision,
        memory,
        methods,
        arithmetic,
        salience,
        feeding,
        streaming,
        evaluation,
        importing,
        layouts,
        small_maps,
        pages,
        growth,
    )
}
