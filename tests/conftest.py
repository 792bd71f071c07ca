"""For every test: one thread for each process, as `pytest -n` runs several beside each other."""

import os

# Before anything imports torch. Threads of OpenMP wait for each other actively: two processes with
# two each on two cores were measured ten times slower than with one each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
