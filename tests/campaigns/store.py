"""Stress the store: readers during refreshes and pruning, sizes, flipped bits, and full disks.

    python -m tests.campaigns.store [--cases N] [--seed S]

Most cases use only the store; some are whole runs of the built-in model. Either one bit of one file in a copy of a
finished store is flipped, and the release is published to a local Hub, or the store is on a tmpfs that is too small.
Needs root, to mount the tmpfs.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quantize_gemma.tasks.runtime import pruning, store, store_layout
from quantize_gemma.tasks.runtime.errors import StageFailed
from tests.campaigns import campaign
from tests.conftest import CommandLine, Outcome
from tests.hub.server import Hub, serve

WRITER = "hf_MARKEDwriter00"
# Files that depend on the run, not only on the model.
RUN_FILES = ("README.md", "metrics.json", "release.json", ".gitattributes")


def run(cases: int, rng: random.Random) -> Iterator[str | None]:
    """Run cases that use only the store; every twelfth case is a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        for number in range(cases):
            if number % 12 == 11:
                yield (runs.flip_a_bit if number % 24 == 11 else runs.fill_the_disk)(rng)
            else:
                yield from alone(1, rng)


def alone(cases: int, rng: random.Random) -> Iterator[str | None]:
    """Run cases that use only the store, each of a random kind."""
    for _ in range(cases):
        with tempfile.TemporaryDirectory() as folder:
            yield rng.choice([readers, sizes, flipped_bit, small_disk])(Path(folder), rng)


# Readers while other processes refresh and prune: each load is in a separate process that holds what it has opened.

READERS, SECONDS, KEYS = 3, 4.0, [f"{number}" * 64 for number in range(6)]


def readers(root: Path, rng: random.Random) -> str | None:
    """Load while others refresh and prune; artifacts of the stage "kept" are never old enough to be evicted."""
    for stage in ("kept", "old"):
        for key in KEYS:
            store.produce(stage, key, write_alike(rng.randbytes(8)), root)
    failures = root / "failures"
    work: list[Callable[[Path, random.Random, Path], None]] = [refresh, refresh, remove, *[open_in_forks] * READERS]
    workers = [fork(job, root, random.Random(rng.random()), failures) for job in work]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    messages = failures.read_text() if failures.exists() else ""
    if messages or any(codes):
        return f"readers: {messages or codes}"
    pruning.remove_unfinished(root)
    debris = [path for path in root.rglob("*") if path.name.startswith(store_layout.PARTIAL)]
    return f"readers: debris {debris}" if debris else None


def fork(work: Callable[..., None], *arguments: Any) -> int:
    """Call `work` in a fork; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*arguments)
        os._exit(0)
    except BaseException as error:
        print(f"{work.__name__}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def write_alike(content: bytes) -> Callable[[Path], dict[str, Any]]:
    """Return the work of a stage that writes three files with the same content."""

    def work(target: Path) -> dict[str, Any]:
        for name in ("a", "b", "c"):
            (target / name).write_bytes(content * (1 + content[0]))
        return {"metadata": {"content": content.hex()}}

    return work


def refresh(root: Path, rng: random.Random, failures: Path) -> None:
    """Refresh artifacts until the time is up."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        stage, key = rng.choice(["kept", "old"]), rng.choice(KEYS)
        artifact = store.produce(stage, key, write_alike(rng.randbytes(8)), root, refresh=rng.random() < 0.9)
        if stage == "old":
            with contextlib.suppress(FileNotFoundError):
                os.utime(artifact.path.parent / store_layout.MANIFEST, (0, 0))
                os.utime(artifact.path.parent, (0, 0))


def remove(root: Path, rng: random.Random, failures: Path) -> None:
    """Prune until the time is up."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        pruning.remove_unfinished(root)
        pruning.evict(float("inf"), 86_400, root)
        time.sleep(rng.random() / 50)


def open_in_forks(root: Path, rng: random.Random, failures: Path) -> None:
    """Open artifacts in forks that hold them, until the time is up."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        stage, key = rng.choice(["kept", "old"]), rng.choice(KEYS)
        pid = fork(read_twice, root, stage, key, failures)
        os.waitpid(pid, 0)


def read_twice(root: Path, stage: str, key: str, failures: Path) -> None:
    """Open an artifact and read it twice, a little apart: it must match its manifest both times."""
    with store.keep_pinned():
        artifact = store.pin(stage, key, root)
        fault = "is missing" if artifact is None and stage == "kept" else None
        for _ in range(2 if artifact is not None else 0):
            assert artifact is not None
            content = bytes.fromhex(artifact.metadata["content"])
            for name in artifact.files:
                try:
                    if (artifact.path / name).read_bytes() != content * (1 + content[0]):
                        fault = f"{name} is from another version of the artifact"
                except OSError as error:
                    fault = f"{name}: {error}"
            time.sleep(0.01)
    if fault:
        with failures.open("a") as stream:
            stream.write(f"{stage}/{key[:4]} {fault}; ")


