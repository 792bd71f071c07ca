"""Which files a pattern names; standard library only, since the planner asks too."""

from __future__ import annotations

import glob
from pathlib import Path


def matching_files(pattern: str) -> list[Path]:
    """The file itself, the files right below a folder, or the files a glob matches, by name."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    inside = glob.escape(pattern) + "/*" if path.is_dir() else pattern
    found = sorted(Path(name) for name in glob.glob(inside, recursive=True))
    return [path for path in found if path.is_file()]
