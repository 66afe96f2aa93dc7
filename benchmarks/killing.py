"""What is killed over and over: a command is started, it, one of its workers or all of them are
killed (SIGKILL) at a random moment, and the same command is started again.

Imported by chaos.py and the subjects beside it. Linux: processes are found in /proc.
"""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PATIENCE = 600  # seconds for one run
ORPHANS = 10  # seconds in which workers have to notice that they are alone
MOST_WRITES = 0.05  # seconds, in which files of living workers get their names
LOOK = 0.002  # seconds between looks at the files
# When: some time after a run's first file; within the write of one; some time after its start, most
# of which is imports.
MOMENTS = ("work", "write", "work", "write", "run")
WHOM = ("main", "main", "worker", "workers")
SAYS_NOTHING = (".lock", "request.json", "request.json.tmp")  # of how far the work is


class Subject(ABC):
    """A command that is killed, and how to tell whether what it wrote is what it should be.

    whole: the folder in which it was left alone; root: the one in which it is killed, and in which
    nothing else writes. engine: "" for a command without workers. kept: how often a run that was
    finished before a start was found untouched after it; resumed: how often a training was to go on
    after an epoch of an earlier start.
    """

    name: str
    environment: dict[str, str] = {}

    def __init__(self, home: Path, engine: str = ""):
        self.whole, self.root, self.engine = home / "whole", home / "killed", engine
        self.kept = self.resumed = 0
        self.whole.mkdir()
        self.root.mkdir()

    @abstractmethod
    def command(self, folder: Path) -> list:
        """The command line that writes into a folder."""

    @abstractmethod
    def look(self) -> None:
        """Look at `whole` while the undisturbed command writes it; called all the time."""

    @abstractmethod
    def learn(self) -> None:
        """Read what the undisturbed command made."""

    @abstractmethod
    def false_files(self) -> list[str]:
        """Files in `root` that pass for whole, but are not what they should be."""

    @abstractmethod
    def made(self) -> bool:
        """Whether all is there, in spite of the kills."""

    def problems(self) -> list[str]:
        """What the package itself finds wrong in `root` at the end."""
        return []

    def clear(self) -> None:
        """Empty `root`, for a new start."""
        shutil.rmtree(self.root)
        self.root.mkdir()


@dataclass
class Kill:
    """whom: main, worker or workers; hit: it was alive; torn: a file was being written, and lies
    there half; said: what was wrong with the command's own end, if it had one."""

    whom: str
    hit: bool
    torn: bool
    said: str


def chaos(subject: Subject, kills: int, rng: random.Random) -> dict:
    """Kill a subject so many times. Each time that it is made in spite of that, it is compared with
    the undisturbed one, and made anew."""
    seconds, window = undisturbed(subject)
    result = {
        "subject": subject.name, "engine": subject.engine, "seconds": seconds, "starts": 0,
        "kills": 0, "killed": {"main": 0, "worker": 0, "workers": 0}, "torn": 0, "rounds": 0,
        "kept": 0, "resumed": 0, "false": [], "equal": True, "left": [], "said": [],
    }  # fmt: skip
    while result["kills"] < kills:
        moment = MOMENTS[result["starts"] % len(MOMENTS)]
        result["starts"] += 1
        fresh = not files(subject.root)
        kill = kill_once(subject, moment, seconds if moment == "run" else window, rng)
        if kill.hit:
            result["kills"] += 1
            result["killed"][kill.whom] += 1
            result["torn"] += kill.torn
        elif fresh:  # it was slower, undisturbed: compiled loops were not in their cache yet
            seconds, window = 0.8 * seconds, 0.8 * window
        result["false"] += subject.false_files()
        if kill.said:
            result["said"].append(kill.said)
        if subject.made() or result["kills"] == kills:
            finish(subject, result)
        if result["starts"] > 10 * kills + 10:
            raise SystemExit(f"error: {subject.name} ends before it can be killed")
    return result | {"kept": subject.kept, "resumed": subject.resumed}


def undisturbed(subject: Subject) -> tuple[float, float]:
    """Let the command run alone. Seconds that it takes, and those from its first file on."""
    begun = first = time.monotonic()
    with started(subject, subject.whole) as (child, log):
        while child.poll() is None:
            if first == begun and files(subject.whole):
                first = time.monotonic()
            subject.look()
            time.sleep(LOOK)
        ended = time.monotonic()
        if child.returncode:
            raise SystemExit(f"error: {subject.name}, undisturbed, failed: {last_words(log)}")
    subject.learn()
    return ended - begun, ended - first


def finish(subject: Subject, result: dict) -> None:
    """Run through, compare, and start over."""
    with started(subject, subject.root) as (child, log):
        if child.wait(PATIENCE):
            result["said"].append(last_words(log))
    result["rounds"] += 1
    wrong = subject.false_files() + subject.problems()
    result["false"] += wrong
    names, wanted = tree(subject.root), tree(subject.whole)
    result["equal"] &= not wrong and wanted <= names
    result["left"] += sorted(names - wanted)
    subject.clear()


