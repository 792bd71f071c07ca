"""Notes every attempt of a Python process to reach another one by address or by name.

Python imports it at start where this folder is on PYTHONPATH; one line an attempt goes into the
file that ATTEMPTS names. A library that swallows its failure is seen all the same.
"""

import os
import sys

EVENTS = frozenset(
    {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
)


def note(event: str, details: tuple[object, ...]) -> None:
    """An audit hook (PEP 578)."""
    if event in EVENTS:
        what = f"{event} {details[-1] if event == 'socket.connect' else details}"
        with open(os.environ["ATTEMPTS"], "a", encoding="utf-8") as file:
            file.write(f"{what} by {sys.argv}\n")


sys.addaudithook(note)
