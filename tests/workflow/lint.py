"""`snakemake --lint`, less the one advice that does not fit here; run by `make check`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile

ACCEPTED = {
    # One pinned environment (envs/) serves every rule and makes the driver itself; a second one
    # per rule could only differ from it.
    "Specify a conda environment or container for each rule.",
}


def main() -> int:
    """Print what is left of the lints; 1 when there is any, or when linting itself failed."""
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, "-m", "snakemake", "--lint", "--config", f"results={results}"]
        done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    titles = re.findall(r"^ +\* (.+?):?$", text, flags=re.MULTILINE)
    left = sorted({title.removesuffix(":") for title in titles} - ACCEPTED)
    if left or (done.returncode and not titles):
        print(text)
        print("snakemake --lint:", "; ".join(left) or f"failed with {done.returncode}")
        return 1
    print("snakemake --lint: nothing beyond what tests/workflow/lint.py accepts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
