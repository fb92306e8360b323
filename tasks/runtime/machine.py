"""The memory and the cores of this machine that this process may use, within the limits of its containers.

Linux stores those limits in cgroups, version 1, 2, or both. A cgroup's limit applies to all cgroups below it, so every
cgroup on the way up is considered. For tests, functions take the root of the file system as a parameter.
"""

import contextlib
import ctypes
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path

from quantize_gemma.tasks.runtime.errors import UserError

ROOT = Path("/")


def total_memory(root: Path = ROOT) -> int:
    """Return the bytes of memory of this machine, or of this container."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for _, limit in _memory_limits(root))])


def available_memory(root: Path = ROOT) -> int:
    """Return the bytes of memory that are available, on this machine and in every cgroup of this process."""
    import psutil

    free = [max(0, limit - _used_bytes(group)) for group, limit in _memory_limits(root)]
    return min([int(psutil.virtual_memory().available), *free])


def cores(root: Path = ROOT) -> int:
    """Return how many physical cores this process may use."""
    import psutil

    return min(psutil.cpu_count(logical=False) or 1, logical_cores(root))


def logical_cores(root: Path = ROOT) -> int:
    """Return how many threads of this process may run at the same time."""
    return min([len(os.sched_getaffinity(0)), *_core_limits(root)])


def threads(processes: int = 1, root: Path = ROOT) -> dict[str, str]:
    """Return the environment variables that give each of several processes its share of the cores.

    There are none if a single process has no CPU quota: libraries detect the number of cores, but not a quota.
    """
    if processes == 1 and (not _core_limits(root) or "OMP_NUM_THREADS" in os.environ):
        return {}
    # A list has a number for each level of nested parallelism.
    available = int((os.environ.get("OMP_NUM_THREADS") or str(cores(root))).partition(",")[0])
    return {"OMP_NUM_THREADS": str(max(1, available // processes))}


def processor() -> str:
    """Return the name of this machine's processor."""
    lines = (line.partition(":") for line in _text(Path("/proc/cpuinfo")).splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), platform.machine())


def has_cuda_driver() -> bool:
    """Tell whether this machine has NVIDIA's driver, without which there is no CUDA device."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def device_of_part(device: str, part: int) -> str:
    """Return the device of one of several parts, which share the GPUs, as torch names it.

    Args:
        device: "cpu" or "cuda".
        part: The number of the part, from 0.

    Raises:
        UserError: There is no CUDA device.
    """
    if device != "cuda":
        return device
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"{socket.gethostname()} has no CUDA device: pass --device cpu, or give its workers GPUs")
    return f"cuda:{part % torch.cuda.device_count()}"


def trim_memory() -> None:
    """Return freed memory to the operating system: loading Gemma's tokenizer leaves 0.3 GB of it."""
    # Only glibc has malloc_trim; with other libraries, there is nothing to do.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _memory_limits(root: Path) -> list[tuple[Path, int]]:
    """Return the cgroups of this process that limit memory, each with its limit in bytes."""
    limits = []
    for group in _groups(root, "memory"):
        # memory.high is not a hard limit, but a process above it is slowed down until it stands still.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _number(group / name)
            if limit is not None:
                limits.append((group, limit))
    return limits


def _used_bytes(group: Path) -> int:
    """Return the bytes that a cgroup uses, without cached files that the kernel would drop."""
    used_bytes = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    cached = dict(_pairs(group / "memory.stat"))
    return used_bytes - cached.get("total_inactive_file", cached.get("inactive_file", 0))


def _core_limits(root: Path) -> list[int]:
    """Return the CPU quotas of this process's cgroups, in whole cores."""
    limits = []
    for group in _groups(root, "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        words = _text(group / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            quota, period = int(words[0]), int(words[1])
        if quota is not None and period:
            limits.append(max(1, quota // period))
    return limits


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the directories of this process's cgroups for a controller, from the innermost to the outermost."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if number == "0" and not controllers:
            mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif controller in names:
            mounts = [f"sys/fs/cgroup/{controllers}", f"sys/fs/cgroup/{controller}"]
        else:
            continue
        # In a container, the path may be that on the host, of which only a part is mounted.
        relative = Path(os.path.normpath("/" + path.strip("/"))).relative_to("/")
        for mount in dict.fromkeys((root / mount).resolve() for mount in mounts):
            for subpath in (relative, *relative.parents):
                if (mount / subpath).is_dir():
                    yield mount / subpath


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is no file or no limit ("max", -1, or an impossibly large number)."""
    text = _text(path).strip()
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    for line in _text(path).splitlines():
        name, _, value = line.partition(" ")
        if value.isdigit():
            yield name, int(value)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
