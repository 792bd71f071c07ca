"""The ABF strategy: its bars on hand-made numbers, and whole decodes against a plain loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from abf.base import build
from abf.decode.config import AbfStrategy, DecoderConfig, FixedExtent, LengthHeadExtent
from abf.decode.strategy.abf import Abf
from abf.decode.trace import read_trace
from abf.decode.view import BlockView, EditView
from abf.errors import ConfigError
from abf.model.attention import RangeAttend
from abf.model.transformer import EDITS, Transformer
from tests.decode.runs import block_config, run, tokens
from tests.decode.tiny import S, V, tiny_decode, tiny_engine, tiny_prompts

MASK = 999


def view(ids: list[int], *, best: list[float], **edit: Any) -> BlockView:
    """A block with these ids; slot j's likeliest tokens are 10 + j and 20 + j."""
    n = len(ids)
    is_mask = np.array(ids) == MASK
    top_probs = np.stack([best, 0.9 * (1 - np.array(best))], axis=1)
    zeros = np.zeros(n)
    settings: dict[str, Any] = {
        "gap_uids": np.arange(99, 100 + n),
        "keep": zeros,
        "revise": zeros,
        "delete": zeros,
        "missing": np.zeros(n + 1),
        "complete": 0.0,
        "raw": np.zeros((n + 1, len(EDITS))),
        "locked": zeros.astype(bool),
        "changes": zeros.astype(int),
        "spent": zeros.astype(bool),
        "stable": zeros.astype(int),
        "room": 9,
        "insertable": np.ones(n + 1, dtype=bool),
        "uniforms": np.zeros((0, 3)),
    }
    settings |= {k: np.array(v) if isinstance(v, list) else v for k, v in edit.items()}
    return BlockView(
        request=0, block=0, step=3, steps_left=9, tokens_left=50, mask_id=MASK, document_id=0,
        forbidden=np.zeros(0, int),
        uids=100 + np.arange(n), ids=np.array(ids), is_mask=is_mask, token=10 + np.arange(n),
        confidence=np.array(best), entropy=zeros, margin=zeros,
        top_ids=np.stack([10 + np.arange(n), 20 + np.arange(n)], axis=1), top_probs=top_probs,
        commit_step=zeros.astype(int), commit_confidence=zeros, edit=EditView(**settings),
    )  # fmt: skip


def decided(shown: BlockView, **cfg: Any) -> dict[str, Any]:
    """What the strategy does: fields that are not empty."""
    action = Abf(AbfStrategy(**cfg)).decide(shown, None)
    found: dict[str, Any] = {"complete": action.complete}
    for name in ("commit", "fill", "substitute", "insert"):
        part = getattr(action, name)
        values = part.counts if name == "insert" else part.tokens
        if len(part.uids):
            found[name] = dict(zip(part.uids.tolist(), values.tolist(), strict=True))
    for name in ("delete", "lock"):
        if len(uids := getattr(action, name)):
            found[name] = uids.tolist()
    return found


def test_masks_above_the_bar_are_filled_else_the_surest() -> None:
    block = view([MASK, 7, MASK, MASK], best=[0.95, 0.99, 0.9, 0.89])
    assert decided(block) == {"complete": False, "fill": {100: 10, 102: 12}}
    assert decided(block, fill=0.99) == {"complete": False, "fill": {100: 10}}


def test_only_the_first_masks_of_a_window_are_filled() -> None:
    block = view([MASK, 7, MASK, MASK], best=[0.5, 0.99, 0.6, 0.95])
    assert decided(block, fill=0.9, window=2) == {"complete": False, "fill": {102: 12}}
    assert decided(block, fill=0.5, window=2) == {"complete": False, "fill": {100: 10, 102: 12}}
    assert decided(block, fill=0.9, window=1) == {"complete": False, "fill": {100: 10}}
    # A mask that is deleted takes no place in it.
    block = view([MASK, 7, MASK, MASK], best=[0.5, 0.99, 0.6, 0.95], delete=[0.9, 0, 0, 0])
    found = decided(block, fill=0.9, window=1)
    assert found == {"complete": False, "delete": [100], "fill": {102: 12}}


