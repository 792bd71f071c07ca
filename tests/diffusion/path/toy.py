"""A world small enough to enumerate: every text, every jump, every state of every column.

Nothing here is the package's: path and model are written down jump by jump, so that the package's
bound can be held against definitions. MASK is V; texts are tuples.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Text = tuple[int, ...]
Jumps = dict[Text, float]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """What a model says at a text and a time."""

    insert: Array
    """[m+1]"""
    token: Array
    """[m, V] probabilities."""
    substitute: Array
    """[m]"""


Model = Callable[[Text, float], Answer]


@dataclass(frozen=True)
class World:
    """V, N, p_D and p_u."""

    vocab: int
    longest: int
    late: float
    wrong: float

    @property
    def mask(self) -> int:
        return self.vocab

    def texts(self) -> list[Text]:
        """Every string of tokens and MASKs."""
        return [
            text
            for length in range(self.longest + 1)
            for text in itertools.product(range(self.vocab + 1), repeat=length)
        ]

    def finished(self) -> list[Text]:
        return [text for text in self.texts() if self.mask not in text]

    # --- the path --------------------------------------------------------------------------

    def column(self, tau: float) -> dict[str, float]:
        """Law of one column, by the waiting times themselves: integrals over two exponentials."""
        grid = np.linspace(0, tau, 4001)
        begun = self.late * np.exp(-grid)  # density of insertion at grid
        wait = tau - grid

        def convolve(stay: Array) -> float:
            values = begun * stay
            h = grid[1] - grid[0] if tau else 0.0
            return float(h / 3 * (values[0] + values[-1] + 4 * values[1:-1:2].sum()
                                  + 2 * values[2:-1:2].sum()))  # fmt: skip

        masked = (1 - self.late) * math.exp(-tau) + convolve(np.exp(-wait))
        unsettled = (1 - self.late) * tau * math.exp(-tau) + convolve(wait * np.exp(-wait))
        return {"absent": self.late * math.exp(-tau), "masked": masked,
                "each": self.wrong / self.vocab * unsettled}  # fmt: skip

    def columns(self, y: Text, tau: float) -> Iterator[tuple[tuple[int | None, ...], float]]:
        """Contents of all columns (None: absent) and their probability."""
        law = _column(self, tau)
        clean = 1 - law["absent"] - law["masked"] - (self.vocab - 1) * law["each"]
        choices = [
            [(None, law["absent"]), (self.mask, law["masked"])]
            + [(v, clean if v == token else law["each"]) for v in range(self.vocab)]
            for token in y
        ]
        for one in itertools.product(*choices):
            probability = math.prod(p for _, p in one)
            if probability > 0:
                yield tuple(v for v, _ in one), probability

    def fill(self, token: int) -> Array:
        """q: what a fill of a column brings."""
        return (1 - self.wrong) * np.eye(self.vocab)[token] + self.wrong / self.vocab

    def path_jumps(self, y: Text, z: tuple[int | None, ...]) -> dict[tuple[Text, int], float]:
        """Rates by the text they lead to and the gap they use (-1: none)."""
        out: dict[tuple[Text, int], float] = defaultdict(float)
        for i, held in enumerate(z):
            gap = sum(v is not None for v in z[:i])
            if held is None:
                out[strip((*z[:i], self.mask, *z[i + 1 :])), gap] += 1.0
            elif held == self.mask:
                for v, rate in enumerate(self.fill(y[i])):
                    out[strip((*z[:i], v, *z[i + 1 :])), -1] += float(rate)
            elif held != y[i]:
                out[strip((*z[:i], y[i], *z[i + 1 :])), -1] += 1.0
        return out

    # --- the model -------------------------------------------------------------------------

    def model_jumps(self, model: Model, s: Text, tau: float) -> dict[tuple[Text, int], float]:
        """Rates of the model by the text they lead to and the gap they use."""
        out: dict[tuple[Text, int], float] = defaultdict(float)
        said = model(s, tau)
        if len(s) < self.longest:
            for k in range(len(s) + 1):
                out[(*s[:k], self.mask, *s[k:]), k] += float(said.insert[k])
        for k, held in enumerate(s):
            for v in range(self.vocab):
                changed = (*s[:k], v, *s[k + 1 :])
                if held == self.mask:
                    rate = (1 - self.wrong) * said.token[k, v] + self.wrong / self.vocab
                    out[changed, -1] += float(rate)
                elif v != held:
                    out[changed, -1] += float(said.substitute[k] * said.token[k, v])
        return out

    def likelihood(self, model: Model, starts: Array, *, end: float = 45.0) -> dict[Text, float]:
        """p(y) of every finished text, by the forward equation (RK4, steps growing with time)."""
        texts = self.texts()
        index = {text: i for i, text in enumerate(texts)}

        def generator(tau: float) -> Array:
            matrix = np.zeros((len(texts), len(texts)))
            for text, row in index.items():
                for (other, _), rate in self.model_jumps(model, text, tau).items():
                    matrix[row, index[other]] += rate
                    matrix[row, row] -= rate
            return matrix

        p = np.zeros(len(texts))
        for length, probability in enumerate(starts):
            p[index[(self.mask,) * length]] = probability
        times = np.concatenate([np.linspace(0, 6, 241), np.linspace(6, end, 241)[1:]])
        before = generator(0.0)
        for a, b in itertools.pairwise(times):
            h, middle, after = b - a, generator((a + b) / 2), generator(b)
            k1 = p @ before
            k2 = (p + h / 2 * k1) @ middle
            k3 = (p + h / 2 * k2) @ middle
            k4 = (p + h * k3) @ after
            p = p + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            before = after
        return {text: float(p[index[text]]) for text in self.finished()}

    # --- the integrand, from its definition --------------------------------------------------

    def by_definition(self, model: Model, y: Text, tau: float) -> dict[str, float]:
        """Columns known, gaps apart; columns known; expected given the text."""
        unpooled = known = aligned = 0.0
        expected: dict[Text, Jumps] = defaultdict(lambda: defaultdict(float))
        weight: Jumps = defaultdict(float)
        for z, p in self.columns(y, tau):
            s = strip(z)
            asked = self.model_jumps(model, s, tau)
            due = self.path_jumps(y, z)
            unpooled += p * sum(phi(due.get(c, 0.0), asked.get(c, 0.0)) for c in {*due, *asked})
            merged = by_text(due)
            known += p * divergence(merged, by_text(asked))
            weight[s] += p
            for text, rate in merged.items():
                expected[s][text] += p * rate
        for s, p in weight.items():
            mean = {text: rate / p for text, rate in expected[s].items()}
            aligned += p * divergence(mean, by_text(self.model_jumps(model, s, tau)))
        return {"unpooled": unpooled, "known": known, "aligned": aligned}


@functools.cache
def _column(world: World, tau: float) -> dict[str, float]:
    return world.column(tau)


def strip(z: tuple[int | None, ...]) -> Text:
    return tuple(v for v in z if v is not None)


def by_text(jumps: Mapping[tuple[Text, int], float]) -> Jumps:
    out: Jumps = defaultdict(float)
    for (text, _), rate in jumps.items():
        out[text] += rate
    return out


def phi(due: float, asked: float) -> float:
    if due == 0:
        return asked
    return math.inf if asked == 0 else due * math.log(due / asked) - due + asked


def divergence(due: Mapping[Text, float], asked: Mapping[Text, float]) -> float:
    return sum(phi(due.get(text, 0.0), asked.get(text, 0.0)) for text in {*due, *asked})


def random_model(world: World, seed: int) -> Model:
    """Rates that are some smooth function of text and time and die out at the end."""

    @functools.cache
    def numbers(s: Text) -> tuple[Array, ...]:
        rng = np.random.default_rng([seed, *s, 99])
        m = len(s)
        return (rng.normal(size=m + 1), rng.normal(size=m + 1), rng.normal(size=(m, world.vocab)),
                rng.normal(size=(m, world.vocab)), rng.normal(size=m))  # fmt: skip

    def model(s: Text, tau: float) -> Answer:
        size, decay, still, moving, again = numbers(s)
        scores = np.exp(still + moving * math.exp(-tau))
        return Answer(
            insert=np.log1p(np.exp(size)) / (1 + np.exp(tau - decay)),
            token=scores / scores.sum(axis=1, keepdims=True),
            substitute=math.exp(-tau / 2) / (1 + np.exp(-again)),
        )

    return model


def optimal_model(world: World, data: Mapping[Text, float]) -> Model:
    """The data's own marginal rates: expected path rates given text and time."""

    @functools.cache
    def at(tau: float) -> tuple[dict[Text, dict[tuple[Text, int], float]], Jumps]:
        rates: dict[Text, dict[tuple[Text, int], float]] = defaultdict(lambda: defaultdict(float))
        weight: Jumps = defaultdict(float)
        for y, share in data.items():
            for z, p in world.columns(y, tau):
                s = strip(z)
                weight[s] += share * p
                for channel, rate in world.path_jumps(y, z).items():
                    rates[s][channel] += share * p * rate
        return rates, weight

    def model(s: Text, tau: float) -> Answer:
        rates, weight = at(tau)
        if s not in weight:  # the path never comes here
            uniform = np.full((len(s), world.vocab), 1 / world.vocab)
            return Answer(np.zeros(len(s) + 1), uniform, np.zeros(len(s)))
        found = {c: rate / weight[s] for c, rate in rates[s].items()}
        insert = np.array([found.get(((*s[:k], world.mask, *s[k:]), k), 0.0)
                           for k in range(len(s) + 1)])  # fmt: skip
        token, again = np.zeros((len(s), world.vocab)), np.zeros(len(s))
        for k, held in enumerate(s):
            row = np.array([found.get(((*s[:k], v, *s[k + 1 :]), -1), 0.0)
                            for v in range(world.vocab)])  # fmt: skip
            if held == world.mask:
                token[k] = (row - world.wrong / world.vocab) / (1 - world.wrong)
            else:
                again[k] = row.sum()
                token[k] = row / again[k] if again[k] else np.full(world.vocab, 1 / world.vocab)
        return Answer(insert, token.clip(0), again)

    return model


def nodes(count: int) -> tuple[Array, Array]:
    """Times and weights of an integral over tau: Gauss-Legendre in v, tau = -2 log v."""
    x, w = np.polynomial.legendre.leggauss(count)
    v = (x + 1) / 2
    return -2 * np.log(v), w / 2 * 2 / v
