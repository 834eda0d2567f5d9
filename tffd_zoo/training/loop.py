"""The one training loop, under every recipe: from a resolved `Recipe` to a run folder with an export.

In order: processes, data and precision, model and task, optimisation, what is on disk, resume, epochs, export.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, parse_flag_from_env, set_seed
from timm.data import Mixup
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

from ..allocator import tune_memory
from ..data import Batch, Loader
from ..evaluation import FIGURES, EvalResult, NonFiniteLogits, evaluate
from ..export import export_run
from ..processes import main_process_first, of_a_lost_process
from ..recipe import OptimConfig, Recipe
from ..small_maps import speed_up_small_maps
from ..tasks import DistillationTask
from ..threads import idle_cores, use_threads
from .build import (
    check_batch_of_one,
    check_image_size,
    check_network,
    check_trackers,
    compile_step,
    freeze_layers,
    image_spec,
    keep_frozen,
    make_loaders,
    make_mixup,
    make_network,
    make_optimizer,
    make_task,
    memory_format,
    open_sources,
)
from .curves import draw_curves
from .precision import settle_precision, training_seconds
from .progress import NonFiniteLoss, Progress, StopSignal, TermSums
from .run_folder import RunFolder, data_record

_logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> Path:
    """Run `recipe`, or what is left of it, and return the folder of its export.

    The same call resumes a run that was stopped, killed or cut off: it ends with the weights, to the bit, of a run that
    never was (same machine, same number of processes and threads). SIGTERM and Ctrl-C write a checkpoint and leave.

    Raises:
        ValueError: settings or data that cannot work, in one line that names the mend.
        NonFiniteLoss: a loss became NaN or infinite; the checkpoints are from before that.
    """
    # --- processes, data and precision --------------------------------------------------------------------------------
    tune_memory()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    threads = use_threads(recipe.run.threads, state.num_processes)
    check_network(recipe)
    with main_process_first(state):
        check_image_size(recipe)
    train_source, eval_source = open_sources(recipe.data)
    recipe, precision = settle_precision(recipe, len(train_source), state)
    optim, run = recipe.optim, recipe.run
    accelerator = Accelerator(
        mixed_precision=run.precision,
        log_with=list(run.trackers) or None,
        project_dir=str(recipe.folder),
        # The task's buffers are equal on every process by construction; BatchNorm statistics are each process's own.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_trackers(run.trackers, accelerator)
    set_seed(run.seed)

    # --- batches, model and task --------------------------------------------------------------------------------------
    with main_process_first(accelerator):
        model = make_network(recipe, train_source.label_names)
    freeze_layers(model, optim.freeze)
    speed_up_small_maps(model)
    layout = memory_format(recipe, accelerator)
    spec = image_spec(recipe, model)
    pace = cache(partial(training_seconds, recipe, accelerator))
    train_batches, eval_batches = make_loaders(recipe, spec, train_source, eval_source, layout, accelerator, pace)
    check_batch_of_one(recipe, model, spec, train_batches)
    mixup = make_mixup(recipe, train_source, accelerator.num_processes)
    task = make_task(recipe, model, spec, train_source, len(train_batches)).to(memory_format=layout)
    if run.sync_bn and accelerator.num_processes > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(task)
    compile_step(task, run.compile)
    ema = ModelEmaV3(model, decay=optim.ema_decay).to(accelerator.device) if optim.ema_decay else None

    # --- optimisation -------------------------------------------------------------------------------------------------
    steps_per_epoch = math.ceil(len(train_batches) / optim.accumulate)
    total_steps = min(steps_per_epoch * optim.epochs, run.max_steps or steps_per_epoch * optim.epochs)
    optimizer = make_optimizer(optim, task, accelerator)
    linear = optim.sched == "linear"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="poly" if linear else optim.sched,
        num_epochs=optim.epochs,
        decay_milestones=[fraction * optim.epochs for fraction in optim.milestones],
        decay_rate=1.0 if linear else optim.decay_rate,  # of 'poly' this is the power
        warmup_epochs=optim.lr_warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    whole = _unsharded(model, ema, accelerator)
    prepared, optimizer = accelerator.prepare(task, optimizer)

    # --- what is on disk, and resume ----------------------------------------------------------------------------------
    folder = RunFolder(recipe, data_record(train_source, eval_source, spec), accelerator)
    progress, sums = Progress(steps_per_epoch), TermSums(accelerator)
    accelerator.register_for_checkpointing(progress, sums, *([ema] if ema is not None else []))
    if run.trackers:
        accelerator.init_trackers("tffd_zoo", config=_flat(recipe.to_dict()))
    set_seed(run.seed + 1 + accelerator.process_index)  # dropout differs by process; the weights were drawn alike
    checkpoint = folder.resume()
    folder.forget_after(progress.step if checkpoint else -1)
    if task.undecided:
        prepared.train()
        keep_frozen(model)
        lambdas = _choose_lambdas(task, train_batches, mixup, optim.accumulate, accelerator)
        folder.append({"kind": "lambdas", "step": 0, "epoch": 0.0, **lambdas})
        accelerator.print("by gradient share: " + ", ".join(f"lambda_{k} {v:.4g}" for k, v in lambdas.items()))
    scheduler.step_update(progress.step)
    _tell_of_busy_cores(threads, accelerator)
    accelerator.print(
        f"{recipe.model}, {recipe.name}: {train_batches.describe()}\n"
        f"evaluated on {eval_source.describe()}\n"
        f"{optim.epochs} epochs of {steps_per_epoch} steps on {accelerator.num_processes} process(es) of {threads} "
        f"thread(s), {precision}, global batch "
        f"{optim.batch_size * accelerator.num_processes * optim.accumulate}\n"
        f"{'resuming at step ' + str(progress.step) + ' in' if checkpoint else 'writing to'} {folder.path}"
    )

    # --- epochs -------------------------------------------------------------------------------------------------------
    bar = tqdm(total=total_steps, initial=progress.step, unit="step", disable=not accelerator.is_main_process)
    with bar, _told_of_lost_processes(folder), StopSignal(accelerator) as stop:
        while progress.step < total_steps:
            prepared.train()
            keep_frozen(model)
            timer = _Timer()
            for group in _steps(train_batches, progress, optim):
                # one step
                for batch, weight, last in group:
                    images = batch.images.to(accelerator.device, non_blocking=True)
                    targets = batch.targets.to(accelerator.device, non_blocking=True)
                    timer.images += len(images) * accelerator.num_processes
                    if mixup is not None:
                        images, targets = mixup(images, targets)
                    with nullcontext() if last else accelerator.no_sync(prepared):
                        terms = prepared(images, targets, batch.positions)
                        accelerator.backward(terms["loss"] * weight)
                    sums.add(terms, len(images), progress.step + 1)
                if optim.clip_grad:
                    accelerator.clip_grad_norm_(prepared.parameters(), optim.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                progress.step += 1
                scheduler.step_update(progress.step)
                if ema is not None:
                    ema.update(model, step=progress.step)
                bar.update()

                # now and then
                if progress.step % run.log_every == 0:
                    losses = sums.report()
                    lr = optimizer.param_groups[0]["lr"]
                    folder.append({
                        "kind": "train", "step": progress.step, "epoch": progress.fraction, "lr": lr, **losses,
                        "images_per_second": timer.rate(),
                    })  # fmt: skip
                    accelerator.log({f"train/{name}": value for name, value in losses.items()}, step=progress.step)
                    bar.set_postfix(epoch=f"{progress.fraction:.2f}", loss=f"{losses['loss']:.3f}", refresh=False)
                if stop.requested(progress.step) or progress.step == total_steps:
                    break
                if progress.step % run.checkpoint_every == 0 and progress.step_in_epoch:
                    sums.report()  # nothing is kept of a run whose losses are not finite
                    folder.save_checkpoint(progress.step)
            if progress.step < total_steps and progress.step_in_epoch:  # stopped inside an epoch
                sums.report()
                _leave(stop, folder, progress)

            # the end of an epoch
            losses = sums.report()
            sums.reset()
            if progress.step == total_steps or progress.epoch % run.eval_every == 0:
                line: dict[str, Any] = {
                    "kind": "eval", "step": progress.step, "epoch": progress.fraction, "train": losses
                }  # fmt: skip
                _gather(model, whole)
                for prefix, weights in {"": whole, **({"ema_": ema.module} if ema is not None else {})}.items():
                    with _told_of_diverged_weights(prefix, progress):
                        result = _evaluate(weights, eval_batches, accelerator, layout)
                    line |= {f"{prefix}{name}": value for name, value in result.to_json().items()}
                    folder.save_weights(weights, "last", progress.step, ema=bool(prefix))
                    if result.top1 > progress.best.get(prefix, -1.0):
                        progress.best[prefix] = result.top1
                        folder.save_weights(weights, "best", progress.step, ema=bool(prefix))
                folder.append({**line, "hours": progress.hours})
                accelerator.log({f"eval/{name}": line[name] for name in FIGURES}, step=progress.step)
                if accelerator.is_main_process:
                    shown = ", ".join(f"{figure.title} {figure.shown(line[name])}" for name, figure in FIGURES.items())
                    bar.write(
                        f"epoch {progress.fraction:g}: train loss {losses['loss']:.3f}, {shown}; "
                        f"best top-1 {progress.best['']:.2f}"
                    )
            folder.save_checkpoint(progress.step)
            if stop.agreed and progress.step < total_steps:
                _leave(stop, folder, progress)

    # --- export -------------------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        draw_curves(folder.path)
        export_run(folder.path, weights=run.weights)
        accelerator.print(f"exported to {folder.path / 'export'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder.path / "export"


# --- small parts of the loop ------------------------------------------------------------------------------------------


class _Timer:
    """Images per second since the last reading."""

    def __init__(self) -> None:
        self.images, self.started = 0, time.perf_counter()

    def rate(self) -> float:
        now = time.perf_counter()
        rate = self.images / (now - self.started)
        self.images, self.started = 0, now
        return round(rate, 1)


def _tell_of_busy_cores(threads: int, accelerator: Accelerator) -> None:
    """Warn where somebody else computes on the cores: parallel loops then wait for whole time slices of the others."""
    if accelerator.device.type != "cpu" or accelerator.num_processes > 1 or threads == 1:
        return
    if (idle := idle_cores()) < threads - 0.5:
        accelerator.print(
            f"warning: {threads} threads, and {idle:.1f} of the cores are idle: whatever else computes here and this "
            "run slow each other many times over; give runs side by side --threads of their own"
        )


def _choose_lambdas(
    task: DistillationTask, batches: Loader, mixup: Mixup | None, accumulate: int, accelerator: Accelerator
) -> dict[str, float]:
    """The weights that gradient shares ask for, by the first steps of the run, which are then taken as if for the first
    time.

    Raises:
        ValueError: under FSDP, or for a loss without gradient.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "gradient shares are measured on whole weights, and FSDP shards them; give the lambdas themselves (a short "
            "run without FSDP prints them)"
        )

    def first_batches() -> Generator[tuple[torch.Tensor, ...], None, None]:
        for batch in batches.epoch(0):
            images, targets = batch.images.to(accelerator.device), batch.targets.to(accelerator.device)
            yield (*(mixup(images, targets) if mixup is not None else (images, targets)), batch.positions)

    drawn = np.random.get_state()  # mixup draws from it
    with accelerator.autocast(), closing(first_batches()) as steps:
        chosen = task.choose_lambdas(steps, accumulate=accumulate)
    np.random.set_state(drawn)
    return chosen


