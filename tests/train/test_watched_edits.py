"""What the journal says of the edit heads: recall, calibration and each term, counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from abf.diffusion.policy import reads
from abf.diffusion.policy.gates import COMPLETE, read_gates
from abf.track.journal import read_journal
from tests.train.tiny_run import tiny_train

OBJECTIVE: dict[str, Any] = {
    "kind": "block",
    "corruption": {"kind": "path", "drafts": {"share": 0.6}},
    "loss": {"edit_weight": 1.0, "complete_weight": 1.0},
}


def test_the_journal_tells_recall_and_calibration_of_all_steps_since_the_last_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the heads' raw numbers on every draft of the run, in plain loops."""
    needed, called, right = ({"substitute": 0, "delete": 0, "insert": 0} for _ in range(3))
    said: list[tuple[float, bool]] = []
    edit, complete = reads.edit_charges, reads.complete_charges

    def seen(heads: Any, states: Any, of: Any, found: Any, *, backend: Any) -> Any:
        K, m = found.text.shape
        raw = heads.edits(states[len(of.token) :]).unflatten(0, (K, m + 1)).detach()
        gates = read_gates(raw, found.is_mask)
        for k in range(K):
            size = int(found.exists[k].sum())
            expected: dict[int, float] = {}
            for gap in range(size + 1):
                group = int(found.group[k, gap])
                expected[group] = expected.get(group, 0.0) + float(gates.missing[k, gap])
            for group, tokens in expected.items():
                lacks, asks = float(found.missing[k, group]) >= 1, tokens >= 0.5
                needed["insert"] += lacks
                called["insert"] += asks
                right["insert"] += lacks and asks
            for slot in range(size):
                if found.is_mask[k, slot]:
                    continue
                odds = [float(g[k, slot]) for g in (gates.keep, gates.revise, gates.delete)]
                choice = odds.index(max(odds))
                truth = found.action[k, slot].tolist().index(1.0)
                for kind, name in ((1, "substitute"), (2, "delete")):
                    needed[name] += truth == kind
                    called[name] += choice == kind
                    right[name] += truth == choice == kind
        return edit(heads, states, of, found, backend=backend)

    def whole(heads: Any, states: Any, found: Any) -> Any:
        probability = torch.sigmoid(heads.edits(states)[:, COMPLETE].detach()).tolist()
        said.extend(zip(probability, found.complete.tolist(), strict=True))
        return complete(heads, states, found)

    monkeypatch.setattr("abf.diffusion.loss.edit_charges", seen)
    monkeypatch.setattr("abf.diffusion.loss.complete_charges", whole)
    optim = {"lr": 0.02, "warmup_fraction": 0.1}
    tiny_train(tmp_path, {"objective": OBJECTIVE, "log_steps": 10, "optim": optim})
    (record,) = [r for r in read_journal(tmp_path / "journal.jsonl") if r["kind"] == "metrics"]
    values = record["values"]
    assert {"nelbo", "ar", "length", "edit", "complete", "mask_embedding_norm"} <= values.keys()
    assert all(needed.values())
    for name in needed:
        assert values[f"{name}_recall"] == pytest.approx(right[name] / needed[name])
        if called[name]:
            assert values[f"{name}_precision"] == pytest.approx(right[name] / called[name])
    assert values["complete_share"] == pytest.approx(sum(w for _, w in said) / len(said))
    gap = 0.0
    for low in range(10):
        inside = [(p, w) for p, w in said if min(int(p * 10), 9) == low]
        gap += abs(sum(p for p, _ in inside) - sum(w for _, w in inside))
    assert values["complete_ece"] == pytest.approx(gap / len(said), rel=1e-5)
