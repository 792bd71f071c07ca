"""Commands in a network namespace of their own, with loopback and no other interface.

Run as a script inside such a namespace, it brings loopback up, shows that nothing else is there,
and becomes the command of its arguments.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
WAYS = (("unshare", "--net"), ("unshare", "--map-root-user", "--net"))
"""As root, and as anybody where the kernel gives out user namespaces."""
SETTINGS = ("HF_", "TRANSFORMERS_", "MLFLOW_", "GLOO_", "MASTER_", "SLURM_")
"""Settings that could keep a library from the network are left out: none may be needed."""
ABSENT = "only loopback here; a connection fails with ENETUNREACH"
OUTSIDE = ("192.0.2.1", 443)
"""An address for documentation (RFC 5737), which no network has."""


def way() -> tuple[str, ...] | str:
    """How to get a namespace here, or why there is none to be had."""
    reasons = []
    for command in WAYS:
        try:
            done = subprocess.run([*command, "true"], capture_output=True, text=True)
        except FileNotFoundError:
            return "no `unshare` (Debian: util-linux)"
        if done.returncode == 0:
            return command
        reasons.append(done.stderr.strip())
    return "; ".join(reasons)


def run(
    command: list[str],
    *,
    cwd: Path,
    namespace: tuple[str, ...],
    attempts: Path,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdout and stderr in one text, Python's attempts to connect in `attempts`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    audit = {"PYTHONPATH": str(HERE / "audit"), "ATTEMPTS": str(attempts)}
    return subprocess.run(
        [*namespace, sys.executable, __file__, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1"} | audit | dict(env or {}),
    )


def loopback_up() -> None:
    """Set IFF_UP and IFF_RUNNING on `lo` (netdevice(7)), which a new namespace has down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, 0x8914, struct.pack("16sH14x", b"lo", 0x1 | 0x40))


def show_absence() -> None:
    """Say that no network is here; with another interface the process ends before it tries."""
    interfaces = [name for _, name in socket.if_nameindex()]
    if interfaces != ["lo"]:
        sys.exit(f"not a namespace without network: {interfaces}")
    with socket.socket() as probe:
        if (found := probe.connect_ex(OUTSIDE)) != errno.ENETUNREACH:
            sys.exit(f"connecting gave {errno.errorcode.get(found, found)}, not ENETUNREACH")
    print(ABSENT, flush=True)


if __name__ == "__main__":
    loopback_up()
    show_absence()
    os.execvp(sys.argv[1], sys.argv[1:])
