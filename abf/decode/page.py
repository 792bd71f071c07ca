"""One generation as a page: block by block, step by step, what was done and how sure the model was.

Self-contained HTML without scripts; model text is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from abf.decode.events import CLOSING, CODE
from abf.decode.replay import Folded
from abf.decode.trace import read_trace
from abf.errors import ArtifactError, ConfigError
from abf.files import write_text

STYLE = """
body{font:15px/1.6 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
h2{margin-top:2rem;font-size:1.1rem}table{border-collapse:collapse;width:100%}
td{border-top:1px solid #ddd;padding:.3rem .5rem;vertical-align:top}
td:first-child{white-space:nowrap;color:#666}span{white-space:pre-wrap;border-radius:3px}
.mask{color:#888;background:#eee}.insert{background:#cfe8ff}.fill{background:#d6f5d6}
.substitute{background:#ffe9b8}.delete{background:#ffd6d6;text-decoration:line-through}
.locked{border-bottom:2px solid #555}small{color:#666}
"""
KEY = ("insert", "fill", "substitute", "delete", "locked", "mask")


def page(path: Path, request: int, strings: Callable[[list[int]], list[str]]) -> str:
    """The page of one request.

    Args:
        path: `trace.arrows`, whose replay was checked.
        request: its number.
        strings: text of each token id.

    Raises:
        ConfigError: the log has no such request.
    """
    header, table, complete = read_trace(path)
    text = Shown(int(header["mask_id"]), strings)
    state = Folded(text.mask_id)
    blocks = history(table, request, state, text, where=str(path))
    prompt = text.plain(state.prompt_ids)
    note = "" if complete else "<p><strong>The log is incomplete.</strong></p>"
    key = " ".join(f'<span class="{name}">{name}</span>' for name in KEY)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Request {request}</title>'
        f"<style>{STYLE}</style><h1>Request {request}</h1>{note}"
        f"<p><small>{escape(str(path))}</small></p><p>{key}</p>"
        f"<h2>Prompt</h2><p><span>{prompt}</span></p>{blocks}"
        f"<h2>Text</h2><p><span>{text.plain(state.token_ids)}</span></p></html>\n"
    )


def history(table: pa.Table, request: int, state: Folded, text: Shown, *, where: str) -> str:
    """Every block and step of one request, as HTML.

    Args:
        table: EVENTS rows whose replay was checked.
        request: its number.
        state: as before the request; its events are folded in.
        text: of tokens.
        where: name of the log for messages.

    Raises:
        ConfigError: the log has no such request.
    """
    columns = table.drop_columns(["alt_ids", "alt_probs", "state_hash", "wall_s"])
    events = columns.filter(pc.field("request") == request).to_pylist()
    if not events:
        known = sorted(set(table["request"].to_pylist()))
        raise ConfigError(f"{where} has no request {request}; it has {_few(known)}")
    return "".join(part for group in _groups(events) for part in _group(group, state, text))


class Shown:
    """Ids to escaped text."""

    def __init__(self, mask_id: int, strings: Callable[[list[int]], list[str]]) -> None:
        self.mask_id, self._strings = mask_id, strings

    def plain(self, ids: list[int]) -> str:
        """A run of tokens."""
        return escape("".join(self._strings(ids)))

    def one(self, token: int) -> str:
        """A single token, whose writing direction turns nothing around beside it."""
        return "▢" if token == self.mask_id else f"<bdi>{escape(self._strings([token])[0])}</bdi>"


def _groups(events: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    """Events of one step each; what closes, opens again or writes a block by itself."""
    group: list[dict[str, Any]] = []
    for event in events:
        same = group and all(event[name] == group[-1][name] for name in ("block", "step"))
        alone = {*CLOSING, "KV_WRITE", "END"}
        if group and (not same or (event["type"] in alone) != (group[-1]["type"] in alone)
                      or event["type"] in CLOSING):  # fmt: skip
            yield group
            group = []
        group.append(event)
    yield group


def _group(group: list[dict[str, Any]], state: Folded, text: Shown) -> list[str]:
    """Rows of the page, and the events folded into the state."""
    first = group[0]
    uids, ids = list(state.uids), dict(zip(state.uids, state.ids, strict=True))
    marks: dict[int, str] = {}
    said: list[str] = []
    state.begin()
    for event in group:
        kind, uid = event["type"], event["uid"]
        state.apply(
            CODE[kind], uid, event["left_uid"], event["old_id"], event["new_id"], event["length"]
        )
        if kind == "REOPEN":
            uids, ids = list(state.uids), dict(zip(state.uids, state.ids, strict=True))
        elif kind == "INSERT":
            at = uids.index(event["left_uid"]) + 1 if event["left_uid"] in uids else 0
            uids.insert(at, uid)
            ids[uid] = text.mask_id
        elif kind in ("FILL", "SUBSTITUTE"):
            ids[uid] = event["new_id"]
        if kind in ("INSERT", "FILL", "SUBSTITUTE", "DELETE"):
            marks[uid] = kind.lower()
            if event["step"] >= 0:
                said.append(_operation(event, text))
    locked = {u for u, held in zip(state.uids, state.locked, strict=True) if held}
    shown = "".join(
        f'<span class="{marks.get(u, "")}{" mask" if ids[u] == text.mask_id else ""}'
        f'{" locked" if u in locked else ""}">{text.one(ids[u])}</span>'
        for u in uids
    )
    kind = first["type"]
    if kind == "OPEN":
        held = " with text" if "fill" in marks.values() and not locked else ""
        opened = f"<h2>Block {first['block']}</h2><table><tr><td>open {first['length']}{held}</td>"
        return [f"{opened}<td>{shown}</td><td></td></tr>"]
    if kind in CLOSING:
        name = kind.lower().replace("_", " ")
        at = "" if first["gate"] != first["gate"] else f" P(complete) {first['gate']:.3f}"
        return [f"<tr><td>{name}</td><td></td><td>{first['length']} tokens{at}</td></tr></table>"]
    if kind == "REOPEN":
        why = f"mean AR probability {first['prob']:.3g} below {first['threshold']:.3g}"
        why = "<br>".join([why, *said])
        return [f"<table><tr><td>reopen</td><td>{shown}</td><td>{why}</td></tr>"]
    if kind in ("PROMPT", "KV_WRITE", "END"):
        return []
    return [f"<tr><td>step {first['step']}</td><td>{shown}</td><td>{'<br>'.join(said)}</td></tr>"]


def _operation(event: dict[str, Any], text: Shown) -> str:
    """An operation in words, with its numbers."""
    numbers = [f"p {event['prob']:.3f}"] if event["prob"] == event["prob"] else []
    if event["gate"] == event["gate"]:
        gate = {"INSERT": "missing", "FILL": "keep"}.get(event["type"], event["type"].lower())
        numbers.append(f"{gate} {event['gate']:.3f}")
    old = "" if event["old_id"] in (-1, text.mask_id) else f"“{text.one(event['old_id'])}” "
    new = "" if event["new_id"] in (-1, text.mask_id) else f"“{text.one(event['new_id'])}” "
    arrow = "→ " if old and new else ""
    return f"{event['type'].lower()} {old}{arrow}{new}<small>{', '.join(numbers)}</small>"


def write_page(
    path: Path, request: int, out: Path, strings: Callable[[list[int]], list[str]]
) -> None:
    """Write the page of one request.

    Raises:
        ArtifactError: `out` is a folder.
        ConfigError: the log has no such request.
    """
    if out.is_dir():
        raise ArtifactError(f"{out} is a folder; name a file for the page")
    write_text(out, page(path, request, strings))


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + ("" if len(numbers) <= 8 else f" … {numbers[-1]}")
