"""Private names of libraries that quantize-gemma uses because there is no public API, and what happens without them.

Each docstring names the version that the function was written for, what it does if the private name is missing, and
what would make it unnecessary. Changes to libraries that save time or memory are in the other modules of this package.
"""

import contextlib
import importlib.metadata
import logging
import os
from typing import TYPE_CHECKING, Any

from quantize_gemma.tasks.runtime.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

logger = logging.getLogger(__name__)
# The number of rows for which oneDNN optimizes a weight's layout: that of text generation. Larger products gain, too.
REORDER_ROWS = 16


def ignore_settings_files() -> None:
    """Prevent pydantic-settings, which Prefect uses, from reading .env and TOML files.

    Written for pydantic-settings 2.16.3. Unnecessary once Prefect has a setting to ignore the files of the working
    directory: it reads them when it is imported, before anything can be configured.

    Raises:
        UserError: The files are read by other methods, so the settings of an untrusted directory would be used.
    """
    from pydantic_settings import BaseSettings, DotEnvSettingsSource, TomlConfigSettingsSource
    from pydantic_settings.sources import ConfigFileSourceMixin

    owners = {"_read_env_files": DotEnvSettingsSource, "_read_files": ConfigFileSourceMixin}
    called_names: set[str] = set()

    def replace(owner: object, name: str) -> None:
        def read_nothing(*_: object, **__: object) -> dict[str, object]:
            called_names.add(name)
            return {}

        setattr(owner, name, read_nothing)

    for name, owner in owners.items():
        replace(owner, name)
    # If a source does not call the replaced method, it reads its file in another way. /dev/null is not a regular file,
    # so nothing is read here.
    with contextlib.suppress(Exception):
        DotEnvSettingsSource(BaseSettings, env_file=os.devnull)
    with contextlib.suppress(Exception):
        TomlConfigSettingsSource(BaseSettings, toml_file=os.devnull)
    for name, owner in owners.items():
        if name not in called_names:
            raise UserError(
                f"{_differs('pydantic-settings', '2.16.3', f'{owner.__name__}.{name}')}, so settings files in the "
                "working directory could not be ignored: install pydantic-settings==2.16.3"
            )


def retry_refused_connections() -> None:
    """Make every Prefect client of this process retry a refused connection, PREFECT_CLIENT_MAX_RETRIES times.

    Prefect's client retries only after it has reached the server once, so that a wrong address fails immediately. A
    running flow has reached its server; but limits, blocks, and artifacts each create a new client, which would make
    the run fail if the server is restarting at that moment.

    Written for Prefect 3.9.1. Unnecessary once a setting makes the first connection retry, too. Without the attribute,
    clients are not changed, and a warning says what is lost.
    """
    from prefect.client.base import PrefectHttpxAsyncClient, PrefectHttpxSyncClient

    clients = PrefectHttpxAsyncClient, PrefectHttpxSyncClient
    for client in clients:
        # Instances have it. One that connects to nothing needs no certificates, which take time to load.
        if not hasattr(client(verify=False), "_has_connected"):
            warn(
                f"{_differs('prefect', '3.9.1', f'{client.__name__}._has_connected')}: "
                "a run may fail if the Prefect server restarts"
            )
            return
    for client in clients:
        client._has_connected = property(lambda _: True, lambda *_: None)  # type: ignore[assignment]


def fake_tensor_mode() -> contextlib.AbstractContextManager[object] | None:
    """Return the mode in which tensors have a dtype, a device, and a shape, but no data; None if it is missing.

    Written for torch 2.15.0, whose documentation imports it from this module. Unnecessary once torch has a public name
    for it, or transformers runs on the meta device, on which its autocast fails. If it is missing, a warning says what
    is lost.
    """
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode

        return FakeTensorMode(allow_non_fake_inputs=True)
    except (ImportError, TypeError):
        warn(
            f"{_differs('torch', '2.15.0', 'torch._subclasses.fake_tensor.FakeTensorMode')}: "
            "a configuration with which the model cannot run is detected only when a stage runs the model"
        )
        return None


def reorder_weight(weight: "Tensor") -> "Callable[[Tensor], Tensor] | None":
    """Return the product of activations, [..., columns], with a bfloat16 weight, [rows, columns], on a CPU.

    oneDNN packs the weight into its own layout once, not for every product. The results are bit-identical.

    Written for torch 2.15.0, whose compiler uses these operators. Unnecessary once torch has a public API to keep
    weights in that layout. Returns None without the operators, or on a CPU that does not support bfloat16.
    """
    import torch

    operators = torch.ops.mkldnn
    try:
        if not operators._is_mkldnn_bf16_supported():
            return None
        reordered_weight = operators._reorder_linear_weight(weight, REORDER_ROWS)
        multiply = operators._linear_pointwise
    except (AttributeError, RuntimeError):
        warn(f"{_differs('torch', '2.15.0', 'ops.mkldnn._reorder_linear_weight')}: generating text takes longer")
        return None
    return lambda activations: multiply(activations, reordered_weight, None, "none", [], "")


def thread_count() -> int:
    """Return the number of threads in ExecuTorch's pool, which ignores the CPU limits of this process.

    Written for executorch 1.5.1. Without this name, return the pool's default, the number of the machine's processors.
    Unnecessary once the runners' statistics contain it.
    """
    from executorch.extension.pybindings import portable_lib

    count = getattr(portable_lib, "_threadpool_get_thread_count", os.cpu_count)
    return int(count() or 1)


def require(package: str, version: str, owner: Any, *names: str) -> None:
    """Check that a library has the names that are about to be replaced; nothing would call the replacement otherwise.

    Args:
        package: The library's distribution.
        version: The version that the replacements are written for.
        owner: The module or class that has the names.
        names: The names.

    Raises:
        UserError: The owner lacks one of the names.
    """
    for name in names:
        if not hasattr(owner, name):
            full_name = f"{owner.__name__}.{name}"
            raise UserError(f"{_differs(package, version, full_name)}: install {package}=={version}")


def _differs(package: str, version: str, name: str) -> str:
    installed_version = importlib.metadata.version(package)
    return f"{name} of {package} {installed_version} is missing, or differs from that of {package} {version}"


def warn(message: str) -> None:
    """Log a warning in this process and, from a worker process, in the run."""
    # Imported here because every command imports this module.
    from quantize_gemma.tasks.runtime.reporting import log

    logger.warning(message)
    log(message)
