"""Programs that stand for those of a cloud: they write down how they were called and play its states."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).parent.parent
LAUNCH = REPO / "tools" / "launch"

# Writes down its arguments. What it prints and its exit status come from a queue for calls that hold the key; the last one stays.
FAKE = """#!{python}
import fcntl, json, pathlib, sys
folder = pathlib.Path({folder!r})
line = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open(folder / "calls.jsonl", "a") as calls:
    fcntl.flock(calls, fcntl.LOCK_EX)
    calls.write(json.dumps(line) + "\\n")
    answers = json.loads((folder / "answers.json").read_text())
    for key, queue in answers.items():
        if key in " ".join(line):
            text, code = queue.pop(0) if len(queue) > 1 else queue[0]
            (folder / "answers.json").write_text(json.dumps(answers))
            print(text)
            sys.exit(code)
"""


@dataclass
class Cloud:
    """A PATH with fakes in front, and what was called."""

    folder: Path
    path: str = field(init=False)

    def __post_init__(self) -> None:
        programs = self.folder / "bin"
        programs.mkdir()
        for name in ("gcloud", "xpk", "kubectl", "docker", "uv", "sbatch", "srun", "squeue", "scontrol"):
            program = programs / name
            program.write_text(FAKE.format(python=sys.executable, folder=str(self.folder)))
            program.chmod(0o755)
        self.path = f"{programs}:/usr/bin:/bin"
        self.play()

    def play(self, answers: dict[str, list[str | tuple[str, int]]] | None = None) -> None:
        """Answers in order, text or (text, exit status), for calls that hold a key; all else succeeds silently."""
        queues = {k: [a if isinstance(a, tuple) else (a, 0) for a in queue] for k, queue in (answers or {}).items()}
        (self.folder / "answers.json").write_text(json.dumps(queues))
        (self.folder / "calls.jsonl").write_text("")

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def actions(self) -> list[str]:
        """The calls of gcloud in short: the verb of queued-resources, and for ssh what it does on the workers."""
        short = []
        for call in self.calls:
            if call[:4] != ["gcloud", "compute", "tpus", "queued-resources"]:
                continue
            command = next((word.split() for word in call if word.startswith("--command=")), [])
            short.append(" ".join([call[4], *(command[2:3] if "instructrec/worker.sh" in command else [])]))
        return short

    def run(self, script: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        # A copy of the tools alone: the repository's own .venv, which the scripts look into first, is not there.
        repo = self.folder / "repo"
        if not repo.exists():
            shutil.copytree(LAUNCH, repo / "tools" / "launch")
            (repo / "configs").mkdir()
            (repo / "instructrec_jax").mkdir()
            shutil.copy(REPO / "instructrec_jax" / "__init__.py", repo / "instructrec_jax")
        done = subprocess.run(
            ["bash", str(repo / "tools" / "launch" / script), *arguments],
            env={"PATH": self.path, "HOME": str(self.folder)},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def dry(self, script: str, *arguments: str) -> list[list[str]]:
        """The printed commands as a shell reads them; nothing was called."""
        before = self.calls
        end = arguments.index("--") if "--" in arguments else len(arguments)
        printed = self.run(script, *arguments[:end], "--dry-run", *arguments[end:])
        assert self.calls == before
        return [shlex.split(line) for line in printed.stdout.splitlines()]