def _steps(batches: Loader, progress: Progress, optim: OptimConfig) -> Iterator[list[tuple[Batch, float, bool]]]:
    """The batches of each remaining step of the epoch, each with its weight in the step's mean loss."""
    start = progress.step_in_epoch * optim.accumulate
    group: list[Batch] = []
    for position, batch in enumerate(batches.epoch(progress.epoch, start_batch=start), start=start + 1):
        group.append(batch)
        if len(group) == optim.accumulate or position == len(batches):
            # Weighted by images: over the processes by batch.weight, over the group by the batches' sizes.
            images = sum(len(b.targets) / b.weight for b in group)
            yield [(b, len(b.targets) / images, i == len(group) - 1) for i, b in enumerate(group)]
            group = []


def _unsharded(model: nn.Module, ema: ModelEmaV3 | None, accelerator: Accelerator) -> nn.Module:
    """What is evaluated and saved: `model` itself, or a copy of it where FSDP will leave each process a shard.

    Raises:
        ValueError: shards have no moving average.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return model
    if ema is not None:
        raise ValueError("no moving average is kept of shards; leave --ema-decay out, or launch without FSDP")
    return copy.deepcopy(model).to(accelerator.device)


def _gather(model: nn.Module, whole: nn.Module) -> None:
    """Bring the weights of `model` into `whole`; on every process."""
    if whole is not model:
        whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


@contextmanager
def _told_of_diverged_weights(prefix: str, progress: Progress) -> Iterator[None]:
    try:
        yield
    except NonFiniteLogits as error:
        raise NonFiniteLoss(
            f"loss '{prefix}nll' of the evaluation was not finite after step {progress.step}; the checkpoints are from "
            "before that: lower --lr, and pass --output with a new folder"
        ) from error


def _evaluate(model: nn.Module, batches: Loader, accelerator: Accelerator, layout: torch.memory_format) -> EvalResult:
    return evaluate(
        model,
        batches,
        device=accelerator.device,
        distributed=accelerator.num_processes > 1,
        memory_format=layout,
        amp_dtype={"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision),
    )


@contextmanager
def _told_of_lost_processes(folder: RunFolder) -> Iterator[None]:
    """Turn what gloo or NCCL say when another process is gone into one line.

    Raises:
        ConnectionError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not of_a_lost_process(error):
            raise
        reason = str(error).splitlines()[0].partition("] ")[2].partition(". ")[0]  # without the place in its source
        raise ConnectionError(
            f"another process of this run is gone ({reason}); give the same command on every machine again: it resumes "
            f"from the newest checkpoint in {folder.path}"
        ) from error


def _leave(stop: StopSignal, folder: RunFolder, progress: Progress) -> None:
    """Write a checkpoint and exit the way the signal would have."""
    folder.save_checkpoint(progress.step)
    stop.accelerator.print(f"\nstopped at step {progress.step} with a checkpoint; the same command resumes")
    raise SystemExit(128 + stop.agreed)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of plain values, as trackers want them."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, dict):
            flat |= _flat(entry, f"{prefix}{key}/")
        else:
            flat[prefix + key] = entry if isinstance(entry, int | float | str | bool) else str(entry)
    return flat
