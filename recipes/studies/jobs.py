"""Runs side by side: one queue, a process and a log for each, and a signal that stops them all with a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from tffd_zoo.threads import cores_per_process

from .report import collect
from .runs import Run

POLL, REDRAW = 0.1, 5.0
"""Seconds between two looks at the processes, and between two at how far they are."""


class Received:
    """The signals that this process was sent: each is passed on to the runs once, and ends the queue."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.first: int | None = None
        self._new: list[int] = []

    def __enter__(self) -> Received:
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.first = self.first or number
        self._new.append(number)

    def take(self) -> list[int]:
        """Those that came since the last call."""
        taken, self._new = self._new, []
        return taken


@dataclass
class Job:
    """A run and the process that makes it."""

    run: Run
    process: subprocess.Popen[bytes]
    bar: tqdm
    started: float = field(default_factory=time.monotonic)
    shown: float = 0.0

    @classmethod
    def start(cls, run: Run, command: Sequence[str], threads: int | None, line: int) -> Job:
        """Start `command` with `threads` cores, what it prints added to the run's log.

        The process has a session of its own: a Ctrl-C reaches it once, from here, and it stops with a checkpoint.
        """
        # In a log a line of the progress bar a minute will do, and an error has to come last.
        environment = {**os.environ, "TQDM_MININTERVAL": "60", "PYTHONUNBUFFERED": "1"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        total, done = run.recipe.optim.epochs, run.epochs_done()
        shape = "{desc}: {bar}| {n:g}/{total} epochs [{elapsed}<{remaining}]"
        bar = tqdm(total=total, initial=done, desc=str(run), position=line, bar_format=shape, leave=False, disable=None)
        return cls(run, process, bar)

    def show(self) -> None:
        """Bring the bar up to date, where there is one."""
        if not self.bar.disable and time.monotonic() - self.shown > REDRAW:
            self.shown = time.monotonic()
            self.bar.n = self.run.epochs_done()
            self.bar.refresh()

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.started) / 60


def run_all(name: str, runs: Sequence[Run], command: Callable[[Run], list[str]], jobs: int = 1) -> None:
    """Make every run that is not done, `jobs` at a time, and collect its record; one that fails keeps no other back.

    Args:
        name: what they are, for the summary.
        runs: in the order to start them in; a teacher goes before its students.
        command: makes one run.
        jobs: processes side by side; the cores are divided between them.

    Raises:
        SystemExit: 1 if a run failed, 128 + the signal's number if one told this process to stop.
    """
    if jobs < 1:
        raise ValueError(f"--jobs {jobs} runs nothing; give 1 or more")
    threads = None if jobs == 1 else cores_per_process(jobs)
    places = {id(run): f"[{place}/{len(runs)}] {run}" for place, run in enumerate(runs, start=1)}
    before = [run for run in runs if run.finished]
    waiting = [run for run in runs if not run.finished]
    done: list[Run] = []
    failed: list[Run] = []
    running: dict[int, Job] = {}
    with Received() as received:
        while running or (waiting and not received.first):
            # those that have ended
            for line, job in list(running.items()):
                if job.process.poll() is None:
                    job.show()
                    continue
                del running[line]
                job.bar.close()
                at, code = places[id(job.run)], job.process.returncode
                if code == 0 and job.run.state() == "done":
                    done.append(job.run)
                    collect(job.run.folder, job.run.records)
                    _say(f"{at}: done in {job.minutes:.1f} min, top-1 {job.run.last_top1():.2f}")
                elif received.first:
                    _say(f"{at}: stopped after {job.run.epochs_done():g} epochs")
                else:
                    failed.append(job.run)
                    _say(f"{at}: failed with exit code {code}: {_last_line(job.run.log)} (see {job.run.log})")

            # those that can start
            while len(running) < jobs and not received.first:
                unmade = [*waiting, *(job.run for job in running.values())]
                run = next((run for run in waiting if run.teacher is None or run.teacher not in unmade), None)
                if run is None:
                    break
                waiting.remove(run)
                if hindrance := _hindrance(run, failed):
                    failed.append(run)
                    _say(f"{places[id(run)]}: {hindrance}")
                else:
                    _say(f"{places[id(run)]}: {_how(run)}, log in {run.log}")
                    line = min(set(range(jobs)) - running.keys())
                    running[line] = Job.start(run, command(run), threads, line)

            # what this process was told meanwhile
            time.sleep(POLL)
            for number in received.take():
                for job in running.values():
                    job.process.send_signal(number)
    summary = f"{name}: {len(runs)} runs, {len(done)} done now, {len(before)} before, {len(failed)} failed"
    _say(f"{summary}: {', '.join(map(str, failed))}" if failed else summary)
    if received.first:
        _say("stopped; the same command goes on from there")
        raise SystemExit(128 + received.first)
    if failed:
        raise SystemExit(1)


def _hindrance(run: Run, failed: Sequence[Run]) -> str:
    """Why `run` cannot start; empty if it can."""
    if conflict := run.conflict():
        return f"{conflict}; pass --output with another folder"
    return f"not started, for its teacher failed: {run.teacher}" if run.teacher in failed else ""


def _how(run: Run) -> str:
    return "starting" if run.state() == "missing" else "resuming"


def _say(text: str) -> None:
    """Print a line above the bars."""
    with tqdm.external_write_mode(sys.stdout):
        print(text, flush=True)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
