"""The training loop: exact resume, signals, processes, bad input, and what a run leaves on disk."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from processes import elsewhere, on_two_processes
from safetensors.torch import load_file
from test_atomic import disk_that_takes
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tffd_zoo.cli import guard
from tffd_zoo.data import open_source
from tffd_zoo.recipe import DataConfig, OptimConfig, Recipe, RunConfig, differences, recipe_from_cli, vary
from tffd_zoo.run_record import read_metrics
from tffd_zoo.tasks import CANONICAL
from tffd_zoo.threads import threads_kept
from tffd_zoo.training import NonFiniteLoss, RunFolder, train
from tffd_zoo.training.build import make_optimizer
from tffd_zoo.training.progress import TermSums

ROOT = Path(__file__).parents[1]

# Handwritten digits at 8 px: an epoch of 12 steps takes a second or two.
BASE = Recipe(
    name="test",
    model="tffd_resnet20",
    data=DataConfig(source="digits", image_size=8),
    optim=OptimConfig(epochs=2, batch_size=128, lr=0.05, weight_decay=5e-4),
    tffd=CANONICAL,
    run=RunConfig(log_every=1, checkpoint_every=5),
)


def recipe(output: Path, **changes: Any) -> Recipe:
    run = {"output": output, **changes.pop("run", {})}
    return vary(BASE, "test", run=run, **changes)


def last_weights(run: Path, kind: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / f"{kind}.safetensors")


def assert_same_weights(one: Path, other: Path, kind: str = "last") -> None:
    mine, theirs = last_weights(one, kind), last_weights(other, kind)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("images_per_second", "seconds", "hours")
    return [{k: v for k, v in record.items() if not k.endswith(timed)} for record in records]


# --- the hot path -----------------------------------------------------------------------------------------------------


class _Readings(TorchDispatchMode):
    """Counts how often Python asks for the value of a tensor: on a GPU each time waits for all that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_more_steps_between_two_log_lines_wait_for_no_more_values(tmp_path: Path) -> None:
    open_source("digits", "train")  # what is read once a process, is read
    counts = []
    for steps in (2, 10):
        with _Readings() as readings:
            train(recipe(tmp_path / str(steps), run={"log_every": 100, "checkpoint_every": 100, "max_steps": steps}))
        counts.append(readings.count)
    assert counts[0] == counts[1] > 0


# --- stop and resume --------------------------------------------------------------------------------------------------

