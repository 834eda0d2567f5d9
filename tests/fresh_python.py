"""Python processes at a third of their price: forks of one that has imported what takes seconds each time.

Such a process has the environment, the folder, the arguments and the streams that are asked for, and the rest as Python
begins with it, but for modules in `SLOW`, which are there already. None of them reads what a test sets: torch takes its
OMP_NUM_THREADS at its first import, so a test of that needs a process that nobody forked.

    done = run(["-c", "import sys; print(sys.argv)", "one"], env={"HF_HUB_OFFLINE": "1"})
    assert done.stdout == "['-c', 'one']\\n"
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

SLOW = ("torch", "torchvision", "sklearn.datasets", "pandas", "pyarrow.parquet")
PATIENCE = 300  # seconds after which a process is taken to hang, and killed


def run(
    arguments: Sequence[str], env: Mapping[str, str] = os.environ, cwd: Path | str | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True)`."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        streams = [f"{folder}/out", f"{folder}/err"]
        order = {"arguments": arguments, "env": dict(env), "cwd": str(cwd or os.getcwd()), "streams": streams}
        print(json.dumps(order), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(Path(stream).read_text() for stream in streams))


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks, one for all of a test session; it ends when its orders do."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes: dict[str, int] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, __file__], env=env, text=True, **pipes)


def _serve() -> None:
    for name in SLOW:
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would touch, and so copy, every page of what is imported
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def _become(arguments: list[str], env: dict[str, str], cwd: str, streams: list[str]) -> None:
    signal.alarm(PATIENCE)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, name in ((0, os.devnull), (1, streams[0]), (2, streams[1])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    what, *rest = arguments
    first = str(Path(what).resolve().parent) if not what.startswith("-") else ""
    sys.path[:1] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if what == "-c":
        sys.argv = [what, *rest[1:]]
        sys.modules["__main__"] = ModuleType("__main__")
        exec(rest[0], vars(sys.modules["__main__"]))
    elif what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    _serve()
