"""The package of kernels lives beside PyPI's `kernels`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("first", ["stand-in", "repository"])
def test_neither_kernels_shadows_the_other(tmp_path, first):
    """The PyPI package `kernels`, which transformers imports, and this folder of the same name,
    whichever is imported first."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("is_stand_in = True\n")
    paths = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    if first == "repository":
        paths = [*paths[1:], paths[0]]
    program = (
        "import sys\n"
        "for order in ('kernels', 'abf_kernels.block_attention.api'), ('abf_kernels', 'kernels'):\n"
        "    for name in [m for m in sys.modules if 'kernels' in m.split('.')[0]]:\n"
        "        del sys.modules[name]\n"
        "    for name in order:\n"
        "        __import__(name)\n"
        "    import kernels, abf_kernels\n"
        "    assert kernels.is_stand_in\n"
        f"    assert abf_kernels.__path__[0] == {str(ROOT / 'kernels' / 'abf_kernels')!r}\n"
        "assert not any(m == 'abf' or m.startswith('abf.') for m in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
