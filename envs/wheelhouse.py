"""A folder of wheels for everything in envs/, and the environment from it without a network.

    wheelhouse.py build FOLDER      where there is a network; goes on where it was interrupted
    wheelhouse.py check FOLDER      every file against the manifest, and against this Python
    wheelhouse.py install FOLDER    into the environment of the Python that runs this

It needs the standard library and pip only, since it runs before anything is installed. The folder
gets a `manifest.json`: the environment, the Python, and each wheel's bytes and sha256. Only wheels
of the manifest are installed, whatever else lies in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# pip's own copies: this Python has nothing else that reads names and versions by the rules.
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.tags import sys_tags
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

ENVIRONMENTS = ("cpu", "cuda")
MANIFEST = "manifest.json"
COMPILED = ("numpy", "pyarrow", "scipy", "tokenizers", "torch")
"""Packages whose import shows that the wheels fit this machine's C library and processor."""


class Fault(Exception):
    """What is wrong with which file, and what to do."""


def read_pins(envs: Path, environment: str) -> dict[str, Requirement]:
    """Exact requirement of every package, by normalised name: the constraints, then the list's own.

    Raises:
        Fault: a line of the constraints that names no exact version.
    """
    pins: dict[str, Requirement] = {}
    for file in (envs / "constraints.txt", envs / f"{environment}.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            text = line.partition("#")[0].strip()
            if "==" in text:
                pin = Requirement(text)
                pins[canonicalize_name(pin.name)] = pin
            elif text and file.name == "constraints.txt":
                raise Fault(f"{file}: {text!r} is no exact pin; write NAME==VERSION")
    return pins


def find_wheels(folder: Path, pins: Mapping[str, Requirement]) -> dict[str, Path]:
    """The wheel of each pin that the folder has one for and this Python can use."""
    usable = set(sys_tags())
    found = {}
    for path in sorted(folder.glob("*.whl")):
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except ValueError:  # its name is no wheel's: somebody else's file
            continue
        pin = pins.get(name)
        if pin and pin.specifier.contains(version, prereleases=True) and tags & usable:
            found[str(name)] = path
    return found


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def this_python() -> str:
    """Interpreter and platform as a wheel's narrowest tag, cp311-cp311-manylinux_2_28_x86_64."""
    return str(next(iter(sys_tags())))


def build(folder: Path, *, envs: Path, environment: str) -> None:
    """Fetch what is missing and write the manifest.

    Raises:
        Fault: a wheel that cannot be had, or a set of wheels that is not closed; named.
    """
    pins = read_pins(envs, environment)
    folder.mkdir(parents=True, exist_ok=True)
    before = read_manifest(folder, environment) if (folder / MANIFEST).exists() else {}
    drop_damaged(folder, before.get("wheels", {}))
    wheels = find_wheels(folder, pins)
    # torch first: it is the one that may turn out to be of the wrong kind.
    missing = sorted(pins.keys() - wheels.keys(), key=lambda name: (name != "torch", name))
    for number, name in enumerate(missing, start=1):
        print(f"wheelhouse: {number}/{len(missing)} {pins[name]}", flush=True)
        wheels[name] = fetch(pins[name], folder)
        if name == "torch":
            refuse_other_build(wheels[name], environment)
    entries = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in wheels.values()
    }
    if entries == before.get("wheels"):
        print(f"wheelhouse: {folder} has all {len(entries)} wheels; nothing was downloaded")
        return
    refuse_open(folder, envs, environment)
    document = {"environment": environment, "python": this_python(), "wheels": entries}
    part = folder / f".{MANIFEST}"
    part.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, folder / MANIFEST)
    megabytes = sum(entry["bytes"] for entry in entries.values()) / 1e6
    print(f"wheelhouse: {folder}: {len(entries)} wheels, {megabytes:.0f} MB, {environment}")


def fetch(pin: Requirement, folder: Path) -> Path:
    """One wheel, downloaded or built from source; it appears in the folder whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
        done = pip("wheel", "--no-deps", "--wheel-dir", part, str(pin))
        if done.returncode:
            raise Fault(
                f"{pin}: no wheel could be had:\n{last_lines(done)}\nRun the same command again "
                "where there is a network; what is already here is kept"
            )
        (wheel,) = Path(part).glob("*.whl")
        return wheel.rename(folder / wheel.name)


def drop_damaged(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Delete files that are not what the manifest says, so that they are fetched again."""
    for name, entry in entries.items():
        path = folder / name
        if path.exists() and sha256(path) != entry["sha256"]:
            print(f"wheelhouse: {name} is damaged; it is fetched again")
            path.unlink()


def refuse_other_build(torch: Path, environment: str) -> None:
    """Hold torch's build against the environment: indexes serve either under one version."""
    with zipfile.ZipFile(torch) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        needs = wheel.read(name).decode().partition("\n\n")[0]
    found = "cuda" if "Requires-Dist: nvidia-" in needs else "cpu"
    if found != environment:
        torch.unlink()
        raise Fault(
            f"pip's index gave {torch.name}, the {found} build of PyTorch, for the {environment} "
            "environment; it was deleted. Point pip at an index with the other build (README, "
            f"'Five minutes'), or say WHEELS={found}"
        )


def refuse_open(folder: Path, envs: Path, environment: str) -> None:
    """Let pip resolve the lists from the folder alone: something that is needed may have no pin."""
    lists = [part for name in (environment, "dev") for part in ("-r", str(envs / f"{name}.txt"))]
    done = pip(
        *("install", "--dry-run", "--ignore-installed", "--no-index", "--find-links", str(folder)),
        *("-c", str(envs / "constraints.txt"), *lists),
        alone=True,
    )
    if done.returncode:
        raise Fault(
            f"the wheels of {folder} do not make the {environment} environment:\n"
            f"{last_lines(done)}\nPin what is missing in {envs / 'constraints.txt'}"
        )


