"""Two hosts on one machine: network namespaces joined by a wire that can be slow, cut and mended. Needs root.

with Hosts() as hosts:
    hosts.popen(0, [sys.executable, "-m", "kd_accel", ...], env=os.environ)
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress

import warm_python

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
WIRE = "wire"  # the interface's name on both hosts


class Hosts:
    """Inside `with` there are two hosts; at its end everything that still runs on them is killed."""

    ADDRESSES = ("10.77.0.1", "10.77.0.2")

    def __init__(self, *, delay_s: float = 0):
        """The wire holds every packet back for `delay_s` seconds, each way."""
        self._delay_s = delay_s
        self._names = [f"kd{os.getpid()}-{host}" for host in (0, 1)]

    def __enter__(self) -> Hosts:
        for name in self._names:
            _ip("netns", "add", name)
        if self._delay_s:
            self._wire = SlowWire(self._names, self._delay_s)
        else:
            here, there = self._names
            _ip("link", "add", WIRE, "netns", here, "type", "veth", "peer", "name", WIRE, "netns", there)
        for name, address in zip(self._names, self.ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", WIRE)
            _ip("-n", name, "link", "set", "lo", "up")
        self.mend()
        return self

    def __exit__(self, *_) -> None:
        for host in (0, 1):
            self.kill(host)
        if self._delay_s:
            self._wire.close()
        for name in self._names:
            _ip("netns", "del", name)

    def popen(self, host: int, words: list[str], *, env: Mapping[str, str], **popen) -> subprocess.Popen:
        """Start a Python program on a host."""
        return warm_python.Popen(words, env={**env, warm_python.NETNS: self._names[host]}, **popen)

    def kill(self, host: int) -> None:
        """SIGKILL to everything on a host, as if its power were gone."""
        for pid in _ip("netns", "pids", self._names[host]).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self) -> None:
        """Nothing gets through any more, and nobody is told."""
        _ip("-n", self._names[1], "link", "set", WIRE, "down")

    def mend(self) -> None:
        for name in self._names:
            _ip("-n", name, "link", "set", WIRE, "up")


class SlowWire:
    """Two tun devices, and a thread that carries packets between them; not every kernel has tc's netem."""

    def __init__(self, names: list[str], delay_s: float):
        self._ends = [_tun(name) for name in names]
        self._loop = asyncio.new_event_loop()
        for here, there in (self._ends, self._ends[::-1]):
            self._loop.add_reader(here, self._carry, here, there, delay_s)
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def _carry(self, here: int, there: int, delay_s: float) -> None:
        self._loop.call_later(delay_s, self._deliver, there, os.read(here, 1 << 16))

    def _deliver(self, there: int, packet: bytes) -> None:
        with suppress(OSError):  # lost: that end is down
            os.write(there, packet)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for end in self._ends:
            os.close(end)


def _tun(namespace: str) -> int:
    """A tun device in a namespace; it lives as long as the file descriptor."""
    end = os.open("/dev/net/tun", os.O_RDWR)
    name = f"{namespace}-tun"[-15:]
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    _ip("link", "set", name, "netns", namespace, "name", WIRE)
    return end


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