# Everything that has state: EMA, averaged salience ranked now and then, a chosen lambda, mixup's random numbers.
STATEFUL: dict[str, Any] = {
    "optim": {"ema_decay": 0.9, "mixup": 0.2},
    "data": {"drop_last": True},
    "tffd": replace(CANONICAL, salience_momentum=0.9, rank_every=3, share_intra=0.05),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(recipe(folder, **STATEFUL))
    return folder


def assert_same_run(run: Path, uninterrupted: Path) -> None:
    for kind in ("last", "best", "last_ema", "best_ema"):
        assert_same_weights(run, uninterrupted, kind)
    records = [without_times(read_metrics(folder / "metrics.jsonl")) for folder in (run, uninterrupted)]
    assert records[0] == records[1]


def train_all(*recipes: Recipe) -> None:
    for one in recipes:
        train(one)


def test_a_finished_run_exports_its_moving_average_when_it_is_told_to(uninterrupted: Path, tmp_path: Path) -> None:
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    exported = train(recipe(run, **STATEFUL, run={"weights": "last_ema"}))
    average, last = last_weights(run, "last_ema"), last_weights(run)
    found = load_file(exported / "model.safetensors")
    assert all(torch.equal(found[name], average[name]) for name in average)
    assert not torch.equal(found["head.fc.weight"], last["head.fc.weight"])
    assert json.loads((exported / "metrics.json").read_text())["weights"] == "last_ema"
    assert_same_run(run, uninterrupted)


def test_a_run_killed_in_mid_epoch_and_resumed_ends_with_the_bits_of_one_that_never_was(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = elsewhere(train, recipe(run, **STATEFUL))
    deadline = time.monotonic() + 240
    while len(read_metrics(run / "metrics.jsonl")) < 9 and time.monotonic() < deadline:  # lambdas and 8 steps
        time.sleep(0.02)
    process.kill()
    process.join()
    killed_at = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert 8 <= killed_at < 22, "killed too late to show anything"
    assert not (run / "weights" / "last_ema.safetensors").exists() or killed_at > 11

    train(recipe(run, **STATEFUL))
    assert_same_run(run, uninterrupted)


def test_a_run_in_bf16_stops_and_resumes_to_the_bit(tmp_path: Path) -> None:
    # In a process of its own, for accelerate takes one precision a process.
    changes: dict[str, Any] = {**STATEFUL, "optim": {"ema_decay": 0.9, "mixup": 0.2, "epochs": 1, "batch_size": 256}}
    runs = (("whole", None), ("stopped", 2), ("stopped", None))
    recipes = [recipe(tmp_path / n, **changes, run={"precision": "bf16", "max_steps": steps}) for n, steps in runs]
    process = elsewhere(train_all, *recipes)
    process.join()
    assert process.exitcode == 0
    for kind in ("last", "last_ema"):
        assert_same_weights(tmp_path / "stopped", tmp_path / "whole", kind)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_leaves_and_the_same_call_goes_on(
    number: int, code: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    append = RunFolder.append

    def append_and_signal(self: RunFolder, record: dict[str, Any]) -> None:
        append(self, record)
        if record["step"] == 7:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", append_and_signal)
        with pytest.raises(SystemExit) as stopped:
            train(recipe(tmp_path, **STATEFUL))
    assert stopped.value.code == code
    assert "stopped at step 7 with a checkpoint; the same command resumes" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "step-00000007").is_dir()
    train(recipe(tmp_path, **STATEFUL))
    assert_same_run(tmp_path, uninterrupted)


def test_a_full_disk_at_a_checkpoint_loses_nothing(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    save_state = Accelerator.save_state

    def fill_the_disk(self: Accelerator, folder: str, **kwargs: Any) -> None:
        save_state(self, folder, **kwargs)
        if "step-00000010" in folder:
            (Path(folder) / "optimizer.bin").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", folder)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", fill_the_disk)
        with pytest.raises(OSError, match="No space left on device"):
            train(recipe(tmp_path, **STATEFUL))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    train(recipe(tmp_path, **STATEFUL))
    assert_same_run(tmp_path, uninterrupted)


def test_a_disk_that_takes_no_whole_checkpoint_is_told_in_one_line(tmp_path: Path) -> None:
    # half a file of weights, where safetensors and torch give errors of their own kinds
    for limit, file in ((500_000, "safetensors"), (1_150_000, "optimizer")):
        run = tmp_path / file
        with (
            disk_that_takes(limit),
            pytest.raises(
                OSError, match=r"step-00000005 cannot be written .* is the disk full\? Free some space: the same"
            ),
        ):
            train(recipe(run, optim={"opt": "adam"}))
        assert not any((run / "checkpoints").iterdir())


def test_a_process_that_is_lost_while_a_checkpoint_is_written_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    def lose(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            "[/build/gloo/transport/tcp/pair.cc:545] Connection closed by peer [10.0.0.2]:9. Typically so"
        )

    monkeypatch.setattr(Accelerator, "save_state", lose)
    said = r"process of this run is gone \(Connection closed by peer \[10\.0\.0\.2\]:9\); .* newest checkpoint in "
    with pytest.raises(ConnectionError, match=said):
        train(recipe(tmp_path, tffd=None))
    assert not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("limit", [1_000])
def test_a_full_disk_is_an_error_with_a_mend(limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disk_that_takes(limit), pytest.raises(SystemExit) as left:
        guard(lambda: (tmp_path / "file").write_bytes(bytes(2 * limit)))
    assert left.value.code == 2
    assert "File too large; free some space and run the same command again" in capsys.readouterr().err


def test_a_finished_run_is_not_trained_again(uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    train(recipe(uninterrupted, **STATEFUL))
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_old_checkpoints_make_way(uninterrupted: Path) -> None:
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == ["step-00000020", "step-00000022"]


def test_a_checkpoint_of_another_recipe_or_number_of_processes_is_named(tmp_path: Path) -> None:
    train(recipe(tmp_path, run={"max_steps": 1}))
    about = tmp_path / "checkpoints" / "step-00000001" / "checkpoint.json"
    record = json.loads(about.read_text())
    assert record["step"] == 1
    del record["sha256_of_the_rest"]  # written before there was one
    about.write_text(json.dumps({**record, "processes": 2}))
    with pytest.raises(ValueError, match=r"of a run on 2 process\(es\), and this one has 1; start 2, or pass --output"):
        train(recipe(tmp_path))
    about.write_text(json.dumps({**record, "recipe": {**record["recipe"], "model": "tffd_resnet32"}}))
    with pytest.raises(ValueError, match=r"another recipe \(model: tffd_resnet32 there, tffd_resnet20 here\); delete"):
        train(recipe(tmp_path))


def test_a_batch_of_one_image_is_refused_before_it_comes_up_where_it_cannot_be_normalised(tmp_path: Path) -> None:
    # 1,437 training images: the last batch of 4 is one image. At 32 px the deepest maps of ResNet-18 are one pixel.
    changes: dict[str, Any] = {"model": "resnet18", "data": {"image_size": 32}, "run": {"max_steps": 1}}
    with pytest.raises(ValueError, match=r"cannot train on a batch of one image .*; use --drop-last or another --b"):
        train(recipe(tmp_path / "last", optim={"batch_size": 4}, **changes))
    with pytest.raises(ValueError, match=r"cannot train on a batch of one image .*; use another --batch-size"):
        train(recipe(tmp_path / "all", optim={"batch_size": 1}, **changes))
    assert not any(tmp_path.iterdir())
    train(recipe(tmp_path / "fine", optim={"batch_size": 1}, run={"max_steps": 2}))


def test_a_run_of_another_recipe_is_not_resumed(tmp_path: Path) -> None:
    train(recipe(tmp_path, run={"max_steps": 1}))
    with pytest.raises(ValueError, match=r"another recipe \(optim\.lr: 0\.05 there, 0\.1 here\); pass --output"):
        train(recipe(tmp_path, optim={"lr": 0.1}))


# --- what is computed -------------------------------------------------------------------------------------------------


def test_accumulated_batches_give_the_step_of_the_larger_batch(tmp_path: Path) -> None:
    # A network without batch statistics; the last group of an epoch is smaller and must count by its images.
    common: dict[str, Any] = {"model": "test_convnext", "data": {"image_size": 32}}
    for name, batch, accumulate in (("whole", 512, 1), ("parts", 256, 2)):
        optim = {"batch_size": batch, "accumulate": accumulate, "epochs": 1, "lr": 0.01}
        train(recipe(tmp_path / name, optim=optim, tffd=None, run={"max_steps": 3}, **common))
    whole, parts = last_weights(tmp_path / "whole"), last_weights(tmp_path / "parts")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("opt", ["momentum", "sgd", "adamw", "lookahead_sgd"])
def test_an_update_in_one_pass_is_that_of_many_whatever_the_layout_of_the_weights(opt: str) -> None:
    torch.manual_seed(0)
    optim = replace(BASE.optim, opt=opt, lr=0.01)
    task = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5)).double()
    task = task.to(memory_format=torch.channels_last)
    other = copy.deepcopy(task)
    fused = make_optimizer(optim, task, PartialState())
    usual = create_optimizer_v2(other, opt, optim.lr, optim.weight_decay, optim.momentum, filter_bias_and_bn=False)
    for _ in range(7):  # lookahead moves its slow weights in the sixth
        images, targets = torch.randn(4, 3, 4, 4).double(), torch.randint(5, (4,))
        for network, optimizer in ((task, fused), (other, usual)):
            optimizer.zero_grad()
            cross_entropy(network(images), targets).backward()
            optimizer.step()
    assert all(group["fused"] for group in fused.param_groups)
    for mine, theirs in zip(task.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_shards_and_optimizers_that_torch_cannot_update_in_one_pass_are_updated_in_many() -> None:
    task = nn.Linear(2, 2)
    sharded: Any = SimpleNamespace(distributed_type=DistributedType.FSDP)
    assert not make_optimizer(BASE.optim, task, sharded).param_groups[0]["fused"]
    assert "fused" not in make_optimizer(replace(BASE.optim, opt="lamb"), task, PartialState()).param_groups[0]


def test_two_processes_take_the_steps_of_one_with_tffd_on(tmp_path: Path) -> None:
    on_two_processes(train, two_process_recipe(tmp_path / "two", 2))
    train(two_process_recipe(tmp_path / "one", 1))
    one, two = last_weights(tmp_path / "one"), last_weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-6)
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl") if r["kind"] == "train"]
        for n in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    counts = [read_metrics(tmp_path / n / "metrics.jsonl")[-1] for n in ("one", "two")]
    assert counts[0]["images"] == counts[1]["images"] == 360
    environment = (tmp_path / "two" / "environment.json").read_text()
    assert '"processes": 2' in environment


def _refuse_on_one_of_two(impossible: Recipe) -> None:
    with pytest.raises(ValueError, match="test_vit cannot take images of 8 px"):
        train(impossible)


def test_what_the_main_process_refuses_every_process_refuses(tmp_path: Path) -> None:
    on_two_processes(_refuse_on_one_of_two, recipe(tmp_path, model="test_vit"))


class _OneOfTwo:
    """A process of two, and what the other one sends."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, process_index: int, theirs: list[float]) -> None:
        self.process_index = process_index
        self.theirs = torch.tensor([[theirs]], dtype=torch.float64)

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        return torch.cat([mine, self.theirs] if self.process_index == 0 else [self.theirs, mine])


def test_each_process_resumes_with_the_loss_sums_of_its_own() -> None:
    sums = TermSums(_OneOfTwo(0, theirs=[10.0, 2.0, -1.0]))
    sums.add({"ce": torch.tensor(2.0), "output": torch.zeros(3, 10)}, images=3, step=1)
    assert sums.report() == {"ce": (2.0 * 3 + 10.0) / (3 + 2)}
    resumed = TermSums(_OneOfTwo(1, theirs=[6.0, 3.0, -1.0]))
    resumed.load_state_dict(sums.state_dict())  # written by the first process alone
    resumed.add({"ce": torch.tensor(4.0)}, images=5, step=2)
    assert resumed.report() == {"ce": (10.0 + 4.0 * 5 + 6.0) / (2 + 5 + 3)}


def test_fsdp_takes_the_steps_of_ddp_and_resumes(tmp_path: Path) -> None:
    on_two_processes(train, sharded_recipe(tmp_path / "ddp", 6))
    for steps in (4, 6):
        on_two_processes(train_sharded, sharded_recipe(tmp_path / "fsdp", steps))
    assert (tmp_path / "fsdp" / "checkpoints" / "step-00000004" / "pytorch_model_fsdp.bin").exists()
    assert_same_weights(tmp_path / "ddp", tmp_path / "fsdp")


def sharded_recipe(output: Path, steps: int) -> Recipe:
    run = {"max_steps": steps, "channels_last": False, "checkpoint_every": 4, "measure_every": 2}
    return recipe(output, optim={"batch_size": 64}, tffd=CANONICAL, run=run)


def train_sharded(recipe: Recipe) -> None:
    """Let accelerate, which shards on GPUs alone, do what recipes/accelerate/fsdp.yaml asks for on CPUs."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    begin = AcceleratorState.__init__

    def begin_sharded(state: Any, *args: Any, **kwargs: Any) -> None:
        begin(state, *args, **kwargs)
        state.distributed_type = DistributedType.FSDP
        if getattr(state, "fsdp_plugin", None) is None:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="no_wrap",
                state_dict_type="FULL_STATE_DICT",
                cpu_ram_efficient_loading=False,
            )

    AcceleratorState.__init__ = begin_sharded
    train(recipe)


def two_process_recipe(output: Path, processes: int) -> Recipe:
    """The same global batch on any number of processes, on a network without batch statistics."""
    return recipe(
        output,
        model="test_convnext",
        data={"image_size": 32},
        optim={"batch_size": 480 // processes, "epochs": 1, "lr": 0.01},  # 1,437 images: the last batch is uneven
        tffd=replace(CANONICAL, warmup_fraction=0.0, share_intra=0.05),
        run={"measure_every": 2},
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_term(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteLoss, match=r"loss .*'ce'.* was not finite at step \d+; the checkpoints are from before"
    ):
        train(recipe(tmp_path, optim={"lr": 1e12}, run={"log_every": 4, "checkpoint_every": 3}))
    assert not list((tmp_path / "checkpoints").glob("step-*")) or all(
        torch.isfinite(tensor).all()
        for path in (tmp_path / "checkpoints").glob("step-*/model.safetensors")
        for tensor in load_file(path).values()
    )


def test_weights_that_diverge_in_the_last_step_of_an_epoch_are_told_with_the_step(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"loss 'nll' of the evaluation was not finite after step [12]; the check"):
        train(recipe(tmp_path, optim={"batch_size": 1437, "lr": 1e19, "epochs": 4}))
    assert all(torch.isfinite(value).all() for f in tmp_path.glob("weights/*") for value in load_file(f).values())


def test_evaluation_every_third_epoch_and_after_the_last_changes_nothing_else(tmp_path: Path) -> None:
    kept = {"checkpoint_every": 100, "keep_checkpoints": 4}
    for every in (1, 3):
        train(recipe(tmp_path / str(every), optim={"epochs": 4, "ema_decay": 0.9}, run={"eval_every": every, **kept}))
    often, seldom = (without_times(read_metrics(tmp_path / str(every) / "metrics.jsonl")) for every in (1, 3))
    assert [line["epoch"] for line in often if line["kind"] == "eval"] == [1, 2, 3, 4]
    assert seldom == [line for line in often if line["kind"] != "eval" or line["epoch"] in (3, 4)]
    assert_same_weights(tmp_path / "1", tmp_path / "3")
    assert_same_weights(tmp_path / "1", tmp_path / "3", "last_ema")
    assert {path.name[-2:] for path in (tmp_path / "3" / "checkpoints").iterdir()} == {"12", "24", "36", "48"}


@pytest.mark.parametrize(("idle", "told"), [(0.6, True), (1.9, False)])
def test_a_run_whose_cores_are_busy_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], idle: float, told: bool
) -> None:
    monkeypatch.setattr("tffd_zoo.training.loop.idle_cores", lambda: idle)
    with threads_kept():
        train(recipe(tmp_path, run={"threads": 2, "max_steps": 1}))
    assert (f"2 threads, and {idle} of the cores are idle" in capsys.readouterr().out) == told


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(ValueError, match="tracker wandb is not installed; install it, or leave --trackers out"):
        train(recipe(tmp_path, run={"trackers": ("wandb",)}))
    assert not any(tmp_path.iterdir())


def test_the_export_of_a_run_loads_with_timm_and_gives_its_recorded_figures(uninterrupted: Path) -> None:
    model = timm.create_model(f"local-dir:{uninterrupted / 'export'}", pretrained=True)
    weights = last_weights(uninterrupted)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    for name in ("recipe.json", "environment.json", "data.json", "curves.png"):
        assert (uninterrupted / name).stat().st_size > 0


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_command_line_starts_from_a_named_preset() -> None:
    presets = {"one": BASE, "two": vary(BASE, "two", optim={"lr": 1.0}, tffd=None)}
    assert recipe_from_cli(presets, "", []) == BASE
    chosen = recipe_from_cli(presets, "", ["two", "--data", "folder", "--epochs", "7"])
    assert (chosen.optim.lr, chosen.data.source, chosen.optim.epochs) == (1.0, "folder", 7)
    changed = recipe_from_cli(presets, "", ["--tffd.lambda-intra", "0.5"])
    assert changed.tffd is not None
    assert changed.tffd.lambda_intra == 0.5
    with pytest.raises(ValueError, match="unknown preset 'three'; choose one of one, two"):
        recipe_from_cli(presets, "", ["three"])


def test_only_settings_that_change_the_result_make_another_run() -> None:
    mine = BASE.to_dict()
    assert differences(vary(BASE, "test", run={"log_every": 9}, data={"workers": 0}).to_dict(), mine) == []
    assert differences(vary(BASE, "test", run={"seed": 9}).to_dict(), mine) == ["run.seed: 0 there, 9 here"]


def test_an_unknown_model_is_named_with_those_that_come_close(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no model 'tffd_resnet21'; did you mean .*tffd_resnet20"):
        train(recipe(tmp_path, model="tffd_resnet21"))
    assert not any(tmp_path.iterdir())


def test_mixup_asks_for_even_batches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use an even --batch-size and --drop-last"):
        train(recipe(tmp_path, optim={"mixup": 0.2}))


def test_the_help_of_a_preset_has_every_flag_on_one_line_and_all_that_is_off_on_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        recipe_from_cli({"one": BASE}, "What it does.", ["--lr", "1", "--help"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert f"  --lr {BASE.optim.lr}" + " " * 24 in "\n".join(lines)
    assert sum(line.startswith("  --tffd.ratio 0.5") for line in lines) == 1
    assert "off: teacher, byot, cs_kd, tf_kd, ps_kd, drop" in lines
    shown = {line.split()[0] for line in lines if line.startswith("  --")}

    with pytest.raises(SystemExit):
        recipe_from_cli({"one": BASE}, "What it does.", ["--help-all"])
    in_full = capsys.readouterr().out
    assert all(flag in in_full for flag in shown)
    assert {"--data", "--tffd.intra-loss", "--threads"} <= shown
