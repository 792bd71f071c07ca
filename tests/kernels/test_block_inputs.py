"""Block attention: what it refuses, and that its package lives beside PyPI's `kernels`."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from abf_kernels.block_attention.api import Backend, block_attention

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=get_args(Backend))
def backend(request):
    """Each back end."""
    return request.param


def changed(**changes):
    """Valid inputs (B=2, H=4, G=2, M=5, N=6, D=8) with some replaced."""
    inputs = {
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 2, 6, 8),
        "v": torch.zeros(2, 2, 6, 8),
        "ranges": torch.zeros(2, 5, 4, dtype=torch.int32),
    }
    return inputs | changes


def one_row(*values):
    ranges = torch.zeros(2, 5, 4, dtype=torch.int32)
    ranges[1, 3] = torch.tensor(values)
    return ranges


BAD_INPUTS = {
    "q must have 4 axes": {"q": torch.zeros(4, 5, 8)},
    "k must have 4 axes": {"k": torch.zeros(2, 6, 8)},
    "q must be one of": {"q": torch.zeros(2, 4, 5, 8, dtype=torch.int64)},
    "k must have q's dtype": {"k": torch.zeros(2, 2, 6, 8, dtype=torch.float64)},
    "v must have q's device": {"v": torch.zeros(2, 2, 6, 8, device="meta")},
    r"q must have stride 1 in its last axis .*got 5": {"q": torch.zeros(2, 4, 8, 5).mT},
    "v must have stride 1 in its last axis": {"v": torch.zeros(2, 2, 6, 1).expand(2, 2, 6, 8)},
    "q must have a head dim": {"q": torch.zeros(2, 4, 5, 0)},
    "k must have q's batch": {"k": torch.zeros(1, 2, 6, 8)},
    "k must have q's head dim": {"k": torch.zeros(2, 2, 6, 4)},
    "v must have k's shape": {"v": torch.zeros(2, 2, 7, 8)},
    "k must have a head count that divides": {
        "k": torch.zeros(2, 3, 6, 8),
        "v": torch.zeros(2, 3, 6, 8),
    },
    "ranges must be int32 or int64": {"ranges": torch.zeros(2, 5, 4)},
    "ranges must have q's device": {"ranges": torch.zeros(2, 5, 4, dtype=torch.int32).to("meta")},
    "ranges must have shape": {"ranges": torch.zeros(2, 5, 2, dtype=torch.int32)},
    r"ranges must lie within \[0, 6\].*7": {"ranges": one_row(0, 7, 0, 0)},
    r"ranges must lie within \[0, 6\].*-1": {"ranges": one_row(0, 0, -1, 3)},
    r"ranges must have start <= end.*batch row 1, query 3": {"ranges": one_row(0, 0, 4, 3)},
    r"ranges must not overlap.*batch row 1, query 3": {"ranges": one_row(2, 5, 0, 3)},
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_inputs_are_refused_by_name_on_every_backend(message, backend):
    with pytest.raises(ValueError, match=message):
        block_attention(**changed(**BAD_INPUTS[message]), backend=backend)


def test_scale_must_be_finite(backend):
    with pytest.raises(ValueError, match="scale must be finite"):
        block_attention(**changed(), backend=backend, scale=math.nan)


def test_unknown_backend_lists_the_allowed():
    allowed = "reference, tiles, triton"
    with pytest.raises(ValueError, match=f"backend must be one of {allowed}; got 'flex'"):
        block_attention(**changed(), backend="flex")  # pyright: ignore[reportArgumentType]


def test_ranges_that_touch_or_are_empty_inside_another_are_valid(backend):
    for row in ((0, 3, 3, 6), (2, 2, 0, 6), (0, 6, 4, 4), (6, 6, 0, 0)):
        block_attention(**changed(ranges=one_row(*row)), backend=backend)


@pytest.mark.parametrize("first", ["stand-in", "repository"])
@pytest.mark.parametrize("order", ["import kernels, abf_kernels", "import abf_kernels, kernels"])
def test_neither_kernels_shadows_the_other(tmp_path, first, order):
    """The PyPI package `kernels`, which transformers imports, and this folder of the same name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("is_stand_in = True\n")
    paths = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    if first == "repository":
        paths = [*paths[1:], paths[0]]
    program = (
        f"{order}\nimport sys, abf_kernels.block_attention.api as api\n"
        "assert kernels.is_stand_in\n"
        f"assert abf_kernels.__path__[0] == {str(ROOT / 'kernels' / 'abf_kernels')!r}\n"
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
