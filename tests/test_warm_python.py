"""Programs that start with their imports done are otherwise as if they had been started by subprocess.Popen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import warm_python
from conftest import _run_ranks

pytestmark = pytest.mark.distributed

KINDS = {"cold": subprocess.Popen, "warm": warm_python.Popen}
SAYS = """
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ["COLOR"], sorted(os.listdir("/proc/self/fd"))[:4])
print(sys.stdin.readline().strip(), file=sys.stderr)
sys.exit({code})
"""


def start(code: str, *words: str, kind: str = "warm", **how) -> subprocess.Popen:
    return KINDS[kind]([sys.executable, "-c", code, *words], text=True, **how)


@pytest.mark.parametrize("code", ["0", "3", "'a reason'", "None"])
def test_both_say_and_end_alike(code, tmp_path):
    """Arguments, folder, environment, pipes, exit code; nothing of the parent's is open."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    found = []
    for kind in KINDS:
        env = {**os.environ, "COLOR": "blue"}
        process = start(SAYS.format(code=code), "a", "b c", kind=kind, cwd=tmp_path, env=env, **pipes)
        found.append((*process.communicate("a line\n", timeout=300), process.returncode))
    assert found[0] == found[1]
    assert "['a', 'b c']" in found[0][0]


def test_its_imports_are_done():
    with start("import sys; print('deepspeed' in sys.modules)", stdout=subprocess.PIPE) as process:
        assert process.communicate(timeout=300)[0] == "True\n"


def test_errors_and_signals_are_its_own():
    with start("raise KeyError('lost')", stderr=subprocess.PIPE) as process:
        assert "KeyError: 'lost'" in process.communicate(timeout=300)[1]
        assert process.returncode == 1
    with start("import time; print('here', flush=True); time.sleep(600)", stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "here\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.kill()
        assert process.wait(300) == -signal.SIGKILL


def test_what_libraries_read_when_they_are_imported_is_read():
    """HF_HOME among them: such a program imports for itself."""
    code = "import huggingface_hub.constants as c; print(c.HF_HOME)"
    with start(code, env={**os.environ, "HF_HOME": "/elsewhere"}, stdout=subprocess.PIPE) as process:
        assert process.communicate(timeout=300)[0] == "/elsewhere\n"


def test_ranks_are_children_of_their_launcher(tmp_path):
    """In sessions of their own, as torchrun starts them."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, psutil\n"
        "launcher = psutil.Process().parent()\n"
        "print(os.environ['RANK'], launcher.parent() is not None, os.getsid(0) == os.getpid(),"
        " 'deepspeed' in sys.modules, flush=True)\n"
    )
    lines = _run_ranks(script).splitlines()
    assert {"0 True True True", "1 True True True"} <= set(lines)
