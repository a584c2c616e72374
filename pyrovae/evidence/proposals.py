r"""Where an importance sampler's draws come from, as log weights of a block of data.

.. math:: p(x) = E_{r(z)} \left[ \frac{p(x, z)}{r(z)} \right]

for every r that can draw whatever the posterior may be: the guide, the guide made of other noise, a
mixture of the guide with the prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyrovae import program
from pyrovae.evidence.noise import Noise, Sobol
from pyrovae.evidence.space import summing
from pyrovae.evidence.walk import ROWS, Walk
from pyrovae.evidence.weights import weigher
from pyrovae.program import Args, PyroFunction

More = Callable[[Tensor, int, int], Tensor]
"""Log weights `(K, M)` of M data, from their numbers in a block, their draws so far and K."""

Proposal = Callable[[Args], More]
"""From a block's data to what draws for them."""

FEWEST = 2
"""Draws of each part of a mixture, at least: fewer have no error."""


def from_guide(walk: Walk, compile: bool | None = None) -> Proposal:
    """Draws from the guide.

    Args:
        walk: Data and programs.
        compile: As `weigher` has it.
    """
    weigh = weigher(walk, compile)
    model, guide = walk.programs.model, walk.programs.guide

    def proposal(args: Args) -> More:
        def more(data: Tensor, start: int, count: int) -> Tensor:
            if len(data) == len(args[0]) and count == walk.num_particles:
                return weigh(args)
            return program.log_weights(model, guide, _part(args, data), count, ROWS)

        return more

    return proposal


def from_noise(walk: Walk, widen: float, copies: int) -> Proposal:
    r"""Draws from the guide, made of other noise than its own.

    Noise s times as wide adds to a log weight

    .. math:: \log N(\epsilon; 0, I) - \log N(\epsilon; 0, s^2 I)
        = D \log s - \tfrac12 (1 - s^{-2}) |\epsilon|^2.

    Args:
        walk: Data and programs.
        widen: s.
        copies: Randomizations of the Sobol points that the noise is made of; 0 leaves it random.

    Raises:
        Refused: If the guide's noise is not normal, or of a site for each value of another.
    """
    model, guide = walk.programs.model, walk.programs.guide
    if widen != 1 and (summed := walk.on_few(lambda args: program.summed_out(guide, args))):
        raise program.Refused(
            f"the guide's site {min(summed)!r} is enumerated, and each of its values has noise of "
            "its own: leave widen=1, or leave the site out of the guide and mark it in the model"
        )
    noise = walk.on_few(lambda args: Noise(guide, args))

    def proposal(args: Args) -> More:
        points = Sobol(len(args[0]), noise.dim, copies) if copies else None

        def more(data: Tensor, start: int, count: int) -> Tensor:
            here = _part(args, data)
            sample, rows = program.sampler(guide, here), _Rows(here)

            def piece(first: int, k: int) -> Tensor:
                even = points(start + first, k, data) if points else None

                def source(random: Tensor, which: slice) -> Tensor:
                    return widen * (random if even is None else even[:, :, which])

                drawn, squares = noise.draw(sample, k, source)
                scores = program.score_sites(model, rows(k), drawn.values)
                log_w = program.sum_out(program.total(scores) - program.total(drawn.scores))
                widened = noise.dim * math.log(widen) - (1 - widen**-2) / 2 * squares
                return log_w.reshape(k, -1) + widened

            return _in_pieces(piece, count, len(data))

        return more

    return proposal


def from_mixture(walk: Walk, strata: Tensor) -> Proposal:
    r"""Draws from the guide and the prior, each weighed by the mixture of both.

    .. math:: w = \frac{p(x, z)}{(1 - a) \, q(z \mid x) + a \, p(z)}

    The prior is that of all latents, given what the model observes beside them. The mean weight is
    without bias, and no weight is above p(x|z) / a.

    Args:
        walk: Data and programs.
        strata: Of as many draws in a row as are made at a time, which are the prior's, shape
            `(K,)`: a is their share.

    Raises:
        Refused: If the guide scores only its own draws.
    """
    model, guide = walk.programs.model, walk.programs.guide
    summed = walk.on_few(lambda args: program.summed_out(guide, args))
    joint = summing(model, summed)
    log_a = math.log(int(strata.sum()) / len(strata))
    log_rest = math.log1p(-math.exp(log_a))

    def weigh(rows: Args, values: dict[str, Tensor], log_q: Tensor) -> Tensor:
        scores = program.score_sites(joint, rows, values)
        hidden = {name: score for name, score in scores.items() if not score.observed}
        log_pz = program.sum_out(program.total(hidden))
        log_mixture = torch.logaddexp(log_rest + log_q.flatten(), log_a + log_pz)
        return program.sum_out(program.total(scores)) - log_mixture

    def of_run(fn: PyroFunction, rows: Args) -> Tensor:
        values = program.ancestral(fn, rows)
        return weigh(rows, values, program.log_joint(guide, rows, values))

    try:
        walk.on_few(lambda args: of_run(joint, args))
    except (program.Refused, NotImplementedError) as error:
        raise program.Refused(f"{error}; or leave defensive=0") from error

    def proposal(args: Args) -> More:
        def more(data: Tensor, start: int, count: int) -> Tensor:
            here = _part(args, data)
            sample, rows = program.sampler(guide, here), _Rows(here)

            def of_guide(k: int) -> Tensor:
                if summed:
                    return of_run(guide, rows(k))
                drawn = sample(k)
                return weigh(rows(k), drawn.values, drawn.log_q)

            def piece(first: int, k: int) -> Tensor:
                from_prior = strata[torch.arange(first, first + k) % len(strata)]
                number = int(from_prior.sum())
                parts = [of_run(joint, rows(number))] if number else []
                parts += [of_guide(k - number)] if number < k else []
                order = torch.cat([from_prior.nonzero(), (~from_prior).nonzero()]).argsort(0)
                return torch.cat(parts).reshape(k, -1)[order[:, 0]]

            return _in_pieces(piece, count, len(data))

        return more

    return proposal


def strata(share: float, num_particles: int) -> Tensor:
    """Which of K draws are the prior's, evenly spread: shape `(K,)`.

    Raises:
        ValueError: If there are too few draws.
    """
    if num_particles < 2 * FEWEST:
        raise ValueError(
            f"num_particles must be at least {2 * FEWEST} for a mixture, got {num_particles}"
        )
    number = min(max(round(share * num_particles), FEWEST), num_particles - FEWEST)
    reached = torch.arange(num_particles + 1) * number // num_particles
    return reached.diff().bool()


class _Rows:
    """Data repeated for so many particles, the most that were asked for kept."""

    def __init__(self, args: Args):
        self._args, self._rows = args, args

    def __call__(self, num_particles: int) -> Args:
        count = num_particles * len(self._args[0])
        if len(self._rows[0]) < count:
            self._rows = program.repeat(self._args, num_particles)
        return tuple(arg[:count] for arg in self._rows)


def _in_pieces(piece: Callable[[int, int], Tensor], count: int, num_data: int) -> Tensor:
    """What pieces of a few draws make: from the first's number and how many, `(count, M)`."""
    step = max(1, ROWS // num_data)
    return torch.cat([piece(k, min(step, count - k)) for k in range(0, count, step)])


def _part(args: Args, data: Tensor) -> Args:
    """Some of a block's data."""
    if len(data) == len(args[0]):
        return args
    return tuple(arg[data.to(arg.device)] for arg in args)
