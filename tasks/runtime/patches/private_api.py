"""The private names of libraries that this program uses, for want of a public way, and what happens without them.

Each function names the version that it was written for, what it does when the name is gone, and what would make it
unnecessary. What is changed in libraries to save time or memory is in tasks/runtime/patches/.
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
# The number of rows that a weight's order is best for. Generating has as many texts; products of more gain as well.
REORDER_ROWS = 16


def ignore_settings_files() -> None:
    """Make classes of pydantic-settings, as Prefect's are, read no .env and no TOML file.

    Written for pydantic-settings 2.16.3. Unnecessary once Prefect can be told to leave the working directory's files
    alone: it reads them when it is imported, before anything can be configured.

    Raises:
        UserError: These methods are not what reads the files: those of a stranger's directory would be believed.
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
    # A source that reads its file in another way does not call the method. The device is no file: nothing is read here.
    with contextlib.suppress(Exception):
        DotEnvSettingsSource(BaseSettings, env_file=os.devnull)
    with contextlib.suppress(Exception):
        TomlConfigSettingsSource(BaseSettings, toml_file=os.devnull)
    for name, owner in owners.items():
        if name not in called_names:
            raise UserError(
                f"{_differs('pydantic-settings', '2.16.3', f'{owner.__name__}.{name}')}, without which the settings "
                "files of the working directory would be trusted: install pydantic-settings==2.16.3"
            )


def retry_refused_connections() -> None:
    """Make every Prefect client of this process retry a refused connection, PREFECT_CLIENT_MAX_RETRIES times.

    Prefect's client does so only once it has reached the server, so that a wrong address fails at once. A running flow
    has reached its server; but limits, blocks and artifacts each make a new client, and would end the run if they did
    so in the seconds of a restart.

    Written for Prefect 3.9.1. Unnecessary once a setting makes the first connection retry, too. Without the attribute,
    clients stay as they are, and a warning says what is lost.
    """
    from prefect.client.base import PrefectHttpxAsyncClient, PrefectHttpxSyncClient

    clients = PrefectHttpxAsyncClient, PrefectHttpxSyncClient
    for client in clients:
        # Instances have it. One that connects to nothing needs no certificates, which take time to load.
        if not hasattr(client(verify=False), "_has_connected"):
            warn(
                f"{_differs('prefect', '3.9.1', f'{client.__name__}._has_connected')}: "
                "a run may fail if the Prefect server restarts meanwhile"
            )
            return
    for client in clients:
        client._has_connected = property(lambda _: True, lambda *_: None)  # type: ignore[assignment]


def fake_tensor_mode() -> contextlib.AbstractContextManager[object] | None:
    """Return the mode in which tensors have a dtype, a device and a shape, but no data; None without it.

    Written for torch 2.15.0, whose documentation imports it from this module. Unnecessary once torch has a public name
    for it, or transformers runs on the meta device, for which its autocast fails. Without it, a warning says what is
    lost.
    """
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode

        return FakeTensorMode(allow_non_fake_inputs=True)
    except (ImportError, TypeError):
        warn(
            f"{_differs('torch', '2.15.0', 'torch._subclasses.fake_tensor.FakeTensorMode')}: "
            "a configuration with which the model cannot run is not found before a stage runs it"
        )
        return None


def reorder_weight(weight: "Tensor") -> "Callable[[Tensor], Tensor] | None":
    """Return the product of activations, [..., columns], with a bfloat16 weight, [rows, columns], on a CPU.

    oneDNN copies the weight into its own order once, not for every product. The results are the same to the bit.

    Written for torch 2.15.0, whose compiler uses these operators. Unnecessary once torch has a public way to keep
    weights in that order. None without the operators or for a processor without support for bfloat16.
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
    """Return the threads of ExecuTorch's pool, which does not heed the limits of this process.

    Written for executorch 1.5.1; without this name, the number of the machine's processors, which is its default.
    Unnecessary once the runners' statistics say it.
    """
    from executorch.extension.pybindings import portable_lib

    count = getattr(portable_lib, "_threadpool_get_thread_count", os.cpu_count)
    return int(count() or 1)


def require(package: str, version: str, owner: Any, *names: str) -> None:
    """Check names of a library that are about to be replaced: a new name in their place would be called by nobody.

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
    return f"{package} {importlib.metadata.version(package)} has no {name} like that of {package} {version}"


def warn(message: str) -> None:
    """Warn in this process's log and, from a stage's own process, in that of the run."""
    # Here, because every command line imports this module.
    from quantize_gemma.tasks.runtime.reporting import log

    logger.warning(message)
    log(message)