def test_a_token_is_exchanged_for_the_best_other_one() -> None:
    # Slot 0 holds its likeliest token: the other one, 20, has 0.9 * (1 - 0.4) = 0.54 at most.
    block = view([10, 7, 7], best=[0.4, 0.8, 0.8], revise=[0.99, 0.7, 0.5])
    assert decided(block) == {"complete": False, "substitute": {100: 20, 101: 11}}
    assert decided(block, substitute=0.55) == {"complete": False, "substitute": {101: 11}}
    for history in ({"locked": [True, True, True]}, {"spent": [True, True, True]}):
        held = view([10, 7, 7], best=[0.4, 0.8, 0.8], revise=[0.99, 0.7, 0.5], **history)
        assert decided(held) == {"complete": False}


def test_deletion_beats_the_rest_and_leaves_something() -> None:
    block = view([MASK, 7, 8], best=[0.9, 0.9, 0.1], delete=[0.6, 0.5, 0.4], revise=[0, 1.0, 0])
    assert decided(block) == {"complete": False, "delete": [100, 101]}
    every = view([7, 8, 9], best=[0.1] * 3, delete=[0.6, 0.55, 0.9])
    assert decided(every) == {"complete": False, "delete": [100, 102]}
    locked = view([7, 8], best=[0.1] * 2, delete=[0.6, 0.1], locked=[True, False])
    assert decided(locked) == {"complete": False}


def test_missing_tokens_of_a_group_add_up() -> None:
    # Groups: gap 0 | gaps 1, 2, 3 around the masks | gap 4.
    block = view(
        [7, MASK, MASK, 8], best=[0.1, 0.95, 0.95, 0.1], missing=[0.4, 0.7, 0.9, 0.2, 12.0]
    )
    filled = {"complete": False, "fill": {101: 11, 102: 12}}
    assert decided(block) == filled | {"insert": {101: 2, 103: 8}}
    assert decided(block, max_insert=1) == filled | {"insert": {101: 1, 103: 1}}
    assert decided(block, insert=0.1) == filled | {"insert": {99: 1, 101: 2, 103: 8}}
    assert block.edit is not None
    full = dataclasses.replace(block, edit=dataclasses.replace(block.edit, room=0))
    assert decided(full) == filled
    closed = view([7, 8], best=[0.1, 0.1], missing=[0, 0, 3.0], insertable=[True, True, False])
    assert decided(closed) == {"complete": False}


def test_a_block_gets_no_more_masks_than_it_lacks_in_all() -> None:
    """One token is missing, in one of two gaps: the likelier gets it."""

    def needs(*missing: float) -> BlockView:
        return view([7, 8], best=[0.1, 0.1], missing=list(missing))

    one = {"complete": False}
    assert decided(needs(0.0, 0.5, 0.6)) == one | {"insert": {101: 1}}
    assert decided(needs(0.0, 0.8, 0.7)) == one | {"insert": {100: 1, 101: 1}}
    assert decided(needs(0.6, 1.6, 1.9)) == one | {"insert": {100: 2, 101: 2}}
    assert decided(needs(0.3, 0.31, 0.3), insert=0.3) == one | {"insert": {100: 1}}
    assert decided(needs(0.0, 0.31, 0.0), insert=0.3) == one | {"insert": {100: 1}}
    assert decided(needs(0.4, 0.4, 0.4)) == one


