"""The tests pass however they are started."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARE_DEFAULTS = """
import signal
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGHUP) is signal.SIG_DFL)
"""


def test_processes_that_tests_start_have_the_default_signal_handlers() -> None:
    result = subprocess.run([sys.executable, "-c", ARE_DEFAULTS], capture_output=True, text=True)
    assert result.stdout.split() == ["True", "True"]


def test_they_also_have_them_under_nohup_in_the_background() -> None:
    test = f"{Path(__file__)}::{test_processes_that_tests_start_have_the_default_signal_handlers.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    ignoring = ["sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh", *command]
    result = subprocess.run(ignoring, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout
