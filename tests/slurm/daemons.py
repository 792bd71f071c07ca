"""Daemons of a box: each in a mount and host-name namespace of its own, found and ended by it.

In the namespace /etc/slurm holds the box's configuration and /etc/hosts its node names, so jobs
need no SLURM_CONF and nothing outside changes. The name of the mount on /etc/slurm says whose
process it is: a node's whole process tree is found, also after its daemon died, and never a
process whose number was merely used again. Times in seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MARK = "abf-box"
# The tmpfs is a folder of links: what changes in the box's etc/ is seen at once.
ENTER = """
set -e
mount -t tmpfs -o mode=755,size=64k "$1" /etc/slurm
ln -s "$2"/etc/* /etc/slurm/
mount --bind "$2/etc/hosts" /etc/hosts
echo "$3" > /proc/sys/kernel/hostname
shift 3
exec "$@"
"""


class BoxError(RuntimeError):
    """The cluster in a box did not do what it was asked; carries the last log lines."""


def start(root: Path, name: str, argv: list[str], *, hostname: str = "") -> subprocess.Popen[bytes]:
    """Start a daemon in the foreground of its own session, logging to log/`name`.out."""
    mark = f"{MARK}:{root}:{name}"
    shell = ["sh", "-c", ENTER, "sh", mark, str(root), hostname or socket.gethostname()]
    with (root / "log" / f"{name}.out").open("wb") as out:
        return subprocess.Popen(
            ["unshare", "--mount", "--uts", "--propagation", "private", *shell, *argv],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            # What the session exports for its own jobs must not reach daemons or prolong a lock.
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            start_new_session=True,
            cwd="/",
        )


def processes(root: Path) -> Iterator[tuple[int, str]]:
    """Process ids in the namespaces of this box, each with the name of its daemon."""
    mine = os.readlink("/proc/self/ns/mnt")
    start_of_mark = f" - tmpfs {MARK}:{root}:"
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.readlink(entry / "ns" / "mnt") == mine:
                continue
            mounts = (entry / "mountinfo").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError, OSError):
            continue  # ended in the meantime
        _, found, rest = mounts.partition(start_of_mark)
        if found:
            yield int(entry.name), rest.split()[0]


def stop(root: Path, names: set[str] | None = None, *, grace: float = 10.0) -> None:
    """End all processes of these daemons (None: of the whole box): SIGTERM, then SIGKILL.

    `grace` 0 is a power cut.
    """

    def signal_all(number: int) -> bool:
        found = [pid for pid, name in processes(root) if names is None or name in names]
        for pid in found:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        return bool(found)

    until = time.monotonic() + grace
    pending = grace > 0 and signal_all(signal.SIGTERM)
    while pending and time.monotonic() < until:
        time.sleep(0.05)
        pending = any(names is None or name in names for _, name in processes(root))
    wait_for(f"end of {names or 'the box'}", lambda: not signal_all(signal.SIGKILL), seconds=20)


def wait_for(
    what: str,
    condition: Callable[[], bool],
    *,
    seconds: float = 60.0,
    every: float = 0.1,
    log: Path | None = None,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Wait for a condition; BoxError with the end of `log` when late or when `process` has died."""
    until = time.monotonic() + seconds
    while not condition():
        died = process is not None and process.poll() is not None
        if died or time.monotonic() > until:
            how = f"process exited {process.returncode}" if died and process else f"{seconds:g} s"
            raise BoxError(f"waiting for {what}: {how}{_tail(log)}")
        time.sleep(every)


def answers(port: int) -> bool:
    """Whether something listens on this port of the loopback address."""
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


def _tail(log: Path | None, lines: int = 15) -> str:
    if log is None or not log.exists():
        return ""
    return f"\n--- {log}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
