"""What tells two stage directories apart: configuration keys, over all that they are made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from abf.seeing.planned import Document, Planned, inputs_of, slug
from abf.stage import DONE
from abf.stages import MANIFEST

LONGEST = 60
"""Characters of a value that are shown."""
ABSENT = object()


def changed_keys(before: Document, after: Document) -> list[str]:
    """`train.optim.lr: 0.1 -> 0.2` for every configuration key that differs, own keys only."""
    return [
        f"{_spoken(after, name)}: {_value(old)} -> {_value(new)}"
        for name, old, new in _changes(before["config"], after["config"], "")
    ]


def changed_inputs(before: Document, after: Document) -> list[str]:
    """`input scores: + score/x` and `- score/y` for every input that differs."""
    old, new = inputs_of(before), inputs_of(after)
    lines = []
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name, []), new.get(name, [])
        lines += [f"input {name}: + {place}" for place in now if place not in was]
        lines += [f"input {name}: - {place}" for place in was if place not in now]
    return lines


def _changes(before: Any, after: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            inner = f"{name}.{key}" if name else key
            yield from _changes(before.get(key, ABSENT), after.get(key, ABSENT), inner)
    elif before is ABSENT or after is ABSENT or before != after:
        yield name, before, after


def _value(value: Any) -> str:
    if value is ABSENT:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _spoken(document: Document, name: str) -> str:
    """A key of a stage's configuration as it is written in a study file."""
    head, dot, rest = name.partition(".")
    if document["stage"] == "decode":
        task, _, decoder = slug(document["key"]).rpartition("/")[2].partition(".")
        head = {"task": f"tasks.{task}", "decoder": f"decoders.{decoder}"}.get(head, head)
    known = {"objective": "train.objective", "source": "sources", "max_block": "pack.max_block"}
    return known.get(head, head) + dot + rest


class Differences:
    """Compares directories of a results folder by what they and all their inputs read."""

    def __init__(self, planned: Planned) -> None:
        self.planned = planned
        self._known: dict[tuple[str, str], tuple[str, ...]] = {}

    def between(self, before: str, after: str) -> tuple[str, ...]:
        """Every key that differs, the directory's own first, each once."""
        if before == after:
            return ()
        known = self._known.get((before, after))
        if known is None:
            known = self._known[before, after] = tuple(dict.fromkeys(self._all(before, after)))
        return known

    def _all(self, before: str, after: str) -> Iterator[str]:
        old, new = self.planned.document(before), self.planned.document(after)
        if old is None or new is None:
            yield f"{before} -> {after}"
            return
        yield from changed_keys(old, new)
        was, now = inputs_of(old), inputs_of(new)
        for name in dict.fromkeys([*was, *now]):
            gone = [place for place in was.get(name, []) if place not in now.get(name, [])]
            come = [place for place in now.get(name, []) if place not in was.get(name, [])]
            for place in list(come):
                # Like with like: a task's decode with the same task's.
                if twin := next((g for g in gone if _kind(g) == _kind(place)), None):
                    gone.remove(twin)
                    come.remove(place)
                    yield from self.between(twin, place)
            for left, right in zip(gone, come, strict=False):
                yield from self.between(left, right)
            paired = min(len(gone), len(come))
            yield from (f"input {name}: + {place}" for place in come[paired:])
            yield from (f"input {name}: - {place}" for place in gone[paired:])

    def nearest(self, place: str, others: list[str]) -> tuple[str, tuple[str, ...]] | None:
        """The directory with the fewest differences to `place`, of its own kind if there is one."""
        own = [other for other in others if _kind(other) == _kind(place)] or others
        found = [(self.between(other, place), other) for other in own if other != place]
        if not found:
            return None
        keys, other = min(found, key=lambda pair: (len(pair[0]), pair[1]))
        return other, keys


def finished_places(results: Path, stage: str) -> list[str]:
    """Finished directories of a stage, planned or not, declared or not."""
    folder, depth = results / stage, "*/*" if stage == "decode" else "*"
    declared = [path.parent for path in folder.glob(f"{depth}/{MANIFEST}")]
    done = [path.parent.parent for path in folder.glob(f"{depth}/{DONE}/{MANIFEST}")]
    own = {path for path in [*declared, *done] if path.name != DONE}
    return sorted(path.relative_to(results).as_posix() for path in own)


def _kind(place: str) -> str:
    """What a directory is of, its hashes and, for a decoding, its training apart."""
    stage, _, key = place.partition("/")
    return f"{stage}/{slug(key).rpartition('/')[2]}"