# Sizes, and the space that removal frees.


def sizes(root: Path, rng: random.Random) -> str | None:
    """Create artifacts that share files, remove some, and compare the sizes with those of du."""
    artifacts: list[store.Artifact] = []

    def work(target: Path) -> dict[str, Any]:
        for number in range(rng.randrange(4)):
            (target / f"own-{number}").write_bytes(rng.randbytes(rng.choice([0, 1, 4096, 100_000])))
        for artifact in rng.sample(artifacts, min(len(artifacts), 3)):
            for name in artifact.files:
                if not (target / name).exists() and (artifact.path / name).exists():
                    store.link(artifact.path / name, target / name)
        return {}

    for _ in range(rng.randrange(2, 12)):
        artifacts.append(store.produce(rng.choice("xyz"), rng.randbytes(32).hex(), work, root))
        if rng.random() < 0.3:
            before = disk_usage(root)
            removal = pruning.evict(before * rng.random(), float("inf"), root)
            bytes_freed = before - disk_usage(root)
            if removal.bytes != bytes_freed:
                return f"sizes: {removal.bytes} bytes reported as freed, but {bytes_freed} were freed"
        if pruning.store_size(root) != disk_usage(root):
            return f"sizes: {pruning.store_size(root)} bytes, but {disk_usage(root)} according to du"
    return None


def disk_usage(path: Path) -> int:
    """Return the disk usage according to du, in bytes."""
    process = subprocess.run(["du", "-s", "-B1", path], capture_output=True, check=True)
    return int(process.stdout.split()[0])


