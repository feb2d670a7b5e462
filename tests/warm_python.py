"""A Popen whose Python programs have done their imports: they are forked from a process that has torch and the rest.

Imports take ten seconds of a core in every rank, more than a test's steps, and the tests start hundreds of ranks.

with Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "kd_accel", "train", ...]) as p:
    p.wait()

Everything else is subprocess.Popen's: pipes, signals, exit codes, the process tree, a launcher's ranks as its children.
Programs that are started differently (another executable, variables that libraries read when they are imported) are
started as ever. What start-up itself does is tested with subprocess.Popen: test_startup.py, test_cli.py, the demo.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import inspect
import io
import json
import multiprocessing.util
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

IMPORTED = (
    "accelerate.commands.accelerate_cli",
    "accelerate.utils.deepspeed",
    "deepspeed.runtime.engine",
    "kd_accel.train",
    "kd_accel.verbs",
    "torch._dynamo",
    "torch.distributed.run",
)
READ_AT_IMPORT = re.compile(r"(HF|TRANSFORMERS|OMP|TORCHINDUCTOR)_|TORCH_LOGS|LD_|PYTHON(?!PATH|UNBUFFERED)")
LAUNCHERS = ("torch.distributed.run", "accelerate.commands")
NETNS = "KD_ACCEL_NETNS"  # variable of the network namespace that a program starts in, as `ip netns add` names it
CLONE_NEWNET = 0x40000000  # linux/sched.h
MESSAGE = 1 << 20  # bytes that a program's arguments and environment may take
_cold = subprocess.Popen._execute_child


class Popen(subprocess.Popen):
    _status = -1  # a pipe on which its parent says how it ended

    def _execute_child(self, *given) -> None:
        how = _arguments(given)
        if not _can_fork(how):
            assert NETNS not in (how["env"] or {}), f"{how['args']} cannot start in a network namespace"
            _cold(self, *given)
            return
        self._status, status = os.pipe()
        wanted = {name: how[name] for name in ("args", "start_new_session")}
        wanted |= {"cwd": os.fspath(how["cwd"] or os.getcwd()), "env": dict(how["env"] or os.environ)}
        streams = [theirs if theirs != -1 else ours for ours, theirs in enumerate(_streams(how))]
        socket.send_fds(_server(), [json.dumps(wanted).encode()], [*streams, status])
        os.close(status)
        self.pid = int.from_bytes(os.read(self._status, 4), "big")
        self._child_created = True
        _close_ends(self, how)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._status == -1:
            return super()._try_wait(wait_flags)
        if not select.select([self._status], [], [], 0 if wait_flags else None)[0]:
            return 0, 0
        status = int.from_bytes(os.read(self._status, 4), "big")
        os.close(self._status)
        return self.pid, status

    def _internal_poll(self, *given, **others) -> int | None:
        if self._status == -1:
            return super()._internal_poll(*given, **others)
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


def _arguments(given: tuple) -> dict:
    """What Popen hands to _execute_child, by name."""
    return inspect.signature(_cold).bind(None, *given).arguments


def _streams(how: dict) -> tuple[int, int, int]:
    return how["p2cread"], how["c2pwrite"], how["errwrite"]


def _can_fork(how: dict) -> bool:
    words, theirs = how["args"], how["env"] or os.environ
    if not isinstance(words, Sequence) or isinstance(words, str) or words[0] != sys.executable:
        return False
    if sys.platform != "linux" or how["preexec_fn"] or how["pass_fds"] or how["shell"] or len(words) < 2:
        return False
    how["args"] = words = [os.fspath(word) for word in words]
    known = words[1] in ("-m", "-c", "-u") or not words[1].startswith("-")
    return known and _read_at_import(theirs) == _read_at_import({**os.environ, "OMP_NUM_THREADS": "1"})


def _read_at_import(environment) -> dict[str, str]:
    return {name: value for name, value in environment.items() if READ_AT_IMPORT.match(name)}


def _close_ends(popen: subprocess.Popen, how: dict) -> None:
    """The child's ends of the pipes, in this process."""
    ours = how["p2cwrite"], how["c2pread"], how["errread"]
    null = getattr(popen, "_devnull", None)
    ends = {theirs for theirs, mine in zip(_streams(how), ours, strict=True) if theirs != -1 and mine != -1}
    for end in (ends - {null}) | ({null} - {None}):
        os.close(end)
    popen._closed_child_pipe_fds = True


@functools.cache
def _server() -> socket.socket:
    """The connection to the process that all others are forked from; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE)
    tests = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(tests.parent), str(tests), os.environ.get("PYTHONPATH")]))
    subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()
    return ours


def _serve(connection: socket.socket) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for the programs
    while True:
        message, fds, *_ = socket.recv_fds(connection, MESSAGE, 4)
        if not message:
            return
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            *streams, status = fds
            os.set_inheritable(status, False)
            pid = _fork(**json.loads(message), streams=streams)
            os.write(status, pid.to_bytes(4, "big"))
            for stream in streams:  # a pipe is at its end when the program is
                os.close(stream)
            os.write(status, os.waitpid(pid, 0)[1].to_bytes(4, "big"))
            os._exit(0)
        for fd in fds:
            os.close(fd)


def _fork(args: list[str], cwd: str, env: dict[str, str], start_new_session: bool, streams: Sequence[int]) -> int:
    """Start a program in a fork of this process; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        if start_new_session:
            os.setsid()
        _take(streams)
        _forget_parent()
        os.chdir(cwd)
        before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ.clear()
        os.environ.update(env)
        if NETNS in env:
            _enter(os.environ.pop(NETNS))
        after = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:] = [*filter(None, after), *(entry for entry in sys.path[1:] if entry not in before)]
        code = _run(args[1:])
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _take(streams: Sequence[int]) -> None:
    """Make them stdin, stdout and stderr, and close everything else."""
    copies = [os.dup(stream) for stream in streams]
    while min(copies) < 3:
        copies = [os.dup(copy) for copy in copies]
    for own, copy in enumerate(copies):
        os.dup2(copy, own)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def _forget_parent() -> None:
    """What a new program does not have: handlers of signals, things to clean up, launchers' ways to start others."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    weakref.finalize._registry.clear()
    multiprocessing.util._finalizer_registry.clear()
    subprocess.Popen._execute_child = _cold


def _enter(namespace: str) -> None:
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)


def _fork_child(popen: subprocess.Popen, *given) -> None:
    """Popen._execute_child of a launcher: its ranks are forks too."""
    how = _arguments(given)
    if not _can_fork(how):
        _cold(popen, *given)
        return
    streams = [theirs if theirs != -1 else ours for ours, theirs in enumerate(_streams(how))]
    env, cwd = dict(how["env"] or os.environ), os.fspath(how["cwd"] or os.getcwd())
    popen.pid = _fork(how["args"], cwd, env, how["start_new_session"], streams)
    popen._child_created = True
    _close_ends(popen, how)


def _run(words: list[str]) -> int:
    """Run `python WORDS` in this process; its exit code."""
    if words[0] == "-u":
        words = words[1:]
        sys.stdout = io.TextIOWrapper(open(1, "wb", buffering=0, closefd=False), write_through=True)
    if any(name in word for name in LAUNCHERS for word in words):
        subprocess.Popen._execute_child = _fork_child
    warnings.filterwarnings("ignore", ".*found in sys.modules.*", RuntimeWarning)  # runpy, of what is imported
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path.insert(0, "")
            sys.modules["__main__"] = program = types.ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), program.__dict__)
        elif words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
