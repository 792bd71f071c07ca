"""docs/performance.md says what the CSV files say, and of what they do not hold, that."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import performance
from benchmarks.gpu import problem, serving
from benchmarks.gpu.table import Table
from benchmarks.gpu.timing import Figure
from benchmarks.performance_figures import DRAWN

PEERS = ("Flex", "Flex FLASH", "dense SDPA")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results and page, to be changed."""
    shutil.copytree(performance.RESULTS, tmp_path / "results")
    (tmp_path / "docs").mkdir()
    shutil.copytree(performance.FIGURES, tmp_path / "docs" / "figures")
    shutil.copy(performance.PAGE, tmp_path / "docs" / "performance.md")
    monkeypatch.setattr(performance, "ROOT", tmp_path)
    monkeypatch.setattr(performance, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(performance, "PAGE", tmp_path / "docs" / "performance.md")
    monkeypatch.setattr(performance, "FIGURES", tmp_path / "docs" / "figures")
    return tmp_path


def test_the_page_is_that_of_the_files() -> None:
    assert performance.main(["--check"]) == 0


def test_a_figure_that_changes_makes_the_page_stale(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "results" / "cpu_attention.csv"
    lines = path.read_text().splitlines()
    name, _, rest = lines[1].rpartition('",')[0].partition('",')
    assert name.startswith('"forward')
    lines[1] = lines[1].replace(rest.split(",")[0], "77.25", 1)
    path.write_text("\n".join(lines) + "\n")
    assert performance.main(["--check"]) == 1
    assert "docs/performance.md, docs/figures/attention_speed.svg" in capsys.readouterr().out
    assert performance.main([]) == 0
    assert "| 77.2 [" in (copied / "docs" / "performance.md").read_text()
    assert performance.main(["--check"]) == 0


def test_rates_count_seen_pairs() -> None:
    row = {
        "figure": "forward+backward, fp32, B=1 H=2 2L=100 D=64",
        "detail": "tiles 2.0 ms, dense SDPA with a boolean mask 4.0 ms; density 0.250, tile waste",
    }
    # 2 heads, 2500 pairs each, 14 x 64 operations a pair, in 2 and 4 ms.
    flops = 2 * 2500 * 14 * 64
    assert performance.rates(row) == pytest.approx((flops / 2e6, flops / 4e6))
    row["figure"] = row["figure"].removeprefix("forward+backward").join(("forward", ""))
    assert performance.rates(row) == pytest.approx((flops / 3.5 / 2e6, flops / 3.5 / 4e6))
    with pytest.raises(ValueError, match="no 'density"):
        performance.rates(row | {"detail": "tiles 2.0 ms, mask 4.0 ms"})


def test_passes_of_a_block_bound_its_speed() -> None:
    row = {"figure": "tokens/s, block at k=4 over AR, B=8", "detail": "28M, S=16, fp32"}
    assert performance.decoding(row) == (8, 4, 16 / 5)
    assert performance.decoding(row | {"figure": "event log's share, B=8"}) is None


def test_figures_are_small_and_not_empty() -> None:
    for name, draw in DRAWN.items():
        text = draw()
        assert len(text) < 100_000, name
        assert text.count("<path") > 20, name


def test_what_was_not_measured_on_a_gpu_is_said_not_to_be(copied: Path) -> None:
    for path in (copied / "results").glob("gpu_*.csv"):
        path.unlink()
    assert performance.gpu_table().count(performance.NOT_MEASURED) == len(performance.GPU_GOALS)
    name, chip, _ = performance.GPU_GOALS[0]
    where = {"device": f"NVIDIA {chip}", "git_sha": "abc"}
    table = Table(copied / "results" / "gpu_x.csv", where)
    table.add(Figure(name, 123.4, 120.0, 125.0, "TFLOP/s"))
    table.done()
    text = performance.gpu_table()
    assert f"123 [120, 125] TFLOP/s (NVIDIA {chip}, abc)" in text
    assert text.count(performance.NOT_MEASURED) == len(performance.GPU_GOALS) - 1


def test_every_goal_is_a_figure_that_the_gpu_script_writes() -> None:
    """As it names them, in `attention`, `metadata` and `serving`."""
    steps = ("forward", "backward", "forward+backward")
    written = {f"decode, share of copy bandwidth, {cache}" for cache in serving.CACHES}
    for case in problem.CASES:
        written |= {f"{step}, ours, {case}" for step in steps}
        written |= {f"{step}, ours over {peer}, {case}" for step in steps for peer in PEERS}
        written.add(f"mask metadata: bounds and lists of a step, {case}")
        written.add(f"kernels compiled over 100 segmentations, {case}")
    assert {name for name, _, _ in performance.GPU_GOALS} <= written
