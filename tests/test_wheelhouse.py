"""The wheelhouse on two small packages of our own: made, damaged, gone on with, installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "envs" / "wheelhouse.py"
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{name}"
version = "{version}"
dependencies = {needs}
[tool.setuptools]
py-modules = ["{name}"]
"""


class Place:
    """A pip source on this disk, lists that pin what it has, and the folder to fill."""

    def __init__(self, root: Path) -> None:
        self.source, self.envs, self.folder = root / "source", root / "envs", root / "wheels"
        self.envs.mkdir()
        self.constrain("inner==1.5", "outer==0.2")
        (self.envs / "cpu.txt").write_text("outer  # needs inner\n")
        (self.envs / "cuda.txt").write_text("-r cpu.txt\n")
        (self.envs / "dev.txt").write_text("")

    def constrain(self, *pins: str) -> None:
        (self.envs / "constraints.txt").write_text("# pins\n" + "\n".join(pins) + "\n")

    def __call__(
        self, command: str, *more: str, python: Path | str = sys.executable
    ) -> subprocess.CompletedProcess[str]:
        """Run the tool with `source` as all that pip has."""
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.source.as_uri()}
        return subprocess.run(
            [python, TOOL, command, self.folder, "--envs", self.envs, *more],
            capture_output=True,
            text=True,
            env=os.environ | pip | {"PIP_CONFIG_FILE": os.devnull},
        )

    def wheel(self, name: str) -> Path:
        (found,) = self.folder.glob(f"{name}-*.whl")
        return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of `outer`, which needs `inner`, built by pip from two projects."""
    root = tmp_path_factory.mktemp("packages")
    for name, version, needs in (("inner", "1.5", []), ("outer", "0.2", ["inner>=1"])):
        project = root / name
        project.mkdir()
        text = PROJECT.format(name=name, version=version, needs=json.dumps(needs))
        (project / "pyproject.toml").write_text(text)
        (project / f"{name}.py").write_text(f"__version__ = '{version}'\n")
    built = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps"]
    subprocess.run(
        [*built, "--no-build-isolation", "-w", root / "wheels", root / "inner", root / "outer"],
        check=True,
        capture_output=True,
    )
    return root / "wheels"


@pytest.fixture
def place(tmp_path: Path, packages: Path) -> Place:
    made = Place(tmp_path)
    made.source.mkdir()
    for wheel in packages.iterdir():
        os.link(wheel, made.source / wheel.name)
    return made


def test_build_writes_a_manifest_and_the_second_call_fetches_nothing(place: Place) -> None:
    done = place("build")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((place.folder / "manifest.json").read_text())
    assert manifest["environment"] == "cpu"
    assert sorted(manifest["wheels"]) == [place.wheel(n).name for n in ("inner", "outer")]
    for file in place.source.iterdir():
        file.unlink()
    again = place("build")
    assert again.returncode == 0, again.stderr
    assert "nothing was downloaded" in again.stdout
    assert "2 wheels" in place("check").stdout


def test_a_package_that_cannot_be_had_is_named_and_the_rest_is_kept(
    place: Place, packages: Path
) -> None:
    (outer,) = place.source.glob("outer-*")
    outer.unlink()
    done = place("build")
    assert done.returncode == 1
    assert "outer==0.2: no wheel could be had" in done.stderr
    assert not (place.folder / "manifest.json").exists()
    assert "no finished wheelhouse" in place("install").stderr
    kept = place.wheel("inner").stat().st_mtime_ns
    os.link(next(packages.glob("outer-*")), outer)
    done = place("build")
    assert done.returncode == 0, done.stderr
    assert "1/1 outer==0.2" in done.stdout
    assert place.wheel("inner").stat().st_mtime_ns == kept


def test_a_need_without_a_pin_is_named(place: Place) -> None:
    place.constrain("outer==0.2")
    done = place("build")
    assert done.returncode == 1
    assert "No matching distribution found for inner" in done.stderr
    assert f"Pin what is missing in {place.envs / 'constraints.txt'}" in done.stderr


def test_damaged_missing_and_foreign_wheels_are_named_and_mended(place: Place) -> None:
    assert place("build").returncode == 0
    inner, outer = place.wheel("inner"), place.wheel("outer")
    data = bytearray(inner.read_bytes())
    data[len(data) // 2] ^= 1
    inner.unlink()
    inner.write_bytes(data)
    outer.unlink()
    done = place("install")
    assert done.returncode == 1
    assert f"{inner.name}: damaged" in done.stderr
    assert f"{outer.name}: missing" in done.stderr
    assert f"make wheelhouse WHEELS=cpu WHEELHOUSE={place.folder}" in done.stderr
    again = place("build")
    assert f"{inner.name} is damaged; it is fetched again" in again.stdout
    assert place("check").returncode == 0
    assert "holds the cpu environment, not cuda" in place("check", "--environment", "cuda").stderr
    foreign = place.folder / "inner-1.5-cp27-cp27m-win32.whl"
    inner.rename(foreign)
    manifest = (place.folder / "manifest.json").read_text()
    (place.folder / "manifest.json").write_text(manifest.replace(inner.name, foreign.name))
    assert f"{foreign.name}: not for this machine" in place("check").stderr


def test_a_pin_that_moved_is_named(place: Place) -> None:
    assert place("build").returncode == 0
    place.constrain("inner==1.6", "outer==0.2")
    assert "inner==1.6: no wheel" in place("check").stderr
    place.constrain("inner>=1", "outer==0.2")
    assert "'inner>=1' is no exact pin" in place("check").stderr


def test_install_takes_the_manifests_wheels_only(place: Place, tmp_path: Path) -> None:
    assert place("build").returncode == 0
    for file in place.source.iterdir():
        file.unlink()
    (place.folder / "inner-1.5.1-py3-none-any.whl").write_bytes(b"not asked for")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    done = place("install", python=python)
    assert done.returncode == 0, done.stderr
    assert f"2 packages in {tmp_path / 'venv'}" in done.stdout
    show = "import inner, outer; print(inner.__version__, outer.__version__)"
    found = subprocess.run([python, "-c", show], capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.split() == ["1.5", "0.2"]


@pytest.mark.parametrize(("environment", "found"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_the_other_build_of_torch_is_refused(
    place: Place, tmp_path: Path, environment: str, found: str
) -> None:
    needs = ["nvidia-cudnn-cu13"] if found == "cuda" else []
    project = tmp_path / "torch"
    project.mkdir()
    text = PROJECT.format(name="torch", version="2.0", needs=json.dumps(needs))
    (project / "pyproject.toml").write_text(text)
    (project / "torch.py").write_text("")
    made = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", project]
    options = ["--no-build-isolation", "-w", place.source]
    subprocess.run([*made, *options], check=True, capture_output=True)
    place.constrain("inner==1.5", "outer==0.2", "torch==2.0")
    done = place("build", "--environment", environment)
    assert done.returncode == 1
    assert f"torch-2.0-py3-none-any.whl, the {found} build of PyTorch" in done.stderr
    assert list(place.folder.glob("*.whl")) == []


def test_the_image_copies_what_there_is_from_a_fixed_base() -> None:
    root = TOOL.parents[1]
    text = (root / "envs" / "leonardo" / "apptainer.def").read_text()
    assert re.search(r"^From: python@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    section = text.partition("%files\n")[2].partition("\n\n")[0]
    sources = [line.split()[0] for line in section.splitlines()]
    # The wheels are what `make wheelhouse WHEELS=cuda` writes when no folder is named.
    assert sources[0] == "wheelhouse/cuda"
    assert [name for name in sources[1:] if not (root / name).exists()] == []


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("[]", "environment is []"),
        ("\xff", "can't decode byte"),
        ('{"environment": "cpu", "python": "p", "wheels": ["a"]}', "wheels is ['a']"),
        ('{"environment": 3, "python": "p", "wheels": {}}', "environment is 3"),
        ('{"environment": "cpu", "python": "p", "wheels": {"a": {}}}', "extension must be '.whl'"),
        (
            '{"environment": "cpu", "python": "p", "wheels": {"a-1-py3-none-any.whl": [1]}}',
            "'a-1-py3-none-any.whl' is [1]",
        ),
        (
            '{"environment": "cpu", "python": "p", "wheels": '
            '{"../a-1-py3-none-any.whl": {"bytes": 1, "sha256": "0"}}}',
            "Invalid project name: ../a-1-py3-none-any",
        ),
    ],
)
@pytest.mark.parametrize("command", ["build", "check", "install"])
def test_a_manifest_of_another_shape_is_one_line(
    place: Place, command: str, manifest: str, said: str
) -> None:
    place.folder.mkdir()
    (place.folder / "manifest.json").write_bytes(manifest.encode("latin-1"))
    (place.folder / "not a wheel.whl").touch()
    done = place(command)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"wheelhouse: {place.folder / 'manifest.json'} is damaged (" in done.stderr
    assert said in done.stderr


def test_a_folder_that_is_a_file_is_one_line(place: Place) -> None:
    place.folder.touch()
    for command in ("build", "check", "install"):
        done = place(command)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert str(place.folder) in done.stderr