def test_masks_too_many_count_against_tokens_missing() -> None:
    # Three masks of one group, 0.9 of them too many; 2.0, then 1.0 tokens missing beside them.
    def group(missing: float, delete: list[float]) -> BlockView:
        return view(
            [7, MASK, MASK, MASK, 8],
            best=[0.1, 0.95, 0.1, 0.1, 0.1],
            missing=[0.0, 0.0, missing, 0.0, 0.0, 0.0],
            delete=[0.0, *delete, 0.0],
        )

    filled = {"complete": False, "fill": {101: 11}}
    assert decided(group(2.0, [0.3, 0.3, 0.3])) == filled | {"insert": {101: 1}}
    assert decided(group(2.5, [0.3, 0.3, 0.3])) == filled | {"insert": {101: 2}}
    assert decided(group(1.0, [0.3, 0.3, 0.3])) == filled
    # Only what is too much, net, goes: the likeliest masks, each at its own bar.
    assert decided(group(0.0, [0.6, 0.7, 0.5])) == {"complete": False, "delete": [101, 102]} | {
        "fill": {103: 13}
    }
    assert decided(group(1.0, [0.6, 0.7, 0.5])) == filled | {"delete": [102]}
    assert decided(group(1.4, [0.6, 0.7, 0.5])) == filled
    assert decided(group(0.0, [0.6, 0.7, 0.5]), delete=0.65) == filled | {"delete": [102]}
    # Below one in all, but the bar is reached.
    assert decided(group(0.0, [0.0, 0.4, 0.0]), delete=0.3) == filled | {"delete": [102]}
    assert decided(group(0.2, [0.0, 0.4, 0.0]), delete=0.3) == filled
    # Another group's masks, and tokens too many, are nothing to it.
    apart = view(
        [MASK, 7, MASK], best=[0.1, 0.1, 0.95], missing=[0, 0, 1.0, 0], delete=[0.9, 0.9, 0.0]
    )
    assert decided(apart) == {
        "complete": False, "fill": {102: 12}, "delete": [100, 101], "insert": {101: 1},
    }  # fmt: skip


def test_completion_needs_no_pending_edit_and_the_models_word() -> None:
    whole = view([7, 8], best=[0.1, 0.1], complete=0.6)
    assert decided(whole)["complete"] is True
    assert decided(whole, complete=0.7)["complete"] is False
    for asked in ({"revise": [1.0, 0]}, {"delete": [1.0, 0]}, {"missing": [2.0, 0, 0]}):
        best = [0.9, 0.1]
        assert decided(view([7, 8], best=best, complete=0.9, **asked))["complete"] is False
    assert decided(view([7, MASK], best=[0.1, 0.1], complete=0.9))["complete"] is False


def test_only_named_operations() -> None:
    block = view(
        [7, 8, MASK], best=[0.9] * 3, revise=[1.0, 0, 0], delete=[0, 0.9, 0], missing=[2.0, 0, 0, 0]
    )
    assert decided(block) == {
        "complete": False, "fill": {102: 12}, "substitute": {100: 10}, "delete": [101],
        "insert": {99: 2},
    }  # fmt: skip
    assert decided(block, operations=("fill",)) == {"complete": False, "commit": {102: 12}}
    filled = {"complete": False, "fill": {102: 12}}
    assert decided(block, operations=("insert", "fill")) == filled | {"insert": {99: 2}}
    assert decided(block, operations=("fill", "delete")) == filled | {"delete": [101]}
    assert decided(block, operations=("substitute", "fill")) == filled | {"substitute": {100: 10}}


def test_calm_tokens_are_locked() -> None:
    block = view([7, 8, 9, MASK], best=[0.9] * 4, stable=[2, 1, 3, 3], revise=[0, 0, 1.0, 0])
    assert decided(block)["fill"] == {103: 13}
    assert decided(block, lock_after=2)["lock"] == [100]
    assert decided(block, lock_after=1)["lock"] == [100, 101]
    assert "lock" not in decided(block)