# Flipped bits and full disks.


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit of a file, as a disk does: without changing the modification time."""
    times = path.stat()
    with path.open("r+b") as stream:
        stream.seek(rng.randrange(times.st_size))
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ (1 << rng.randrange(8))]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flipped_bit(root: Path, rng: random.Random) -> str | None:
    """Flip one bit: afterwards, the store returns no artifact, and the rebuilt one has the same digest."""
    content = rng.randbytes(8)
    artifact = store.produce("stage", KEYS[0], write_alike(content), root)
    victim = rng.choice([path for path in artifact.path.parent.rglob("*") if path.is_file()])
    flip(victim, rng)
    loaded_artifact = store.load("stage", KEYS[0], root, rehash=True)
    if loaded_artifact is not None:
        return f"flipped bit: {victim.name} was damaged, but the artifact was loaded"
    second_artifact = store.produce("stage", KEYS[0], write_alike(content), root)
    return None if second_artifact.digest == artifact.digest else "flipped bit: the rebuilt artifact differs"


@contextlib.contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of `size` bytes."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def small_disk(root: Path, rng: random.Random) -> str | None:
    """Write artifacts until the disk is full, then continue on a larger disk.

    The error is one sentence, nothing unfinished is left, and existing artifacts stay intact.
    """
    content = rng.randbytes(8)
    with tmpfs(root / "disk", rng.randrange(1, 40) * 4096) as disk:
        artifacts: list[store.Artifact] = []
        try:
            for number in range(8):
                artifacts.append(store.produce("stage", f"{number}" * 64, write_alike(content), disk / "home"))
        except StageFailed as error:
            if "\n" in str(error) or not str(error).startswith(f"the disk of {disk / 'home'} is full"):
                return f"small disk: the error is {error}"
        except Exception as error:
            return f"small disk: raised {error!r}"
        if [path for path in disk.rglob("*") if path.name.startswith(store_layout.PARTIAL)]:
            return "small disk: debris"
        if any(store.load("stage", artifact.key, disk / "home", rehash=True) != artifact for artifact in artifacts):
            return "small disk: an artifact was damaged"
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        for number in range(8):
            store.produce("stage", f"{number}" * 64, write_alike(content), disk / "home")
    return None


# Whole runs.


class Runs:
    """Whole runs of the built-in model, on copies of one finished store."""

    def __init__(self, folder: Path) -> None:
        """Start nothing yet."""
        self.folder = folder
        self.finished_command = CommandLine(folder / "finished", folder / "prefect")
        self.release: dict[str, str] = {}

    def prepare(self) -> None:
        """Create the finished store, once."""
        if not self.release:
            outcome = self.finished_command("run", "--json")
            assert outcome.code == 0, outcome.stderr
            self.release = digests(Path(outcome.summary["release"]))

    def flip_a_bit(self, rng: random.Random) -> str | None:
        """Flip a bit anywhere in the store, then publish.

        Either the damage is repaired, or nothing is published and the next run succeeds.
        """
        self.prepare()
        home = self.folder / "copy"
        shutil.copytree(self.finished_command.home, home, symlinks=True)
        tokens: Any = {WRITER: {"user": "robot", "role": "write", "namespaces": ["team"]}}
        try:
            files = sorted(path for path in home.rglob("*") if path.is_file() and path.stat().st_size)
            victim = rng.choice([path for path in files if not path.is_symlink()])
            flip(victim, rng)
            with serve(self.folder / "hub", tokens) as hub:
                return self._publish(hub, CommandLine(home, self.finished_command.prefect), victim.relative_to(home))
        finally:
            shutil.rmtree(home)
            shutil.rmtree(self.folder / "hub", ignore_errors=True)

    def _publish(self, hub: Hub, command_line: CommandLine, victim: Path) -> str | None:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HUB_DISABLE_XET": "1"}
        for _ in range(2):
            outcome = command_line("run", "--json", "--target", "team/tiny", **environment)
            if outcome.code == 0:
                sent_digests = {
                    name: hashlib.sha256(hub.read("model", "team/tiny", name)).hexdigest()
                    for name in hub.files("model", "team/tiny")
                }
                entries = json.loads(hub.read("model", "team/tiny", "release.json"))["files"]
                # Files that depend on the run must match release.json; all others must match the undamaged release.
                expected = {name: entry["sha256"] for name, entry in entries.items()} | self.release
                differing_names = [
                    name for name, digest in sent_digests.items() if name in expected and digest != expected[name]
                ]
                return (
                    f"flipped bit of {victim}: published with a different {', '.join(differing_names)}"
                    if differing_names
                    else None
                )
            fault = find_message_fault(outcome)
            if fault:
                return f"flipped bit of {victim}: {fault}"
            with contextlib.suppress(KeyError):
                if hub.files("model", "team/tiny"):
                    return f"flipped bit of {victim}: it failed, and something was published"
        return f"flipped bit of {victim}: the second run failed, too: {outcome.stderr[-300:]}"

    def fill_the_disk(self, rng: random.Random) -> str | None:
        """Rerun two stages on a disk that may be too small for them.

        The error is one sentence, and the run succeeds on a larger disk.
        """
        self.prepare()
        stages = rng.sample(["card", "smoke", "untie", "download_dataset", "evaluate", "quantize"], 2)
        size = disk_usage(self.finished_command.home)
        with tmpfs(self.folder / "disk", 2 * size) as disk:
            shutil.copytree(self.finished_command.home, disk / "home", symlinks=True)
            for stage in stages:
                shutil.rmtree(disk / "home" / stage)
            df = subprocess.run(["df", "-B1", "--output=used", disk], capture_output=True, text=True, check=True)
            new_size = int(df.stdout.split()[-1]) + rng.randrange(1, 300) * 4096
            subprocess.run(["mount", "-o", f"remount,size={new_size}", disk], check=True)
            command_line = CommandLine(disk / "home", self.finished_command.prefect)
            outcome = command_line("run", "--json")
            fault = find_message_fault(outcome) if outcome.code else None
            if fault:
                return f"a disk without room for {' and '.join(stages)}: {fault}"
            subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
            second_outcome = command_line("run", "--json")
            if second_outcome.code:
                return (
                    f"on a larger disk, after one without room for {' and '.join(stages)}: "
                    f"{second_outcome.stderr[-300:]}"
                )
            differences = digests(Path(second_outcome.summary["release"])).items() ^ self.release.items()
            return f"after a full disk: the release differs: {differences}" if differences else None


def find_message_fault(outcome: Outcome) -> str | None:
    """Return what is wrong with the error message of a failed run: it must be one sentence, printed once."""
    try:
        error = outcome.summary["error"]
    except (IndexError, ValueError):
        return f"no JSON: {outcome.stderr[-300:]}"
    if "Traceback" in outcome.stderr or "\n" in error:
        return f"not one sentence: {outcome.stderr[-300:]}"
    # If several stages fail for the same reason at the same time, one is shown, and another may be in the JSON.
    reason = error.partition(": ")[2] or error
    times = outcome.stderr.count(reason.rpartition(": free some space")[0] or reason)
    return None if times == 1 else f"printed {times} times: {error}"


def digests(release: Path) -> dict[str, str]:
    """Return the SHA-256 of a release's files, except for those that depend on the run.

    Raises ValueError if release.json does not list exactly these files.
    """
    all_digests = {
        path.relative_to(release).as_posix(): store.digest_file(path) for path in release.rglob("*") if path.is_file()
    }
    entries = json.loads((release / "release.json").read_text(encoding="utf-8"))["files"]
    other_digests = {name: digest for name, digest in all_digests.items() if name != "release.json"}
    if {name: entry["sha256"] for name, entry in entries.items()} != other_digests:
        raise ValueError("release.json does not list the release's files")
    return {name: digest for name, digest in all_digests.items() if name not in RUN_FILES and not name.endswith(".png")}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    campaign("store", run, cases=360)
