"""Run a program that knows nothing of this package, with the zoo's models registered with timm.

    python -m tffd_zoo SCRIPT [ARGS]
    python -m tffd_zoo -m MODULE [ARGS]

timm's own train.py, validate.py, benchmark.py and onnx_export.py, like any other program, then know every `tffd_*`
model. `accelerate launch -m tffd_zoo SCRIPT [ARGS]` and `torchrun -m tffd_zoo ...` do the same on several processes.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def main(args: Sequence[str]) -> None:
    """Become the program that `args` name: it sees the command line and the import path that it would have alone."""
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if args else 2)
    program, *rest = args
    if program == "-m":
        if not rest:
            raise SystemExit("error: -m runs a module, and none is named; python -m tffd_zoo -m MODULE [ARGS]")
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    if not Path(program).exists():
        raise SystemExit(f"error: there is no script {program}; give its path, or -m and the name of a module")
    sys.argv = [program, *rest]
    sys.path[0] = str(Path(program).resolve().parent)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