def test_operations_must_hold_fill_once() -> None:
    for wrong in (["insert"], ["fill", "fill"]):
        with pytest.raises(ValidationError, match="must name `fill`, and each one once"):
            AbfStrategy.model_validate({"operations": wrong})


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("bar", [0.3, 0.9])
def test_fill_alone_with_a_fixed_extent_is_the_threshold_rule(
    model: Transformer, tmp_path: Path, shift: bool, bar: float
) -> None:
    """Also on a model without edit heads: nothing is read of them."""
    alone = AbfStrategy(operations=("fill",), fill=bar, complete=0)
    cfg = DecoderConfig(strategy=alone, extent=FixedExtent(length=6), precision="fp32")
    found, wanted = (
        run(tmp_path / "log", c, model, tiny_prompts(), shift=shift)
        for c in (cfg, block_config(bar))
    )
    assert tokens(found) == tokens(wanted)
    assert [s.nfe for s in found] == [s.nfe for s in wanted]


def test_a_model_without_edit_heads_is_refused(model: Transformer, tmp_path: Path) -> None:
    cfg = DecoderConfig(strategy=AbfStrategy(), extent=LengthHeadExtent(), precision="fp32")
    with pytest.raises(ConfigError, match=r"'abf' reads the heads of insertion.*kind `path`"):
        run(tmp_path / "log", cfg, model, tiny_prompts())


CONFIGS = {
    "default": AbfStrategy(),
    "busy": AbfStrategy(fill=0.4, substitute=0.2, delete=0.4, insert=1.5, complete=0.2),
    "locks": AbfStrategy(fill=0.4, substitute=0.1, delete=0.6, lock_after=2, complete=0.9),
    "grows": AbfStrategy(operations=("fill", "insert"), max_insert=2, insert=0.8),
}


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_equals_a_plain_loop(
    editor: Transformer, tmp_path: Path, name: str, shift: bool
) -> None:
    """Oracle: one request, lists, an uncached pass over everything at every step."""
    cfg, prompts = CONFIGS[name], tiny_prompts()
    engine = tiny_engine(editor, build(cfg, room="abf.decode.strategy"), shift=shift)
    samples = tiny_decode(tmp_path / "log", engine, prompts)
    for prompt, sample in zip(prompts[2:4], samples[2:4], strict=True):
        loop = PlainLoop(editor, cfg, shift=shift)
        found = loop.run([0, *prompt.token_ids.tolist()], 30)
        assert found == sample.token_ids.tolist()
        assert loop.passes == sample.nfe
        assert (loop.stalled, loop.forced) == (sample.stalled_blocks, sample.forced_blocks)
        assert loop.edits == sample.edits


