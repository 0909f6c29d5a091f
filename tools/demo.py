"""The main job on the embedded data: the very commands that a user runs, printed before they run.

make demo
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

CONFIG = "configs/ml_latest_small.yaml"


def run(*words: str) -> None:
    print(f"\n\033[1m$ instructrec {shlex.join(words)}\033[0m", flush=True)
    command = [sys.executable, "-m", "instructrec_jax.cli", *words]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def main() -> None:
    begun = time.perf_counter()
    from instructrec_jax import config

    run_dir = str(config.run_dir(config.load(CONFIG)))
    run("data", "prepare", CONFIG)
    run("train", CONFIG)
    run("evaluate", run_dir, "--protocol", "full")
    run("recommend", run_dir, "--user", "42", "-k", "5")
    run("recommend", run_dir, "--user", "318", "--wish", "an animated film for children", "-k", "5")
    run("recommend", run_dir, "--wish", "a horror film from the 1980s", "-k", "5")
    run("recommend", run_dir, "--wish", "something like Heat but funny, for tonight", "-k", "5")
    run("report", run_dir)
    print(f"\nThe whole job took {time.perf_counter() - begun:.0f} s. The run is in {Path(run_dir)}.")


if __name__ == "__main__":
    main()
