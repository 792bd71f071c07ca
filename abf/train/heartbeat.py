"""Signs of life of every rank, so that one that died or hangs can be named by the others.

The communication library reports a lost peer by address, or only that time ran out. Each rank's
thread therefore writes every second into the store through which the ranks met: a count, the host,
and where in the code the training is. When a collective fails, the others read them twice: who
stopped counting is gone, and who counts but is not itself waiting for others hangs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

BEAT_S = 1.0
"""Seconds between two signs of life."""
LOOK_S = 3.0
"""Seconds over which a rank must be seen to live."""
_COLLECTIVES = str(Path(torch.__file__).parent / "distributed") + os.sep
_DEPTH = 4
"""A wait's innermost frames may be those of wrappers."""


class Heartbeat:
    """Context in which this rank shows that it lives."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size
        self._trained_by = threading.main_thread().ident
        self._asking = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._hosts: dict[int, str] = {}

    def say(self, text: str) -> None:
        """Leave last words: why this rank ends. Empty: others are to blame."""
        try:
            self._store.set(f"abf/end/{self.rank}", text)
        except RuntimeError as error:  # whoever keeps the store is gone, and nobody can listen
            print(f"rank {self.rank}: last words went unheard ({error})", file=sys.stderr)

    def blame(self) -> str | None:
        """Which ranks died or hang, in words; none when all the others live and wait.

        Takes a few seconds. A SIGTERM meanwhile is what a launcher sends when it noticed, too.
        """
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._asking = True
        try:
            self._beat(0)
            first = self._look()
            time.sleep(LOOK_S)
            faults = self._faults(first, self._look())
            if self.rank == 0:
                time.sleep(LOOK_S)  # the others may still read in a store that this process keeps
        except RuntimeError as error:
            told = str(error).partition("\n")[0]
            return f"rank 0{self._on(0)} is gone, and the store that it kept ({told})"
        finally:
            signal.signal(signal.SIGTERM, before)
        return "; ".join(faults) or None

    def _faults(
        self, first: list[dict[str, Any] | None], second: list[dict[str, Any] | None]
    ) -> list[str]:
        faults = []
        for rank, (then, now) in enumerate(zip(first, second, strict=True)):
            if rank == self.rank or (now is not None and now.get("end") == ""):
                continue
            name = f"rank {rank}{self._on(rank)}"
            if now is not None and now.get("end"):
                faults.append(f"{name} ended: {now['end']}")
            elif now is None or then is None or now["beat"] == then["beat"]:
                faults.append(f"{name} gave no sign of life for {LOOK_S:.0f} s: killed, or stopped")
            elif now["busy"] and not now["asking"]:
                faults.append(f"{name} hangs, or takes too long, in {now['where']}")
        return faults

    def _on(self, rank: int) -> str:
        return f" on {self._hosts[rank]}" if rank in self._hosts else ""

    def _look(self) -> list[dict[str, Any] | None]:
        """What each rank last showed, with its last words as `end` if it has left any."""
        found: list[dict[str, Any] | None] = []
        for rank in range(self.size):
            shown = self._read(f"abf/beat/{rank}")
            known = None if shown is None else json.loads(shown)
            words = self._read(f"abf/end/{rank}")
            if known is not None:
                self._hosts[rank] = known["host"]
                known |= {} if words is None else {"end": words}
            found.append(known)
        return found

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_S):
            count += 1
            try:
                self._beat(count)
            except RuntimeError:
                return  # no store, no listeners; the training's own collective says the rest

    def _beat(self, count: int) -> None:
        frame, busy = self._place()
        shown = {
            "beat": count,
            "host": socket.gethostname(),
            "asking": self._asking,
            "busy": busy,
            "where": f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})",
        }
        self._store.set(f"abf/beat/{self.rank}", json.dumps(shown))

    def _place(self) -> tuple[FrameType, bool]:
        """Innermost frame of the training, and whether it is at work, not waiting for others."""
        frames = sys._current_frames()
        assert self._trained_by is not None
        frame = frames[self._trained_by]
        if frame.f_code.co_filename == threading.__file__:  # waits for a checkpoint's thread
            writers = [t.ident for t in threading.enumerate() if t.name.startswith("checkpoint")]
            frame = next((frames[w] for w in writers if w in frames), frame)
        inner, busy = frame, True
        for _ in range(_DEPTH):
            busy = busy and not frame.f_code.co_filename.startswith(_COLLECTIVES)
            if frame.f_back is None:
                break
            frame = frame.f_back
        return inner, busy

    def __enter__(self) -> Heartbeat:
        self._beat(0)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