class PlainLoop:
    """The sampler in lists: `docs/method.md` and the rules of `abf.decode.decide`, nothing else."""

    def __init__(self, model: Transformer, cfg: AbfStrategy, *, shift: bool) -> None:
        self.model, self.cfg, self.shift = model, cfg, shift
        self.passes = self.stalled = self.forced = 0
        self.edits = dict.fromkeys(("FILL", "SUBSTITUTE", "DELETE", "INSERT"), 0)

    def read(self, known: list[int], block: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token probabilities [n, V] and edit numbers [n+1, E]."""
        ids = torch.tensor([known + block + [self.model.end_id]])
        row = torch.arange(ids.shape[1])
        end = torch.where(row < len(known), row + 1, len(row))
        ranges = torch.stack([row * 0, end, row * 0, row * 0], -1)[None]
        with torch.inference_mode():
            states = self.model.hidden(ids, row[None], RangeAttend(ranges, backend="reference"))[0]
            edits = self.model.edits(states[len(known) :])
            start = len(known) - self.shift
            logits = self.model.logits(states[start : start + len(block)])
            return logits.double().softmax(-1), edits.double()

    def run(self, known: list[int], budget: int) -> list[int]:
        start = len(known)
        while len(known) - start < budget and 0 not in known[start:]:
            left = budget - (len(known) - start)
            known = known + self.block(known, min(6, left), min(S, left))
            self.passes += 1
        return known[start:]

    def block(self, known: list[int], length: int, room: int) -> list[int]:
        cfg, ops = self.cfg, self.cfg.operations
        slots = [{"id": V, "locked": False, "changes": 0, "at": -1} for _ in range(length)]
        seen: dict[tuple[int, ...], int] = {}
        growing, step = True, 0
        while True:
            ids = [slot["id"] for slot in slots]
            dead = next((j + 1 for j, s in enumerate(slots) if s["locked"] and s["id"] == 0), None)
            n = len(ids) if dead is None else dead
            probs, raw = self.read(known, ids)
            self.passes += 1
            e = {name: raw[:, j] for j, name in enumerate(EDITS)}
            missing = torch.nn.functional.softplus(torch.cat((e["missing"][:n], e["missing"][-1:])))
            complete = float(torch.sigmoid(e["complete"][-1]))
            revise, delete = [], []
            for j in range(n):
                odds = [1.0, 0.0 if ids[j] == V else float(e["revise"][j].exp())]
                odds.append(float(e["delete"][j].exp()))
                revise.append(odds[1] / sum(odds))
                delete.append(odds[2] / sum(odds))
            free = [j for j in range(n) if not slots[j]["locked"]]
            groups: list[list[int]] = [
                [0]
            ]  # gaps; gap j + 1 belongs to the masks j that it follows
            for j in range(n):
                if ids[j] == V:
                    groups[-1].append(j + 1)
                else:
                    groups.append([j + 1])
            gone = {j for j in free if "delete" in ops and delete[j] >= cfg.delete and ids[j] != V}
            net = []
            for group in groups:
                masks = [gap - 1 for gap in group[1:]]
                net.append(float(missing[group].sum()) - sum(delete[j] for j in masks))
                if "delete" in ops and n > 1 and -net[-1] >= cfg.delete:
                    worst = sorted(masks, key=lambda j: -delete[j])[: max(1, int(0.5 - net[-1]))]
                    gone |= {j for j in worst if delete[j] >= cfg.delete}
            if len(gone) == n:
                gone.remove(min(gone, key=lambda j: delete[j]))
            written: dict[int, int] = {}
            for j in set(free) - gone:
                if ids[j] == V:
                    if float(probs[j].max()) >= cfg.fill:
                        written[j] = int(probs[j].argmax())
                elif "substitute" in ops and slots[j]["changes"] < 4:
                    others = probs[j].clone()
                    others[ids[j]] = -1
                    if revise[j] * float(others.max()) >= cfg.substitute:
                        written[j] = int(others.argmax())
            open_ = [j for j in range(n) if ids[j] == V and j not in gone]
            if open_ and not any(j in written for j in open_):
                surest = max(open_, key=lambda j: float(probs[j].max()))
                written[surest] = int(probs[surest].argmax())
            inserts: dict[int, int] = {}
            need: dict[int, float] = {}
            space = room - len(ids)
            if "insert" in ops and growing and space > 0:
                for group, total in zip(groups, net, strict=True):
                    best = max(group, key=lambda g: float(missing[g]))
                    held = 0 < best < n and slots[best - 1]["locked"] and slots[best]["locked"]
                    if total >= cfg.insert and best != dead and not held:
                        inserts[best] = min(cfg.max_insert, max(1, int(total + 0.5)))
                        need[best] = total
                lacking = max(1, int(sum(max(0.0, total) for total in net) + 0.5))
                for best in sorted(inserts, key=lambda gap: -need[gap]):
                    inserts[best] = min(inserts[best], lacking)
                    lacking -= inserts[best]
                inserts = {gap: count for gap, count in inserts.items() if count}
            wanted = bool(gone or written or inserts)
            for gap in sorted(inserts):
                beside = gap in gone or gap - 1 in gone
                inserts[gap], space = (0, space - inserts[gap]) if beside else (
                    max(0, min(inserts[gap], space)), space - inserts[gap],
                )  # fmt: skip
            inserts = {gap: count for gap, count in inserts.items() if count}
            done = not wanted and complete >= cfg.complete
            calm = [
                j for j in range(n)
                if cfg.lock_after and j in free and ids[j] != V and j not in {*gone, *written}
                and step - slots[j]["at"] >= cfg.lock_after
            ]  # fmt: skip
            stalled = not done and not gone and not written and not inserts and not calm
            if done or stalled:
                self.stalled += stalled
                text = ids[:n]
                return text[: text.index(0) + 1] if 0 in text else text
            for j in calm:
                slots[j]["locked"] = True
            seen.setdefault(tuple(ids[:n]), step)
            for j, token in written.items():
                self.edits["FILL" if ids[j] == V else "SUBSTITUTE"] += 1
                slots[j] |= {
                    "id": token,
                    "changes": slots[j]["changes"] + (ids[j] != V),
                    "at": step,
                }
            self.edits["DELETE"] += len(gone)
            self.edits["INSERT"] += sum(inserts.values())
            new = []
            for j in range(len(slots) + 1):
                new += [{"id": V, "locked": False, "changes": 0, "at": step}] * inserts.get(j, 0)
                new += [slots[j]] if j < len(slots) and j not in gone else []
            slots = [dict(slot) for slot in new]
            length = n - len(gone) + sum(inserts.values())
            since = seen.get(tuple(s["id"] for s in slots[:length]))
            if since is not None:
                growing = False
                for slot in slots[:length]:
                    slot["locked"] |= slot["id"] != V and slot["at"] >= since
            step += 1


def test_the_log_tells_the_gates(editor: Transformer, tmp_path: Path) -> None:
    """First step of a request's first block: gates and probabilities by one uncached pass."""
    prompt = tiny_prompts()[4]
    engine = tiny_engine(editor, Abf(CONFIGS["busy"]))
    tiny_decode(tmp_path / "log", engine, [prompt])
    _, events, _ = read_trace(tmp_path / "log")
    first = [e for e in events.to_pylist() if e["block"] == 0 and e["step"] == 0]
    loop = PlainLoop(editor, CONFIGS["busy"], shift=True)
    probs, raw = loop.read([0, *prompt.token_ids.tolist()], [V] * 6)
    delete = torch.sigmoid(raw[:6, EDITS.index("delete")])
    missing = torch.nn.functional.softplus(raw[:, EDITS.index("missing")])
    base = 1 + len(prompt.token_ids)
    assert {e["type"] for e in first} >= {"DELETE", "FILL"}
    for event in first:
        slot = event["uid"] - base
        if event["type"] == "DELETE":
            assert event["gate"] == pytest.approx(float(delete[slot]), abs=1e-5)
            assert event["threshold"] == pytest.approx(0.4)
        elif event["type"] == "FILL":
            assert event["gate"] == pytest.approx(1 - float(delete[slot]), abs=1e-5)
            assert event["prob"] == pytest.approx(float(probs[slot, event["new_id"]]), abs=1e-5)
        elif event["type"] == "INSERT":
            net = float(missing.sum() - delete.sum())
            assert event["gate"] == pytest.approx(net, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_edited_text_does_not_depend_on_the_batch(
    editor: Transformer, tmp_path: Path, batch_size: int
) -> None:
    settings: dict[str, Any] = {"strategy": CONFIGS["busy"], "extent": LengthHeadExtent()}
    found = [
        run(tmp_path / "log", DecoderConfig(**settings, **more), editor, tiny_prompts(4))
        for more in (
            {"precision": "fp32", "reopen": -3.0},
            {"precision": "fp32", "reopen": -3.0, "batch_size": batch_size},
        )
    ]
    assert tokens(found[0]) == tokens(found[1])
    assert [s.edits for s in found[0]] == [s.edits for s in found[1]]
