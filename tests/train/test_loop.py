"""A run from start to end in one process: resume is exact, trouble is named, nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abf.data.loader import row_indices
from abf.diffusion.loss import loss_terms
from abf.diffusion.terms import Term
from abf.errors import ArtifactError, ConfigError, DivergenceError, Interrupted, ResumeError
from abf.track.journal import metrics_table, read_journal
from abf.train import checkpoint, forward, loop, saver, step
from abf.train.loop import TrainResult, train
from tests.train.equality import assert_same_run, curve, events
from tests.train.tiny_run import L, new_model, tiny_config, tiny_train, write_rows

AR = {"objective": {"kind": "ar"}}
BF16 = {"precision": "bf16", "micro_rows": 2}
PART = "rank-00000.safetensors"
PATH = {"objective": {"kind": "block", "corruption": {"kind": "path"}}}


def test_a_run_records_what_it_did(whole_run: tuple[Path, TrainResult]) -> None:
    directory, result = whole_run
    assert (result.steps, result.tokens) == (10, 10 * 4 * L)
    assert [(at, tokens) for at, tokens, _ in curve(directory)] == [
        (at, at * 4 * L) for at in (2, 4, 6, 8, 10)
    ]
    assert set(curve(directory)[0][2]) == {
        "loss",
        "nelbo",
        "ar",
        "length",
        "grad_norm",
        "lr",
        "masked_share",
        "mask_embedding_norm",
        *(f"block_length_{name}" for name in ("1", "2", "3_4", "5_8", "mean")),
    }
    assert events(directory) == ["start", *["checkpoint"] * 4, "finished"]
    start = read_journal(directory / "journal.jsonl")[0]
    assert start["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert set(start["environment"]) >= {"cpu", "torch", "threads", "precision"}
    steps = [path.name for path in sorted((directory / "ckpt").iterdir())]
    assert steps == ["step-00000009", "step-00000010"]
    table = metrics_table(directory / "journal.jsonl")
    wall = table.column("wall_s").to_pylist()
    assert wall == sorted(wall)


def test_metrics_are_averages_over_the_steps_between_records(
    tmp_path: Path, whole_run: tuple[Path, TrainResult]
) -> None:
    tiny_train(tmp_path, {"log_steps": 1})
    single = {at: values for at, _, values in curve(tmp_path)}
    for at, _, values in curve(whole_run[0]):
        mean = np.mean([single[at - 1]["loss"], single[at]["loss"]])
        assert values["loss"] == pytest.approx(mean, rel=1e-12)
        assert values["lr"] == single[at]["lr"]
        low, high = sorted((single[at - 1]["nelbo"], single[at]["nelbo"]))
        assert low <= values["nelbo"] <= high


def test_loss_is_made_of_its_terms(whole_run: tuple[Path, TrainResult], tmp_path: Path) -> None:
    objective = {"kind": "block", "loss": {"length_weight": 0}}
    tiny_train(tmp_path, {"log_steps": 1, "objective": objective})
    for _, _, values in curve(tmp_path):
        assert "length" not in values
        assert values["loss"] == pytest.approx(values["nelbo"] + 0.5 * values["ar"], rel=1e-6)
    first = curve(whole_run[0])[0][2]
    # An untrained model with random tokens: log V nats a token, log S nats a block.
    assert first["ar"] == pytest.approx(math.log(61), rel=0.02)
    assert 0 < first["length"] < math.log(8)


@pytest.mark.parametrize("changes", [{}, PATH])
def test_it_learns(tmp_path: Path, changes: dict[str, Any]) -> None:
    packed = write_rows(tmp_path, rows=4)
    optim = {"lr": 0.02, "warmup_fraction": 0.1}
    cfg = tiny_config(tokens=60 * 4 * L, optim=optim, checkpoint_steps=60, **changes)
    train(cfg, seed=0, model=new_model(), packed=packed, run_dir=tmp_path, label="learn")
    values = [values for _, _, values in curve(tmp_path)]
    assert values[-1]["ar"] < 0.6 * values[0]["ar"]
    assert values[-1]["nelbo"] < 0.8 * values[0]["nelbo"]


@pytest.mark.parametrize(
    ("at", "changes"), [(3, {}), (5, {}), (5, AR), (5, BF16), (5, PATH | BF16)]
)
def test_resume_is_bit_exact(
    tmp_path: Path, changes: dict[str, Any], at: int, stop_at: Callable[..., Interrupted]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny_train(whole, changes)
    stop_at(at, parts, **changes)
    result = tiny_train(parts, changes)
    assert result.steps == 10
    assert_same_run(whole, parts)
    assert events(parts).count("interrupted") == 1
    assert "resume" in events(parts)


def test_an_interruption_says_how_to_go_on(
    tmp_path: Path, stop_at: Callable[..., Interrupted]
) -> None:
    error = stop_at(5, tmp_path)
    assert error.exit_code == 75
    assert "stopped by SIGTERM after step 5 of 10" in str(error)
    assert loop.command() in str(error)
    found, _ = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 5


def test_a_finished_run_is_not_repeated(whole_run: tuple[Path, TrainResult]) -> None:
    directory, first = whole_run
    before = curve(directory)
    again = tiny_train(directory)
    assert again.steps == 10
    assert curve(directory) == before
    assert all(
        torch.equal(one, two)
        for one, two in zip(first.model.parameters(), again.model.parameters(), strict=True)
    )
    assert again.seconds > 0


def test_a_checkpoint_cut_in_half_is_named_and_the_one_before_used(
    tmp_path: Path,
    whole_run: tuple[Path, TrainResult],
    stop_at: Callable[..., Interrupted],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_at(8, tmp_path)
    file = tmp_path / "ckpt" / "step-00000008" / PART
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    tiny_train(tmp_path)
    assert f"checkpoint skipped: {file}" in capsys.readouterr().err
    assert_same_run(whole_run[0], tmp_path)
    records = read_journal(tmp_path / "journal.jsonl")
    resumed = next(record for record in records if record.get("name") == "resume")
    assert resumed["step"] == 6
    assert "damaged_checkpoint" in events(tmp_path)


def test_without_a_whole_checkpoint_it_starts_over_and_says_so(
    tmp_path: Path,
    whole_run: tuple[Path, TrainResult],
    stop_at: Callable[..., Interrupted],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_at(7, tmp_path)
    for state in (tmp_path / "ckpt").glob("*/state.json"):
        state.write_text("{")
    tiny_train(tmp_path)
    told = capsys.readouterr().err
    assert told.count("checkpoint skipped") == 2
    assert "no checkpoint is whole: starting from step 0" in told
    assert_same_run(whole_run[0], tmp_path)


def test_another_configuration_is_refused_by_key(
    tmp_path: Path, stop_at: Callable[..., Interrupted]
) -> None:
    stop_at(4, tmp_path)
    with pytest.raises(ResumeError) as caught:
        tiny_train(tmp_path, {"optim": {"lr": 0.002}, "batch_rows": 3}, seed=1)
    for phrase in (
        "config.optim.lr: 0.001 -> 0.002",
        "config.batch_rows: 4 -> 3",
        "seed: 0 -> 1",
        f"delete {tmp_path / 'ckpt'} to train from scratch",
    ):
        assert phrase in str(caught.value)
    assert "schedule" not in str(caught.value)


def test_a_changed_configuration_goes_on_when_each_key_is_accepted(
    tmp_path: Path, stop_at: Callable[..., Interrupted], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(4, tmp_path)
    changes = {"optim": {"lr": 0.002}, "batch_rows": 3}
    with pytest.raises(ResumeError) as caught:
        tiny_train(tmp_path, changes, accept=["config.batch_rows", "config.optim"])
    assert "config.optim.lr: 0.001 -> 0.002. Restore these, accept each" in str(caught.value)
    assert "config.batch_rows" not in str(caught.value)
    accept = ["config.batch_rows", "config.optim.lr"]
    with pytest.raises(ResumeError, match=r"--accept optim\.lr: .*no such key; what differs: c"):
        tiny_train(tmp_path, changes, accept=[*accept, "optim.lr"])
    tiny_train(tmp_path, changes, accept=accept)
    told = "config.batch_rows: 4 -> 3; config.optim.lr: 0.001 -> 0.002"
    assert f"goes on after step 4 with what was accepted: {told}" in capsys.readouterr().err
    (event,) = [r for r in read_journal(tmp_path / "journal.jsonl") if r.get("changed")]
    assert (event["name"], "; ".join(event["changed"])) == ("config_changed", told)
    found, _ = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.state["identity"]["config"]["batch_rows"] == 3
    tiny_train(tmp_path, changes, accept=accept)  # from then on it is the run's own


def test_settings_that_change_no_result_may_change(
    tmp_path: Path, stop_at: Callable[..., Interrupted], whole_run: tuple[Path, TrainResult]
) -> None:
    stop_at(4, tmp_path)
    parallel = {"sharding": "full", "timeout_s": 7}
    tiny_train(tmp_path, {"parallel": parallel, "checkpoint_activations": True})
    assert_same_run(whole_run[0], tmp_path)


def test_another_model_or_other_data_is_refused(
    tmp_path: Path, stop_at: Callable[..., Interrupted]
) -> None:
    stop_at(4, tmp_path)
    packed = tmp_path / "train.arrow"

    def again(model_seed: int) -> None:
        model = new_model(model_seed)
        train(tiny_config(), seed=0, model=model, packed=packed, run_dir=tmp_path, label="x")

    with pytest.raises(ResumeError, match="initial_model:"):
        again(1)
    write_rows(tmp_path, seed=1)
    with pytest.raises(ResumeError, match=r"packed\.ends_sha256"):
        again(0)


def test_another_environment_is_told(
    tmp_path: Path,
    stop_at: Callable[..., Interrupted],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_at(4, tmp_path)
    real = loop.environment
    monkeypatch.setattr(
        loop, "environment", lambda **facts: real(**facts) | {"torch": "9.9", "cpu": "Z80"}
    )
    tiny_train(tmp_path)
    told = capsys.readouterr().err
    assert "resume will not be bit-exact: cpu: " in told
    assert "-> Z80; torch: " in told
    assert "environment_changed" in events(tmp_path)


def test_the_same_environment_is_not_mentioned(
    tmp_path: Path, stop_at: Callable[..., Interrupted], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(4, tmp_path)
    tiny_train(tmp_path)
    assert "bit-exact" not in capsys.readouterr().err


def poisoned(call: int) -> Callable[..., dict[str, Term]]:
    """`loss_terms` whose given call (1-based) returns no number."""
    calls = 0

    def terms(*args: Any, **kwargs: Any) -> dict[str, Term]:
        nonlocal calls
        calls += 1
        found = loss_terms(*args, **kwargs)
        if calls == call:
            found["nelbo"].sum = found["nelbo"].sum * float("nan")
        return found

    return terms


def test_divergence_stops_before_the_update_and_names_the_batch(
    tmp_path: Path, whole_run: tuple[Path, TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = write_rows(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(forward, "loss_terms", poisoned(5))
        with pytest.raises(DivergenceError) as caught:
            tiny_train(tmp_path)
    rows, _ = row_indices(4, batch_rows=4, n_rows=12, seed=0)
    text = str(caught.value)
    assert "step 5 of 10: loss nan" in text
    assert f"rows {', '.join(map(str, rows.tolist()))} of {packed}" in text
    piece = int(step.PackedRows(packed).rows(rows[:1]).document_id[0, 0])
    assert f"text-{piece}" in text
    assert read_journal(tmp_path / "journal.jsonl")[-1]["name"] == "diverged"
    found, damaged = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.step, damaged) == (3, [])
    tiny_train(tmp_path)  # the cause is gone: on from step 3, as if nothing had happened
    assert_same_run(whole_run[0], tmp_path)


def test_an_infinite_weight_diverges_at_once(tmp_path: Path) -> None:
    packed = write_rows(tmp_path)
    model = new_model()
    with torch.no_grad():
        model.layers[0].mlp.down.weight[3, 4] = torch.inf  # type: ignore[union-attr, index]
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(DivergenceError, match="step 1 of 10"):
        train(tiny_config(), seed=0, model=model, packed=packed, run_dir=tmp_path, label="x")
    assert checkpoint.latest(tmp_path) == (None, [])
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_a_learning_rate_beyond_all_bounds_is_told_as_what_it_is(tmp_path: Path) -> None:
    packed, optim = write_rows(tmp_path), {"lr": 1e30, "warmup_fraction": 0.0}
    with pytest.raises(DivergenceError, match="step 2 of 10"):
        train(tiny_config(optim=optim, log_steps=1), seed=0, model=new_model(), packed=packed,
              run_dir=tmp_path, label="x")  # fmt: skip


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, whole_run: tuple[Path, TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = saver._write_safetensors

    def full(path: Path, *args: Any) -> dict[str, Any]:
        found = real(path, *args)
        if "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(saver, "_write_safetensors", full)
        with pytest.raises(ArtifactError, match=r"step 6 .*No space left"):
            tiny_train(tmp_path)
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step-00000003"]
    tiny_train(tmp_path)
    assert_same_run(whole_run[0], tmp_path)


def test_unresolved_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.precision is still 'auto'"):
        tiny_train(tmp_path, {"precision": "auto"})
    assert not (tmp_path / "ckpt").exists()
