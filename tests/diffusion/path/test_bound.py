"""The block bound on a world that can be enumerated: validity, tightness, and what would break it.

The table is that of the method's check (docs/method.md): three equally likely strings over {a, b}.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from abf.diffusion.path.bound import insert_rate, substitute_rate
from abf.diffusion.path.law import Statuses
from tests.diffusion.path.package import (
    best_starts,
    bounds,
    drawn,
    integrand,
    law_of,
    rates,
    start_nats,
    states,
)
from tests.diffusion.path.toy import (
    Answer,
    Array,
    Text,
    World,
    nodes,
    optimal_model,
    random_model,
)

WORLDS = [
    World(2, 2, late=0.0, wrong=0.0),
    World(2, 2, late=0.2, wrong=0.0),
    World(2, 2, late=1.0, wrong=0.0),
    World(2, 2, late=0.15, wrong=0.1),
    World(3, 2, late=0.3, wrong=0.2),
    World(2, 3, late=0.2, wrong=0.1),
]
NESTED: dict[Text, float] = {(0,): 1 / 3, (1,): 1 / 3, (0, 1): 1 / 3}
TURNED: dict[Text, float] = {(0,): 1 / 3, (0, 1): 1 / 3, (1, 0): 1 / 3}


def starts_of(world: World, seed: int) -> Array:
    numbers = np.random.default_rng(seed).random(world.longest + 1)
    return numbers / numbers.sum()


def mean(world: World, data: dict[Text, float]) -> dict[str, float]:
    """Mean bounds of the model that is best for the data."""
    model, starts = optimal_model(world, data), best_starts(world, data)
    found = [bounds(world, model, starts, y) for y in data]
    return {name: float(np.mean([b[name] for b in found])) for name in found[0]}


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_the_integrand_is_its_definition(world: World) -> None:
    for seed, y in enumerate([(0,) * world.longest, (0, 1), (1,), ()]):
        model = random_model(world, seed)
        for tau in (0.01, 0.4, 2.5):
            at = states(world, y, np.array([tau]))
            said = rates(world, model, at)
            expected = world.by_definition(model, y, tau)
            found = {
                "unpooled": integrand(world, said, at, at.known, pooled=False),
                "known": integrand(world, said, at, at.known),
                "aligned": integrand(world, said, at, at.expected),
            }
            for name, nats in found.items():
                # The oracle integrates the columns' law by Simpson's rule.
                assert float((at.weight * nats).sum()) == pytest.approx(expected[name], abs=1e-7)


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_no_text_is_likelier_than_its_bound_says(world: World) -> None:
    for seed in range(4 - world.longest):
        model, starts = random_model(world, seed), starts_of(world, seed)
        likelihood = world.likelihood(model, starts)
        assert sum(likelihood.values()) == pytest.approx(1, abs=1e-9)
        total = 0.0
        for y, probability in likelihood.items():
            found = bounds(world, model, starts, y, count=40)
            assert found["aligned"] >= -math.log(probability) - 1e-6
            assert found["known"] >= found["aligned"] - 1e-9
            assert found["unpooled"] >= found["known"] - 1e-9
            total += math.exp(-found["aligned"])
        assert total <= 1 + 1e-6


@pytest.mark.parametrize(
    ("data", "late", "known", "unpooled"),
    [
        (NESTED, 0.0, 1.0986, 1.0986),
        (NESTED, 0.05, 1.1099, 1.1211),
        (NESTED, 0.2, 1.1402, 1.1818),
        (NESTED, 1.0, 1.2141, 1.3297),
        (TURNED, 0.05, 1.1211, 1.1437),
        (TURNED, 0.2, 1.1818, 1.2650),
        (TURNED, 1.0, 1.3297, 1.5607),
    ],
)
def test_the_table_of_the_toy(
    data: dict[Text, float], late: float, known: float, unpooled: float
) -> None:
    found = mean(World(2, 2, late, wrong=0.0), data)
    assert found["aligned"] == pytest.approx(math.log(3), abs=1e-6)
    assert found["known"] == pytest.approx(known, abs=6e-5)
    assert found["unpooled"] == pytest.approx(unpooled, abs=6e-5)


@pytest.mark.parametrize("data", [NESTED, TURNED])
def test_the_table_from_states_that_the_package_draws(data: dict[Text, float]) -> None:
    """Each number, and, on the same draws and so more sharply, what lies between them."""
    world, count = World(2, 2, late=0.2, wrong=0.0), 4000
    model, starts, exact = optimal_model(world, data), best_starts(world, data), mean(world, data)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in exact}
    for seed, y in enumerate(data):
        at = drawn(world, y, count, seed)
        said, start = rates(world, model, at), start_nats(world, starts, y)
        for name in exact:
            alignment = at.expected if name == "aligned" else at.known
            nats = integrand(world, said, at, alignment, pooled=name != "unpooled")
            found[name].append(start + nats * at.weight * count)
    each = {name: torch.cat(values) for name, values in found.items()}
    for name in exact:
        assert_mean(each[name], exact[name])
        assert_mean(each["unpooled"] - each[name], exact["unpooled"] - exact[name])


def assert_mean(values: torch.Tensor, wanted: float) -> None:
    error = float(values.std()) / math.sqrt(len(values))
    assert error < 0.05
    assert float(values.mean()) == pytest.approx(wanted, abs=4.5 * error + 1e-12)


def test_the_best_model_has_the_datas_law_and_wrong_fills_leave_a_small_gap() -> None:
    world = World(2, 2, late=0.2, wrong=0.1)
    found = world.likelihood(optimal_model(world, TURNED), best_starts(world, TURNED))
    for y, probability in found.items():
        assert probability == pytest.approx(TURNED.get(y, 0.0), abs=2e-4)
    gap = mean(world, TURNED)["aligned"] - math.log(3)
    assert 0.004 < gap < 0.02


def test_the_slack_of_known_columns_does_not_depend_on_the_model() -> None:
    world, y = World(2, 3, late=0.2, wrong=0.1), (0, 0, 1)
    slack = []
    for seed in range(2):
        found = bounds(world, random_model(world, seed), starts_of(world, seed), y)
        slack.append(found["known"] - found["aligned"])
    assert slack[0] > 0.01
    assert slack[0] == pytest.approx(slack[1], rel=1e-9)


@pytest.mark.parametrize("power", [1, 3])
def test_any_schedule_gives_the_same_bound(power: int) -> None:
    """Time is only a name: b(t) = t^power changes where the states are met, not the integral."""
    world, y = World(2, 2, late=0.2, wrong=0.1), (0, 1)
    model, starts = random_model(world, 5), starts_of(world, 5)
    x, w = np.polynomial.legendre.leggauss(120)
    # Close to t = 1 the hazard b'/(1-b) is large and the states are finished.
    t = 1 - ((x + 1) / 2) ** 2
    left = 1 - t**power
    hazard = power * t ** (power - 1) / left
    weights = dict(zip(-np.log(left), w / 2 * (x + 1) * hazard, strict=True))
    at = states(world, y, np.array(list(weights)))
    nats = integrand(world, rates(world, model, at), at, at.expected)
    total = float(sum(
        p * weights[tau] * n
        for p, tau, n in zip(at.weight.tolist(), at.times.tolist(), nats.tolist(), strict=True)
    ))  # fmt: skip
    expected = bounds(world, model, starts, y)["aligned"] - start_nats(world, starts, y)
    assert total == pytest.approx(expected, abs=1e-5)


def test_rates_move_within_a_group_of_gaps_and_no_further() -> None:
    world = World(2, 3, late=0.3, wrong=0.1)
    at = states(world, (0, 1, 1), np.array([0.7]))
    said = rates(world, random_model(world, 1), at)
    nats = integrand(world, said, at, at.expected)
    (run,) = (i for i, s in enumerate(at.texts) if s == (world.mask, 0) and at.known.absent[i, 0])
    moved = said.insert.clone()
    moved[run, 0], moved[run, 1] = said.insert[run, 1], said.insert[run, 0]
    assert integrand(world, replace(said, insert=moved), at, at.expected)[run] == pytest.approx(
        float(nats[run]), abs=1e-12
    )
    moved[run, 1], moved[run, 2] = moved[run, 2].clone(), moved[run, 1].clone()
    assert (
        abs(integrand(world, replace(said, insert=moved), at, at.expected)[run] - nats[run]) > 1e-3
    )


def test_rates_that_die_out_keep_the_bound_finite_and_rates_that_do_not_make_it_infinite() -> None:
    world, y = World(2, 3, late=0.2, wrong=0.2), (0, 1)
    law = law_of(world)
    totals: dict[bool, list[float]] = {True: [], False: []}
    for cut in (8.0, 16.0, 32.0):
        x, w = np.polynomial.legendre.leggauss(80)
        times = (x + 1) / 2 * cut
        at = states(world, y, times)
        said = rates(world, random_model(world, 2), at)
        by_time = dict(zip(times.tolist(), (w / 2 * cut).tolist(), strict=True))
        weight = at.weight * torch.tensor([by_time[t] for t in at.times.tolist()]).double()
        ones = torch.ones_like(said.insert)
        for dies, insert, again in (
            (
                True,
                insert_rate(ones, ones, at.times[:, None]),
                substitute_rate(ones[:, 1:], law, _column_of(law.statuses(at.times))),
            ),
            (False, ones, ones[:, 1:] / 2),
        ):
            changed = replace(said, insert=insert, substitute=again)
            nats = integrand(world, changed, at, at.expected)
            totals[dies].append(float((weight * nats).sum()))
    assert totals[True][2] == pytest.approx(totals[True][1], abs=1e-4)
    # Two gaps and two tokens that are never left alone: so much more for each unit of time.
    assert totals[False][2] - totals[False][1] > 16


def _column_of(found: Statuses) -> Statuses:
    """Statuses with an axis for the slots."""
    return Statuses(*(value[:, None] for value in vars(found).values()))


def test_what_happens_on_a_path_adds_up() -> None:
    """Over all time: n p_D insertions, n fills, n p_u (1 - 1/V) corrections."""
    world, y = World(3, 3, late=0.3, wrong=0.2), (0, 2, 2)
    times, weights = nodes(60)
    at = states(world, y, times)
    by_time = dict(zip(times.tolist(), weights.tolist(), strict=True))
    weight = at.weight * torch.tensor([by_time[tau] for tau in at.times.tolist()]).double()
    exists = torch.arange(at.text.shape[1]) < at.slots[:, None]
    masks = ((at.text == world.mask) & exists).sum(dim=1)
    held = at.known.column @ (at.clean.double()[..., None])
    wrong = ((held[..., 0] != at.text) & (at.text != world.mask) & exists).sum(dim=1)
    assert float((weight * at.known.absent.sum(dim=1)).sum()) == pytest.approx(0.9, abs=1e-5)
    assert float((weight * at.expected.absent.sum(dim=1)).sum()) == pytest.approx(0.9, abs=1e-5)
    assert float((weight * masks).sum()) == pytest.approx(3, abs=1e-5)
    assert float((weight * wrong).sum()) == pytest.approx(3 * 0.2 * 2 / 3, abs=1e-4)


def test_one_token_is_exact_without_time_and_looser_with_it() -> None:
    world, y = World(2, 1, late=0.0, wrong=0.0), (0,)
    drawn = random_model(world, 3)

    def timed(s: Text, tau: float) -> Answer:
        return replace(drawn(s, tau), substitute=np.zeros(len(s)))

    def timeless(s: Text, tau: float) -> Answer:
        return timed(s, 0.0)

    starts = np.array([0.0, 1.0])
    exact = -math.log(timed((world.mask,), 0.0).token[0, 0])
    assert bounds(world, timeless, starts, y)["aligned"] == pytest.approx(exact, abs=1e-7)
    likelihood = world.likelihood(timed, starts)[y]
    assert bounds(world, timed, starts, y)["aligned"] > -math.log(likelihood) + 1e-4


MUTANTS = ("no compensator of insertion", "mean of a group", "no S on right tokens", "no log S",
           "length charged at n", "clipped weight")  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_formulas_are_no_bounds(mutant: str) -> None:
    """On the data's best model the bound is tight, so that a term too few shows."""
    world = World(2, 2, late=0.2, wrong=0.0 if "S" not in mutant else 0.1)
    model, starts = optimal_model(world, NESTED), best_starts(world, NESTED)
    if mutant == "length charged at n":
        starts = np.array([0, 2 / 3, 1 / 3])  # a head that learned lengths, not starts
    likelihood = world.likelihood(model, starts)
    times, weights = nodes(60)
    below = 0.0
    for y in NESTED:
        at = states(world, y, times)
        said = rates(world, model, at)
        weight = dict(zip(times.tolist(), weights.tolist(), strict=True))
        if mutant == "clipped weight":
            # Uniform t with 1/(1-t) cut at 5: times beyond log 5 count for less.
            weight = {tau: w * min(1.0, 5 * math.exp(-tau)) for tau, w in weight.items()}
        nats = integrand(world, said, at, at.expected)
        exists = torch.arange(at.text.shape[1]) < at.slots[:, None]
        if mutant == "no compensator of insertion":
            nats = nats - said.insert.sum(dim=1)
        if mutant == "mean of a group":
            masks = ((at.text == world.mask) & exists).sum(dim=1)
            alone = masks == at.slots  # one group: the text shows no token
            asked = said.insert.sum(dim=1)
            due = at.expected.absent.sum(dim=1)
            gaps = at.slots + 1
            mean_rate = asked / gaps
            change = mean_rate - asked - due * torch.log((mean_rate / asked).clamp(min=1e-300))
            nats = nats + torch.where(alone & (asked > 0), change, 0.0)
        if mutant == "no S on right tokens":
            right = (at.text != world.mask) & exists
            nats = nats - torch.where(right, said.substitute * (1 - said.own), 0.0).sum(dim=1)
        if mutant == "no log S":
            other = at.text[:, :, None] != at.clean[:, None, :]
            change = torch.where(other, at.expected.column, 0.0).sum(dim=2)
            seen = (at.text != world.mask) & exists & (change > 0)
            nats = nats + torch.where(seen, torch.xlogy(change, said.substitute), 0.0).sum(dim=1)
        start = start_nats(world, starts, y)
        if mutant == "length charged at n":
            start = -math.log(starts[len(y)])
        each = torch.tensor([weight[tau] for tau in at.times.tolist()]).double()
        bound = start + float((at.weight * each * nats).sum())
        below = max(below, -math.log(likelihood[y]) - bound)
    assert below > 1e-3, f"{mutant} was never caught"


def test_the_gradient_is_finite_where_rates_are_zero() -> None:
    world = World(2, 2, late=0.0, wrong=0.0)
    at = states(world, (0, 1), np.array([0.5]))
    said = rates(world, random_model(world, 0), at)
    token = said.token.clone().requires_grad_()
    insert = torch.zeros_like(said.insert, requires_grad=True)
    integrand(world, replace(said, token=token, insert=insert), at, at.known).sum().backward()
    assert token.grad is not None
    assert torch.isfinite(token.grad).all()
    assert insert.grad is not None
    assert torch.isfinite(insert.grad).all()
