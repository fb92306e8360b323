"""What happens when a library loses a private name that quantize-gemma uses; the tests really remove the names."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from quantize_gemma.flows import cli
from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.models.load_check import check_directory
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.runtime.patches.private_api import ignore_settings_files, retry_refused_connections

ROOT = Path(__file__).parents[3]
STRANGERS = "http://127.0.0.1:9/api"
# Import Prefect, and print the API that it would use and the settings files that it opened.
IMPORT_PREFECT = """
import sys
opened = set()
def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith((".env", "prefect.toml", "pyproject.toml")):
        opened.add(str(arguments[0]))
sys.addaudithook(watch)
if sys.argv[1] == "ignored":
    from quantize_gemma.flows.settings import ignore_working_directory
    ignore_working_directory()
from prefect.settings import PREFECT_API_URL
print(PREFECT_API_URL.value(), *sorted(opened))
"""


@pytest.fixture
def settings_sources(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Restore pydantic-settings' methods after the test."""
    from pydantic_settings import DotEnvSettingsSource
    from pydantic_settings.sources import ConfigFileSourceMixin

    monkeypatch.setattr(DotEnvSettingsSource, "_read_env_files", DotEnvSettingsSource._read_env_files)
    monkeypatch.setattr(ConfigFileSourceMixin, "_read_files", ConfigFileSourceMixin._read_files)
    return monkeypatch


def rename_read_env_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydantic_settings import DotEnvSettingsSource

    read = DotEnvSettingsSource._read_env_files
    monkeypatch.delattr(DotEnvSettingsSource, "_read_env_files")
    monkeypatch.setattr(DotEnvSettingsSource, "_load_env_vars", read)


def rename_read_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydantic_settings import TomlConfigSettingsSource
    from pydantic_settings.sources import ConfigFileSourceMixin

    read = ConfigFileSourceMixin._read_files
    monkeypatch.delattr(ConfigFileSourceMixin, "_read_files")
    monkeypatch.setattr(TomlConfigSettingsSource, "_read_files", read, raising=False)


def import_prefect(directory: Path, how: str) -> str:
    (directory / ".env").write_text(f"PREFECT_API_URL={STRANGERS}\n")
    (directory / "prefect.toml").write_text(f'[api]\nurl = "{STRANGERS}"\n')
    (directory / "pyproject.toml").write_text(f'[tool.prefect.api]\nurl = "{STRANGERS}"\n')
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(directory / "home")}
    command = [sys.executable, "-P", "-c", IMPORT_PREFECT, how]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_prefect_opens_no_settings_file_of_the_working_directory(tmp_path: Path) -> None:
    assert import_prefect(tmp_path, "ignored") == "None"


def test_prefect_reads_the_settings_files_that_are_not_ignored(tmp_path: Path) -> None:
    """If this test fails, ignore_settings_files can be removed."""
    assert import_prefect(tmp_path, "trusted") == f"{STRANGERS} .env prefect.toml pyproject.toml"


@pytest.mark.parametrize("rename", [rename_read_env_files, rename_read_files])
def test_settings_files_that_cannot_be_ignored_are_an_error(rename: Any, settings_sources: pytest.MonkeyPatch) -> None:
    rename(settings_sources)
    name = rename.__name__.removeprefix("rename")
    message = rf"\w+\.{name} of pydantic-settings \S+ is missing, or differs .* could not be ignored"
    with pytest.raises(UserError, match=message):
        ignore_settings_files()


def test_a_command_is_rejected_if_settings_files_cannot_be_ignored(
    settings_sources: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rename_read_files(settings_sources)
    settings_sources.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    settings_sources.setenv("QUANTIZE_GEMMA_HOME", str(tmp_path / "store"))
    settings_sources.setattr(sys, "argv", ["quantize-gemma", "prune"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert "install pydantic-settings==" in printed.err


@pytest.mark.parametrize("name", ["PrefectHttpxAsyncClient", "PrefectHttpxSyncClient"])
def test_clients_that_cannot_be_patched_are_left_unchanged_with_a_warning(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect.client import base

    client = getattr(base, name)
    # Prefect's own constructor sets the attribute.
    monkeypatch.setattr(client, "__init__", httpx.Client.__init__ if "Sync" in name else httpx.AsyncClient.__init__)
    retry_refused_connections()
    assert len(caplog.messages) == 1
    assert f"{name}._has_connected of prefect" in caplog.text
    assert "may fail if the Prefect server restarts" in caplog.text
    for each in (base.PrefectHttpxAsyncClient, base.PrefectHttpxSyncClient):
        assert "_has_connected" not in vars(each)


def check_without_fake_tensors(checkpoint: str, change: str) -> dict[str, Any]:
    """Check a model directory in a process whose torch lacks FakeTensorMode, or has one with other parameters."""
    # torch itself imports this from there on first use.
    import torch._dynamo.device_interface  # noqa: F401
    from torch._subclasses import fake_tensor

    if change == "removed":
        del fake_tensor.FakeTensorMode
    else:
        fake_tensor.FakeTensorMode.__init__ = lambda self: None  # type: ignore[method-assign]
    return check_directory(checkpoint)


@pytest.mark.parametrize("change", ["removed", "other parameters"])
def test_a_model_is_checked_without_fake_tensors_with_a_warning(
    change: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    caplog.set_level(logging.INFO)
    arguments = {"checkpoint": str(BUILTIN["tiny-gemma3"]), "change": change}
    function = f"{__name__}:{check_without_fake_tensors.__name__}"
    worker.run(function, arguments, lambda *_: None, logging.getLogger(__name__))
    assert len(caplog.messages) == 1
    assert "torch._subclasses.fake_tensor.FakeTensorMode of torch" in caplog.text


@pytest.mark.parametrize(
    "name", ["replace_with_et_custom_kv_cache", "sdpa_mask_passthrough", "get_custom_sdpa_for_ring_kv_cache"]
)
def test_the_cache_is_not_exported_if_a_private_name_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum.executorch.attentions import custom_kv_cache
    from optimum.exporters.executorch import integrations

    from quantize_gemma.tasks.models.kv_cache import own_kv_cache

    owner = custom_kv_cache if name.startswith("replace") else integrations
    monkeypatch.delattr(owner, name)
    match = rf"\S+\.{name} of optimum-executorch \S+ is missing, .*: install optimum-executorch=="
    with pytest.raises(UserError, match=match), own_kv_cache(128, "float32"):
        pass
