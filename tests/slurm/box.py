"""A real Slurm on one machine, shaped like a corner of Leonardo Booster; state beneath one folder.

    python -m tests.slurm.box up|down|status|env [--root DIR]

Four nodes lrdn000[1-4] (32 cores, 4 GPU stand-ins, 494000 MB) and serial01, on loopback only.
Needs root and the packages of envs/slurm-packages.txt (tests/slurm/install.sh). Memory is not
confined, energy not counted; GPUs are copies of /dev/null. Times in seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from string import Template

from tests.slurm.daemons import BoxError, answers, processes, start, stop, wait_for

TEMPLATES = Path(__file__).parent / "etc"
PACKAGES = Path(__file__).parents[2] / "envs" / "slurm-packages.txt"
NODES = ("lrdn0001", "lrdn0002", "lrdn0003", "lrdn0004", "serial01")
SYSTEM_TABLES = Path("/usr/share/mysql")
SYSTEM_SQL = ("mysql_system_tables.sql", "mysql_system_tables_data.sql")
FOLDERS = ("etc", "log", "run", "state", "spool", "dev", "mysql", "small")
SMALL_BYTES = 32 << 20
DEFAULT_ROOT = Path(tempfile.gettempdir()) / "abf-slurm-box"


class Box:
    """One cluster; another `Box` on the same folder is the same cluster."""

    user = "root"
    account = "euhpc_test"

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    # --- what it takes ---------------------------------------------------------------------
    @staticmethod
    def install_needed() -> str | None:
        """The Debian packages that are missing, or None."""
        lines = (line.split("#")[0].strip() for line in PACKAGES.read_text().splitlines())
        wanted = [line for line in lines if line]
        query = ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\\n", *wanted]
        if not shutil.which("dpkg-query"):
            return " ".join(wanted)
        # exit status 1 where one is unknown
        known = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        return " ".join(name for name in wanted if f"{name} installed" not in known) or None

    @classmethod
    def unavailable(cls) -> str | None:
        """Why there can be no cluster on this machine, and what to do; None where there can."""
        if os.geteuid() != 0:
            return "not root (daemons, device files and mounts need it)"
        if missing := cls.install_needed():
            return f"packages missing: {missing}; run tests/slurm/install.sh"
        with tempfile.TemporaryDirectory() as folder:
            try:
                os.mknod(f"{folder}/node", stat.S_IFCHR | 0o666, os.makedev(1, 3))
                Path(f"{folder}/node").write_text("x")
            except OSError as error:
                return f"no device files can be made in {folder}: {error.strerror}"
        probe = ["unshare", "--mount", "--uts", "mount", "-t", "tmpfs", "probe", "/etc/slurm"]
        done = subprocess.run(probe, capture_output=True, text=True)
        return f"no mounts in a namespace: {done.stderr.strip()}" if done.returncode else None

    # --- up and down -----------------------------------------------------------------------
    def up(self) -> None:
        """Start, on ports that are free now; a folder used before keeps its jobs and accounting."""
        if reason := self.unavailable():
            raise BoxError(reason)
        if next(processes(self.root), None):
            raise BoxError(f"{self.root}: this box is up; `down` first")
        if len(str(self.root)) > 80:
            raise BoxError(f"{self.root}: too long for the name of a Unix socket; take another")
        try:
            self._write_files()
            self._mount_small()
            self._start_munged()
            self._start_mariadbd()
            self.start_accounting()
            self._start_controller()
            self._write_accounting()
            for name in NODES:
                self._start_node(name)
            self._wait_idle(*NODES)
        except BaseException:
            stop(self.root, grace=0)
            raise

    def down(self) -> None:
        """End every process of the box, jobs included; the folder stays."""
        # Jobs need no grace: the controller learns of their end when the box comes up again.
        stop(self.root, set(NODES), grace=0)
        stop(self.root, {"slurmctld"})  # before the accounting, which it sends its last records
        stop(self.root, {"slurmdbd"})
        stop(self.root)
        self._reap()

    # --- use -------------------------------------------------------------------------------
    @property
    def env(self) -> dict[str, str]:
        """The environment of clients; inside jobs nothing is needed."""
        return os.environ | {"SLURM_CONF": str(self.root / "etc" / "slurm.conf")}

    def run(
        self, *argv: str, check: bool = True, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a client command; its stderr is in the error."""
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, cwd=cwd)
        if check and done.returncode:
            raise BoxError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}")
        return done

    # --- faults ----------------------------------------------------------------------------
    def kill_node(self, name: str) -> None:
        """Power cut: the daemon and every process of every job on the node are gone at once."""
        assert name in NODES, name
        stop(self.root, {name}, grace=0)
        self._reap()

    def start_node(self, name: str) -> None:
        """Bring a killed node back and wait until jobs may run on it.

        Slurm fails its jobs only once it has found it dead (half a minute): wait for that first.
        """
        self._start_node(name)
        self._wait_idle(name)

    @property
    def small(self) -> Path:
        """A file system that is soon full, seen by tests and jobs alike."""
        return self.root / "small"

    def restart_controller(self) -> None:
        """Stop slurmctld and start it again from its saved state."""
        stop(self.root, {"slurmctld"})
        self._start_controller()

    def stop_accounting(self) -> None:
        """Stop slurmdbd: sacct fails, the controller keeps its records."""
        stop(self.root, {"slurmdbd"})

    def start_accounting(self) -> None:
        """Start slurmdbd and wait until it answers; the controller reconnects by itself."""
        self._start("slurmdbd", "slurmdbd", "-D")
        self._wait_port("slurmdbd")

    # --- inside ----------------------------------------------------------------------------
    def _write_files(self) -> None:
        for name in (*FOLDERS, "run/munge"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        values = {"root": str(self.root), "user": self.user}
        values |= {f"port_{name}": str(port) for name, port in _free_ports().items()}
        for template in TEMPLATES.iterdir():
            target = self.root / "etc" / template.name
            target.touch(mode=0o600)  # slurmdbd.conf holds a password, and the daemon insists
            target.write_text(Template(template.read_text()).substitute(values))
        names = "".join(f"127.0.0.1 {name}\n" for name in NODES)
        (self.root / "etc" / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        for index in range(4):
            device = self.root / "dev" / f"nvidia{index}"
            if not device.exists():
                os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))

    def _mount_small(self) -> None:
        # Before the daemons, which have mounts of their own: jobs have to see it.
        if not os.path.ismount(self.small):
            command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "abf-small", self.small]
            subprocess.run(command, check=True)

    def _start_munged(self) -> None:
        key, run = self.root / "etc" / "munge.key", self.root / "run" / "munge"
        if not key.exists():
            key.touch(mode=0o400)
            key.write_bytes(os.urandom(128))
        options = {"socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={run / name}" for option, name in options.items()]
        # --force: /tmp may belong to someone else, and an old socket may lie there
        munged = ["munged", "--foreground", "--force", f"--key-file={key}", *options]
        process = self._start("munged", *munged)
        wait_for(
            "munged", (run / "socket").is_socket, log=self.root / "log/munged.out", process=process
        )

    def _start_mariadbd(self) -> None:
        defaults = f"--defaults-file={self.root / 'etc' / 'my.cnf'}"
        if not (self.root / "mysql" / "mysql").exists():
            # What mariadb-install-db does, less help and sys tables; it wants more packages.
            head = "create database mysql;\nuse mysql;\nset @auth_root_socket=NULL;\n"
            sql = [(SYSTEM_TABLES / name).read_text() for name in SYSTEM_SQL]
            bootstrap = ["mariadbd", defaults, "--bootstrap", "--init-file=", "--skip-networking"]
            done = subprocess.run(
                bootstrap, input=head + "".join(sql), capture_output=True, text=True
            )
            if done.returncode:
                raise BoxError(f"mariadbd --bootstrap: {done.stderr[-2000:]}")
        self._start("mariadbd", "mariadbd", defaults)
        self._wait_port("mariadbd")

    def _write_accounting(self) -> None:
        written = self.root / "state" / "accounting-written"
        if written.exists():
            return
        lines = (self.root / "etc" / "accounting").read_text().splitlines()
        text = "\n".join(line for line in lines if not line.startswith("#"))
        done = subprocess.run(
            ["sacctmgr", "-i"], input=text, env=self.env, capture_output=True, text=True
        )
        # A session goes on after an error, and exits 0.
        if done.returncode or "error" in done.stderr:
            raise BoxError(f"sacctmgr: {done.stdout}{done.stderr}")
        written.touch()

    def _start_controller(self) -> None:
        self._start("slurmctld", "slurmctld", "-D")
        self._wait_port("slurmctld")

    def _start_node(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-N", name, hostname=name)

    def _start(self, name: str, *argv: str, hostname: str = "") -> subprocess.Popen[bytes]:
        self._reap()
        self._children[name] = start(self.root, name, list(argv), hostname=hostname)
        return self._children[name]

    def _wait_port(self, name: str) -> None:
        text = (self.root / "etc" / "ports").read_text()
        port = next(int(line.split()[1]) for line in text.splitlines() if line.split()[0] == name)
        log = self.root / "log" / f"{name}.out"
        wait_for(name, lambda: answers(port), log=log, process=self._children[name])

    def _wait_idle(self, *names: str) -> None:
        def idle() -> bool:
            show = ("sinfo", "--noheader", "--Node", "--format=%T", f"--nodes={','.join(names)}")
            states = self.run(*show, check=False).stdout.split()
            return bool(states) and all(s in ("idle", "mixed", "allocated") for s in states)

        log = self.root / "log" / f"{names[0]}.out"
        wait_for(f"{' '.join(names)} idle", idle, log=log, process=self._children[names[0]])

    def _reap(self) -> None:
        self._children = {n: child for n, child in self._children.items() if child.poll() is None}


def _free_ports() -> dict[str, int]:
    """A free loopback port for each daemon, below the range from which the kernel takes its own."""
    names = ["mariadbd", "slurmdbd", "slurmctld", *NODES]
    ports: dict[str, int] = {}
    for port in random.SystemRandom().sample(range(10000, 30000), 2000):
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports[names[len(ports)]] = port
        if len(ports) == len(names):
            return ports
    raise BoxError("no free port between 10000 and 30000")


def remove(root: Path) -> None:
    """Kill every process of a box and delete what it wrote; other files in the folder stay."""
    stop(root.absolute(), grace=0)
    if os.path.ismount(root / "small"):
        subprocess.run(["umount", "--lazy", root / "small"], check=True)
    for name in FOLDERS:
        shutil.rmtree(root / name, ignore_errors=not (root / name).exists())
    with contextlib.suppress(OSError):  # not empty: something here is not ours
        root.rmdir()


def main() -> int:
    """`up`, `down`, `status` and `env` for people."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.box", description=__doc__)
    parser.add_argument("action", choices=["up", "down", "status", "env"])
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help=f"default {DEFAULT_ROOT}")
    args = parser.parse_args()
    box = Box(args.root)
    alive = any(processes(box.root))
    match args.action:
        case "up" if not alive:
            began = time.monotonic()
            box.up()
            print(f"box: up in {time.monotonic() - began:.1f} s, account {box.account}, {box.root}")
            print(f"use: eval $({sys.executable} -m tests.slurm.box env --root {box.root})")
            print("     sinfo; sbatch --partition boost_usr_prod --wrap hostname; sacct")
        case "down" if alive or (box.root / "etc" / "accounting").exists():
            remove(box.root)
            print(f"box: down, {box.root} emptied")
        case "env" if alive:
            print(f"export SLURM_CONF={box.root / 'etc' / 'slurm.conf'} ABF_ACCOUNT={box.account}")
        case "up" | "status" if alive:
            print(
                f"box: up, {box.root}\n{box.run('sinfo').stdout}{box.run('squeue').stdout}", end=""
            )
        case _:
            print(f"box: not up, {box.root}", file=sys.stderr)
            return args.action != "down"
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BoxError as error:
        sys.exit(f"box: {error}")
