"""Memory and cores are those of the container, whichever control group limits them."""

import os
from pathlib import Path

import psutil
import pytest

from quantize_gemma.tasks.runtime import machine

GIB = 2**30


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


VERSION_2 = {
    "proc/self/cgroup": "0::/pod/container\n",
    "sys/fs/cgroup/cgroup.controllers": "cpu memory",
    "sys/fs/cgroup/pod/memory.max": f"{GIB}\n",
    "sys/fs/cgroup/pod/memory.high": "max\n",
    "sys/fs/cgroup/pod/memory.current": f"{GIB // 2}\n",
    "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {GIB // 4}\n",
    "sys/fs/cgroup/pod/cpu.max": "max 100000\n",
    "sys/fs/cgroup/pod/container/memory.max": f"{2 * GIB}\n",
    "sys/fs/cgroup/pod/container/memory.current": "0\n",
    "sys/fs/cgroup/pod/container/cpu.max": "150000 100000\n",
}
VERSION_1 = {
    "proc/self/cgroup": "4:memory:/docker/1234\n3:cpu,cpuacct:/docker/1234\n1:name=systemd:/\n0::/\n",
    # As in a container, where the host's path does not exist.
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB // 2}\n",
    "sys/fs/cgroup/memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB // 4}\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize("files", [VERSION_2, VERSION_1], ids=["v2", "v1"])
def test_the_narrowest_group_limits_memory_and_cores(tmp_path: Path, files: dict[str, str]) -> None:
    root = write_files(tmp_path, files)
    assert machine.total_memory(root) == GIB
    assert machine.available_memory(root) == GIB - GIB // 4
    assert machine.cores(root) == 1
    assert machine.threads(1, root) == {"OMP_NUM_THREADS": "1"}


def test_the_throttling_threshold_limits_memory(tmp_path: Path) -> None:
    root = write_files(tmp_path, {**VERSION_2, "sys/fs/cgroup/pod/memory.high": f"{GIB // 2}\n"})
    assert machine.total_memory(root) == GIB // 2


def test_without_limits_memory_and_cores_are_the_machines(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "proc/self/cgroup": "2:memory:/a\n0::/../../b\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory.max": "max\n",
        },
    )
    assert machine.total_memory(root) == psutil.virtual_memory().total
    assert machine.cores(root) == min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    assert machine.threads(1, root) == {}
