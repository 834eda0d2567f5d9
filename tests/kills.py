"""Kill runs at random moments, resume them, and compare them with one that was never killed, to the bit.

    python tests/kills.py --kills 100 --processes 1 2

A check to be made now and then, not a test: a kill takes two starts of Python, with two processes four. Every killed
run is resumed by the same command; its weights are compared byte by byte, and its metrics but for their times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = [
    str(ROOT / "recipes" / "train_cifar100.py"), "quickstart", "--epochs", "3", "--image-size", "8",
    "--log-every", "1", "--checkpoint-every", "5", "--precision", "no", "--compile", "False", "--threads", "1",
]  # fmt: skip
PATIENCE = 600.0
"""Seconds after which a run is taken to hang."""


def start(folder: Path, processes: int) -> subprocess.Popen[bytes]:
    """Start the run in `folder`."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        command = [sys.executable, *launch, *RECIPE, "--output", str(folder)]
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def kill(process: subprocess.Popen[bytes], chance: random.Random) -> str:
    """Kill all of a run at once, or one of its processes alone."""
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    found = [int(pid) for pid in workers.stdout.split()]
    if len(found) == 2 and chance.random() < 0.5:
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(found), signal.SIGKILL)
        process.wait(PATIENCE)  # the launcher ends the other
        return "one of two processes"
    for pid in (process.pid, *found):  # torchrun's workers are process groups of their own
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return "all processes"


def lines_of(folder: Path) -> int:
    """How many lines of metrics there are so far."""
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def outcome(folder: Path) -> dict[str, object]:
    """What has to be the same, by name."""
    timed = ("images_per_second", "seconds", "hours")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = [*sorted((folder / "weights").iterdir()), folder / "export" / "model.safetensors"]
    lines = [{key: value for key, value in record.items() if not key.endswith(timed)} for record in records]
    return {"metrics.jsonl": lines, **{str(file.relative_to(folder)): file.read_bytes() for file in files}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--to", type=Path, default=None, help="folder for runs and logs, in place of a temporary one")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    root = options.to or Path(tempfile.mkdtemp(prefix="kills-"))
    root.mkdir(parents=True, exist_ok=True)
    different = 0
    for processes in options.processes:
        whole = root / f"whole-{processes}"
        process = start(whole, processes)
        begun = time.monotonic()
        while not lines_of(whole) and process.poll() is None:
            time.sleep(0.05)
        started = time.monotonic() - begun
        if process.wait(PATIENCE):
            sys.exit(f"the run that nobody kills failed; see {root / (whole.name + '.log')}")
        expected = outcome(whole)
        counts: Counter[str] = Counter()
        for number in range(options.kills):
            folder = root / f"killed-{processes}-{number}"
            process = start(folder, processes)
            # one in five while it starts; the others after some line, as they train, evaluate, write and export
            if chance.random() > 0.2:
                after, moment = chance.randrange(lines_of(whole)), chance.uniform(0, 0.5)
                while lines_of(folder) < after and process.poll() is None:
                    time.sleep(0.02)
            else:
                moment = chance.uniform(0, started)
            time.sleep(moment)
            how = "after its end" if process.poll() is not None else kill(process, chance)
            lines = lines_of(folder)
            resumed = start(folder, processes)
            failed = resumed.wait(PATIENCE)
            found = {} if failed else outcome(folder)
            wrong = [name for name in expected if found.get(name) != expected[name]]
            counts["different" if wrong else f"the same, killed {how}"] += 1
            different += bool(wrong)
            print(f"{folder.name}: {how}, {lines} lines written: {', '.join(wrong) or 'the same'}", flush=True)
        print(f"{processes} process(es), {options.kills} kills: {dict(counts)}", flush=True)
    sys.exit(min(different, 1))


if __name__ == "__main__":
    main()
