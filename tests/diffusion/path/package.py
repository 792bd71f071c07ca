"""The package's bound at every state of a toy world, as integrals over tau."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from abf.diffusion.path.align import Alignment, one_alignment, posterior
from abf.diffusion.path.bound import Rates, path_nats
from abf.diffusion.path.law import ABSENT, MASKED, PathLaw
from tests.diffusion.path.toy import Array, Model, Text, World, nodes, strip


def law_of(world: World) -> PathLaw:
    return PathLaw(world.late, world.wrong, world.vocab)


@dataclass(frozen=True)
class States:
    """Every state of the columns of y at some times, as a batch with its probabilities."""

    y: Text
    times: torch.Tensor
    """[B]"""
    weight: torch.Tensor
    """[B] probability of the state at its time."""
    text: torch.Tensor
    slots: torch.Tensor
    clean: torch.Tensor
    columns: torch.Tensor
    known: Alignment
    expected: Alignment
    texts: list[Text]


def states(world: World, y: Text, times: Array) -> States:
    """All states at these times."""
    rows = [(float(tau), z, p) for tau in times for z, p in world.columns(y, float(tau))]
    return as_states(world, y, rows)


def drawn(world: World, y: Text, count: int, seed: int) -> States:
    """States that the package draws; their weighted sum has the integral as its expectation."""
    rng = np.random.default_rng(seed)
    v = rng.random((count, 1))
    tau = -2 * np.log(v)
    clean = np.broadcast_to(np.array(y, dtype=np.int64), (count, len(y)))
    held, token = law_of(world).draw(tau, clean, rng.random(clean.shape), rng.random(clean.shape))
    values = np.where(held == MASKED, world.mask, token)
    columns = [
        tuple(None if h == ABSENT else int(t) for h, t in zip(*pair, strict=True))
        for pair in zip(held.tolist(), values.tolist(), strict=True)
    ]
    rows = zip(tau[:, 0].tolist(), columns, (2 / v[:, 0] / count).tolist(), strict=True)
    return as_states(world, y, list(rows))


def as_states(
    world: World, y: Text, rows: list[tuple[float, tuple[int | None, ...], float]]
) -> States:
    """Times, contents of the columns, and weights as a batch."""
    texts = [strip(z) for _, z, _ in rows]
    m, n = max(len(y), 1), max(len(y), 1)  # a batch has at least one column of padding
    text = torch.zeros(len(rows), m, dtype=torch.int64)
    for row, s in enumerate(texts):
        text[row, : len(s)] = torch.tensor(s, dtype=torch.int64)
    clean = torch.zeros(len(rows), n, dtype=torch.int64)
    clean[:, : len(y)] = torch.tensor(y, dtype=torch.int64)
    columns = torch.full((len(rows),), len(y))
    slots = torch.tensor([len(s) for s in texts])
    present = torch.zeros(len(rows), n, dtype=torch.bool)
    for row, (_, z, _) in enumerate(rows):
        present[row, : len(y)] = torch.tensor([v is not None for v in z], dtype=torch.bool)
    real = torch.arange(n)[None, :] < columns[:, None]
    tau = torch.tensor([tau for tau, _, _ in rows], dtype=torch.float64)
    expected = posterior(
        clean, columns, text, slots, law_of(world).statuses(tau), mask_id=world.mask
    )
    return States(
        y, tau, torch.tensor([p for _, _, p in rows], dtype=torch.float64), text, slots, clean,
        columns, one_alignment(present, real, slots=m), expected, texts,
    )  # fmt: skip


def rates(world: World, model: Model, at: States) -> Rates:
    B, m = at.text.shape
    n = at.clean.shape[1]
    insert, substitute = torch.zeros(B, m + 1), torch.zeros(B, m)
    token, own, floor = torch.zeros(B, m, n), torch.zeros(B, m), torch.zeros(B, m)
    insert, substitute, token, own, floor = (
        x.double() for x in (insert, substitute, token, own, floor)
    )
    for row, (s, tau) in enumerate(zip(at.texts, at.times.tolist(), strict=True)):
        said = model(s, tau)
        if len(s) < world.longest:
            insert[row, : len(s) + 1] = torch.from_numpy(said.insert)
        if not s:
            continue
        with np.errstate(divide="ignore"):
            logs = torch.from_numpy(np.log(said.token))
            mixed = (1 - world.wrong) * said.token + world.wrong / world.vocab
            floor[row, : len(s)] = torch.from_numpy(np.log(mixed).mean(axis=1))
        substitute[row, : len(s)] = torch.from_numpy(said.substitute)
        token[row, : len(s)] = logs[:, at.clean[row]]
        held = torch.tensor(s).clamp(max=world.vocab - 1)
        own[row, : len(s)] = logs.exp().gather(1, held[:, None])[:, 0]
    return Rates(insert, substitute, token, own, floor)


def integrand(
    world: World, said: Rates, at: States, alignment: Alignment, *, pooled: bool = True
) -> torch.Tensor:
    """[B] nats, not yet weighted."""
    return path_nats(
        said, alignment, clean=at.clean, columns=at.columns, text=at.text, slots=at.slots,
        law=law_of(world), mask_id=world.mask, pooled=pooled,
    )  # fmt: skip


def start_nats(world: World, starts: Array, y: Text) -> float:
    with np.errstate(divide="ignore"):
        logs = torch.from_numpy(np.log(starts))[None]
    return float(law_of(world).length_nats(logs, torch.tensor([len(y)])))


def bounds(
    world: World, model: Model, starts: Array, y: Text, *, count: int = 60
) -> dict[str, float]:
    """The three bounds on -log p(y), nats."""
    times, weights = nodes(count)
    at = states(world, y, times)
    said = rates(world, model, at)
    by_time = dict(zip(times.tolist(), weights.tolist(), strict=True))
    each = torch.tensor([by_time[tau] for tau in at.times.tolist()], dtype=torch.float64)
    weight = at.weight * each
    start = start_nats(world, starts, y)
    return {
        "aligned": start + float((weight * integrand(world, said, at, at.expected)).sum()),
        "known": start + float((weight * integrand(world, said, at, at.known)).sum()),
        "unpooled": start
        + float((weight * integrand(world, said, at, at.known, pooled=False)).sum()),
    }


def best_starts(world: World, data: dict[Text, float]) -> Array:
    """The data's own law of the number of masks at the start."""
    starts = np.zeros(world.longest + 1)
    for y, share in data.items():
        for z in itertools.product((0, 1), repeat=len(y)):
            present = sum(z)
            starts[present] += (
                share * (1 - world.late) ** present * world.late ** (len(y) - present)
            )
    return starts