def check(folder: Path, *, envs: Path, environment: str) -> list[Path]:
    """The wheels of the environment, each one verified.

    Raises:
        Fault: names every wheel that is missing, damaged, outdated, or not for this Python.
    """
    document = read_manifest(folder, environment)
    pins, usable, faults = read_pins(envs, environment), set(sys_tags()), []
    for name, entry in sorted(document["wheels"].items()):
        path = folder / name
        if not path.exists():
            faults.append(f"{name}: missing")
        elif path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            faults.append(f"{name}: damaged (its sha256 is not the manifest's)")
        elif not parse_wheel_filename(name)[3] & usable:
            faults.append(f"{name}: not for this machine, {this_python()}")
    found = find_wheels(folder, pins)
    wheels = {name: path for name, path in found.items() if path.name in document["wheels"]}
    if not faults:
        faults = [f"{pins[name]}: no wheel" for name in pins if name not in wheels]
    if faults:
        raise Fault(
            f"{folder} (made on {document['python']}):\n  " + "\n  ".join(faults) + "\n"
            "Make it again where there is a network: make wheelhouse "
            f"WHEELS={environment} WHEELHOUSE={folder}"
        )
    print(f"wheelhouse: {len(wheels)} wheels in {folder} are what its manifest says", flush=True)
    return sorted(wheels.values())


def install(folder: Path, *, envs: Path, environment: str) -> None:
    """Install every verified wheel, and look at what came of it.

    Raises:
        Fault: also when a version is not the pinned one, or a compiled package does not import.
    """
    wheels = check(folder, envs=envs, environment=environment)
    into = ("install", "--no-index", "--no-deps", "--quiet", *map(str, wheels))
    for arguments in (into, ("check",)):
        done = pip(*arguments, alone=True)
        if done.returncode:
            raise Fault(f"pip {arguments[0]} into {sys.prefix} failed:\n{last_lines(done)}")
    pins = read_pins(envs, environment)
    wrong = [
        f"{pin} is pinned, {metadata.version(name)} is installed"
        for name, pin in pins.items()
        if not pin.specifier.contains(metadata.version(name), prereleases=True)
    ]
    if wrong:
        raise Fault(f"{sys.prefix}:\n  " + "\n  ".join(wrong))
    print(f"wheelhouse: {len(pins)} packages in {sys.prefix}, {imports(pins)}")


def imports(pins: Mapping[str, Requirement]) -> str:
    """Versions that the compiled packages report once a new process has imported them."""
    names = [name for name in COMPILED if name in pins]
    show = "; ".join(f"import {name}; print('{name}', {name}.__version__)" for name in names)
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True)
    if done.returncode:
        raise Fault(f"{sys.prefix}: a package does not import:\n{last_lines(done)}")
    return ", ".join(done.stdout.splitlines()) or "none of them compiled"


def refuse_strange(document: Any) -> None:
    """Raise ValueError for the first value of a manifest that `build` would not have written."""
    for key, kind in {"environment": str, "python": str, "wheels": dict}.items():
        value = document.get(key) if isinstance(document, dict) else document
        if not isinstance(value, kind):
            raise ValueError(f"{key} is {value!r:.80}")
    for name, entry in document["wheels"].items():
        parse_wheel_filename(name)
        kinds = {key: type(value) for key, value in entry.items()} if type(entry) is dict else {}
        if kinds != {"bytes": int, "sha256": str}:
            raise ValueError(f"wheels: {name!r} is {entry!r:.80}")


def read_manifest(folder: Path, environment: str) -> dict[str, Any]:
    """The manifest of a folder that holds this environment."""
    path = folder / MANIFEST
    if not path.exists():
        raise Fault(
            f"{path} does not exist: {folder} is no finished wheelhouse; where there is a network, "
            f"make wheelhouse WHEELS={environment} WHEELHOUSE={folder}"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        refuse_strange(document)
    except ValueError as error:
        raise Fault(f"{path} is damaged ({error}): delete it and make the wheelhouse") from error
    found = document["environment"]
    if found != environment:
        raise Fault(
            f"{folder} holds the {found} environment, not {environment}: "
            f"say WHEELS={found}, or name another folder"
        )
    return document


def pip(*arguments: str, alone: bool = False) -> subprocess.CompletedProcess[str]:
    """Run this Python's pip.

    Args:
        alone: without settings of the user or the machine, which may name other sources.
    """
    env = dict(os.environ)
    if alone:
        env = {name: value for name, value in env.items() if not name.startswith("PIP_")}
        env["PIP_CONFIG_FILE"] = os.devnull
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, env=env
    )


def last_lines(done: subprocess.CompletedProcess[str]) -> str:
    """The end of what a command said, errors before everything else."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
    return "\n".join((lines or done.stdout.splitlines())[-12:])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; faults are one message and exit code 1."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("command", choices=("build", "check", "install"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--environment", choices=ENVIRONMENTS, default="cpu")
    parser.add_argument("--envs", type=Path, default=Path(__file__).parent, help="the lists")
    given = parser.parse_args(argv)
    command = {"build": build, "check": check, "install": install}[given.command]
    try:
        command(given.folder, envs=given.envs, environment=given.environment)
    except Fault as fault:
        print(f"wheelhouse: {fault}", file=sys.stderr)
        return 1
    except OSError as error:  # a folder that is none, a full disk
        print(f"wheelhouse: {error.filename or given.folder}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("wheelhouse: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