def kill_once(subject: Subject, moment: str, seconds: float, rng: random.Random) -> Kill:
    """Start, wait for a moment, kill."""
    before = files(subject.root)
    with started(subject, subject.root) as (child, log):
        if moment != "run":
            wait(child, lambda: files(subject.root).items() - before.items())
        wait(child, lambda: False, rng.uniform(0, seconds))
        whom = rng.choice(WHOM) if subject.engine else "main"
        victims = aim(subject, child, moment, whom, rng)
        hit = child.poll() is None and bool(victims)
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        alive = living(child.pid, ORPHANS if whom == "main" else MOST_WRITES)
        torn = hit and any(
            not written_by(file, alive) for file in half_files(subject.root) - before.keys()
        )
        if whom != "main" and rng.random() < 0.5:
            child.wait(PATIENCE)  # it has to get over it
        elif whom != "main":
            with suppress(subprocess.TimeoutExpired):
                child.wait(rng.uniform(0, seconds))
            child.kill()
        said = "" if whom == "main" and hit else how_it_ended(subject, child.wait(), log)
        if alive := living(child.pid, ORPHANS):
            said += f" {len(alive)} of its processes live on."
    return Kill(whom, hit, torn, said.strip())


def aim(subject: Subject, child: subprocess.Popen, moment: str, whom: str, rng) -> list[int]:
    """The processes to kill; for the moment "write", when one begins to write a file."""
    victims = [child.pid] if whom == "main" else workers(child.pid)
    writing: list[Path] = []
    if moment == "write":  # a write takes a millisecond or two: what can be is done before
        old = half_files(subject.root)

        def begun() -> bool:
            writing[:] = half_files(subject.root) - old
            return bool(writing)

        wait(child, begun, pause=0)
    if whom != "worker" or not victims:
        return victims
    writers = [pid for pid in victims if any(written_by(file, [pid]) for file in writing)]
    return [rng.choice(writers or victims)]


@contextmanager
def started(subject: Subject, folder: Path) -> Iterator[tuple[subprocess.Popen, IO[str]]]:
    """The command, running in a session of its own, by which its workers are found even when it is
    dead, and what it says. None of them outlives the block."""
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            list(map(str, subject.command(folder))), stdout=subprocess.DEVNULL, stderr=log,
            env=os.environ | subject.environment, start_new_session=True,
        )  # fmt: skip
        try:
            yield child, log
        finally:
            for pid in family(child.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            child.wait()


def wait(child: subprocess.Popen, until: Callable[[], object], seconds: float = PATIENCE,
         pause: float = LOOK) -> None:  # fmt: skip
    """Until something is so, the command has ended, or the seconds are over."""
    deadline = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < deadline and not until():
        time.sleep(pause)


def family(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it has just ended
        if int(own) == session and state not in "XZ":
            found.append(int(folder.name))
    return found


def workers(session: int) -> list[int]:
    """Those of them that multiprocessing has started to work, on either engine."""
    found = []
    for pid in family(session):
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def living(session: int, seconds: float) -> list[int]:
    """The processes of a session that are left after so long; at once, if there are none."""
    deadline = time.monotonic() + seconds
    while (found := family(session)) and time.monotonic() < deadline:
        time.sleep(LOOK)
    return found


def how_it_ended(subject: Subject, code: int, log: IO[str]) -> str:
    """What was wrong with how a command ended that lost workers, or nobody; "" if it was right, or
    we ended it. Dask's workers print tracebacks of their own."""
    log.seek(0)
    if code in (0, -signal.SIGKILL) and (subject.engine == "dask" or "Traceback" not in log.read()):
        return ""
    return f"exit code {code}: {last_words(log)}"


def last_words(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-300:].strip()


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """All files below a folder that say something of how far the work is, each with what is another
    when it is written anew."""
    found = {}
    for at, _, names in os.walk(folder):
        for name in names:
            if not name.endswith(SAYS_NOTHING):
                with suppress(FileNotFoundError):
                    state = os.stat(os.path.join(at, name))
                    found[Path(at, name)] = (state.st_ino, state.st_mtime_ns)
    return found


def half_files(folder: Path) -> set[Path]:
    """Those of them whose names say that they are not whole. Nothing else is looked at: it has to
    be quick."""
    return {
        Path(at, name)
        for at, _, names in os.walk(folder)
        for name in names
        if name.startswith(".") and not name.endswith(SAYS_NOTHING)
    }


def written_by(file: Path, pids: list[int]) -> bool:
    """Whether a half-written file is one of these processes', if its name has their number."""
    return any(f"-{pid}-" in f"{file.name}-" for pid in pids)


def tree(folder: Path) -> set[str]:
    """The names of all that is in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
