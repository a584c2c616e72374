"""Every part with every other: a step, the bounds against quadrature, and back from disk."""

import ast
import functools
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from table import GUIDES, LIKELIHOODS, OBJECTIVES, PRIORS
from torch import Tensor

import pyrovae
from pyrovae import HierarchicalVAE, LadderVAE, compiled, guides, nets, program
from pyrovae._catalogue import ROLES, parts
from pyrovae._config import from_config, parameters, to_config

SHAPE = (1, 3, 1)
NET = to_config(nets.MLP(hidden=(6,)))
DEPTHS = ("one layer", "bottom-up", "top-down")
FACTORS = [list(table) for table in (PRIORS, LIKELIHOODS, GUIDES, OBJECTIVES)] + [list(DEPTHS)]
DETACHED = ("DReG", "ReweightedWakeSleep", "ScoreFunction", "StickingTheLanding")
"""Objectives that score the guide at draws cut from it."""
LINE = torch.linspace(-8, 8, 161, dtype=torch.float64)
LOG_STEP = float((LINE[1] - LINE[0]).log())


def covering(factors: list[list[str]]) -> list[tuple[str, ...]]:
    """Rows in which every pair of values of two factors occurs, found greedily."""
    chance = random.Random(0)
    places = list(itertools.combinations(range(len(factors)), 2))
    ahead = {(i, a, j, b) for i, j in places for a in factors[i] for b in factors[j]}
    rows = []
    for i, a, j, b in sorted(ahead):
        if (i, a, j, b) not in ahead:
            continue
        candidates = [[chance.choice(factor) for factor in factors] for _ in range(60)]
        for row in candidates:
            row[i], row[j] = a, b
        covered = [{(m, row[m], n, row[n]) for m, n in places} & ahead for row in candidates]
        best = max(range(len(covered)), key=lambda k: len(covered[k]))
        rows.append(tuple(candidates[best]))
        ahead -= covered[best]
    return rows


def made(part: Any, **given: Any) -> Any:
    """The part as it is in the table, for other shapes."""
    config = to_config(part)
    takes = parameters(type(part))
    return from_config(
        config | {"init_args": config["init_args"] | {k: given[k] for k in given if k in takes}}
    )


def build(prior: str, likelihood: str, guide: str, depth: str) -> pyrovae.VAE:
    """A VAE of these parts with two latents, three under a flow as the prior of a top layer."""

    def part(table: Any, name: str, shape: tuple[int, ...], latent_dim: int) -> Any:
        return made(table[name](), shape=list(shape), latent_dim=latent_dim, net=NET)

    if depth == "one layer":
        parts = [(PRIORS, prior), (LIKELIHOODS, likelihood), (GUIDES, guide)]
        return pyrovae.VAE(*(part(*named, SHAPE, 2) for named in parts))
    most = 2 if prior == "Flow" else 1  # a coupling takes two
    conditionals = [guides.Normal((most,), 1, from_config(NET))]
    px = part(LIKELIHOODS, likelihood, SHAPE, 1)
    kind: Any = HierarchicalVAE
    below = part(GUIDES, guide, SHAPE, 1)
    if depth == "top-down":
        kind, below = LadderVAE, guides.Normal(SHAPE, 1, from_config(NET))
    shape = kind.shape_above(below)
    top = part(GUIDES, guide, shape, most)
    return kind(part(PRIORS, prior, shape, most), conditionals, px, [below, top])


def exact_log_px(vae: pyrovae.VAE, x: Tensor) -> Tensor:
    """log p(x) by quadrature over the latents, nats, shape `(N,)`."""
    with torch.no_grad():
        if not isinstance(vae, HierarchicalVAE):
            z = torch.cartesian_prod(LINE, LINE)
            log_joint = vae.likelihood(z[:, None]).log_prob(x) + vae.prior().log_prob(z)[:, None]
            return log_joint.logsumexp(0) + 2 * LOG_STEP
        z, top, steps = LINE[:, None], LINE[:, None], 2
        if vae.latent_dims == (1, 2):
            top, steps = torch.cartesian_prod(LINE[::2], LINE[::2]), 3
        log_pz = vae.conditionals[0](top).log_prob(z[:, None]) + vae.prior().log_prob(top)
        log_px = vae.likelihood(z[:, None]).log_prob(x)
        log_joint = log_px + log_pz.logsumexp(1)[:, None]
        return log_joint.logsumexp(0) + steps * LOG_STEP + (2 * math.log(2) if steps == 3 else 0)


def draws_of(vae: pyrovae.VAE, count: int) -> Tensor:
    """Data that the likelihood takes."""
    with torch.no_grad():
        return vae.likelihood(torch.randn(count, vae.likelihood.latent_dim)).sample()


def refusals(prior: str, guide: str, objective: str, depth: str) -> list[str]:
    """Why a combination is refused, by what its parts declare."""
    q, goal = GUIDES[guide](), OBJECTIVES[objective]()
    found = []
    if prior == "VampPrior" and not q.scorable:
        found.append("scores only its own draws")
    if goal.density and guide == "Delta":
        found.append("is a Delta, which has no density")
    if objective.split(",")[0] in DETACHED and not q.scorable:
        found.append("scores only its own draws")
    return found


def trained(row: tuple[str, ...]) -> tuple[pyrovae.VAE, Tensor, list[str]]:
    """A VAE after a few steps, its data, and the parameters that did not move."""
    *parts_of_it, objective, depth = row
    vae = build(*parts_of_it, depth)
    x = draws_of(vae, 24)
    start = {name: param.detach().clone() for name, param in vae.named_parameters()}
    fitted = {"epochs": 1, "batch_size": 6, "lr": 0.003, "progress": False, "compile": False}
    pyrovae.fit(vae, x, objective=OBJECTIVES[objective](), **fitted)
    return vae, x, [n for n, param in vae.named_parameters() if torch.equal(param, start[n])]


def check_bounds(vae: pyrovae.VAE, x: Tensor, where: Any = None) -> Tensor:
    """Estimates of log p(x), most of them close to the exact values, and above them by chance only.

    A new guide is narrower than the posterior, so weights have heavy tails: what 1,000 particles
    do not settle, 30,000 must, or say by k-hat that they cannot.
    """
    exact = exact_log_px(vae.eval(), x)
    likely = exact.argsort(descending=True)[:8]  # where an untrained guide is no bad proposal
    x, exact = x[likely], exact[likely]
    for num_particles in (1000, 30_000):
        result = pyrovae.log_px(vae.model, vae.guide, x, num_particles, seed=0)
        error = result.values - exact
        spread = float(result.std_error.median())
        if -0.2 < float(error.median()) < 0.02 + 3 * spread:
            return x
    assert result.khat.median() > 0.7, (where, error)
    assert float(error.median()) < 0.02 + 3 * spread, (where, error)
    return x


def run(row: tuple[str, ...], folder: Path) -> None:
    """A few steps move every parameter; the bounds hold; the model comes back from disk."""
    prior, _, guide, objective, depth = row
    if expected := refusals(prior, guide, objective, depth):
        with pytest.raises(ValueError, match="^[^\n]*(" + "|".join(expected) + ")[^\n]*$"):
            trained(row)
        return
    vae, x, still = trained(row)
    assert not still, f"{still} did not move"
    pyrovae.save(vae, folder)
    again = pyrovae.load(folder)
    if guide == "Delta":
        with pytest.raises(ValueError, match="is a Delta, which has no density"):
            pyrovae.log_px(vae.model, vae.guide, x, num_particles=1)
        return
    x = check_bounds(vae, x)
    result = pyrovae.log_px(vae.model, vae.guide, x, num_particles=200, seed=1)
    bound = pyrovae.elbo(vae.model, vae.guide, x, num_particles=200, seed=1)
    assert float(bound.mean()) < result.mean + 0.02
    same = pyrovae.log_px(again.model, again.guide, x, num_particles=200, seed=1)
    assert torch.equal(same.values, result.values)


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def each_once() -> list[tuple[str, ...]]:
    """Rows that are not refused, and have every value of every factor."""
    ahead = [set(factor) for factor in FACTORS]
    rows = [row for row in covering(FACTORS) if not refusals(*row[:1], *row[2:])]
    found = []
    while any(ahead):
        best = max(rows, key=lambda row: sum(v in a for v, a in zip(row, ahead, strict=True)))
        found.append(best)
        ahead = [a - {v} for v, a in zip(best, ahead, strict=True)]
    return found


@pytest.mark.parametrize("row", each_once(), ids=" x ".join)
def test_every_part(row: tuple[str, ...], tmp_path: Path) -> None:
    run(row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", covering(FACTORS), ids=" x ".join)
def test_every_pair(row: tuple[str, ...], tmp_path: Path) -> None:
    run(row, tmp_path)


def test_rows_cover_every_pair() -> None:
    rows = covering(FACTORS)
    for i, j in itertools.combinations(range(len(FACTORS)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(FACTORS[i], FACTORS[j]))


@pytest.mark.slow
@pytest.mark.parametrize("row", each_once(), ids=" x ".join)
def test_every_part_compiled(row: tuple[str, ...]) -> None:
    """Loss, terms, gradients and buffers are those of eager under the same noise."""
    *parts_of_it, objective, depth = row
    torch.manual_seed(0)
    vae = build(*parts_of_it, depth)
    x, other = draws_of(vae, 12).split(6)
    goal = OBJECTIVES[objective]()

    def loss(kl_weight: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return goal.surrogate(vae.model, vae.guide, (x,), kl_weight)

    step = compiled.with_gradients(loss, list(vae.parameters()))
    first, second = (torch.tensor(0.7), x), (torch.tensor(0.3), other)
    kept = functools.partial(program.undisturbed, vae.model, vae.guide)
    with program.validation(False):
        fast = compiled.compile_function(step, first, second, kept, "it")
        assert fast is not None
        results = []
        for run in (step, fast):
            with kept():
                torch.manual_seed(1)
                terms, grads = run(*second)
                buffers = {name: buffer.clone() for name, buffer in vae.named_buffers()}
                results.append((terms, list(grads), buffers))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_every_model(guide: str) -> None:
    """Every prior, likelihood and depth with this guide: the bound against quadrature."""
    for prior, likelihood, depth in itertools.product(PRIORS, LIKELIHOODS, DEPTHS):
        if guide == "Delta" or refusals(prior, guide, "ELBO", depth):
            continue
        torch.manual_seed(0)
        vae = build(prior, likelihood, guide, depth)
        check_bounds(vae, draws_of(vae, 16), (prior, likelihood, depth))


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_every_way_to_train(guide: str) -> None:
    """Every prior, objective and depth with this guide: a gradient for every parameter.

    An objective meets a likelihood as a number per row, so one likelihood stands for all.
    """
    for prior, objective, depth in itertools.product(PRIORS, OBJECTIVES, DEPTHS):
        if refusals(prior, guide, objective, depth):
            continue
        torch.manual_seed(0)
        vae = build(prior, "Normal, amortized", guide, depth)
        with torch.no_grad():
            for param in vae.parameters():  # what starts at zero keeps gradients from others
                param.add_(0.1 * torch.randn_like(param))
        loss, terms = OBJECTIVES[objective]().surrogate(vae.model, vae.guide, (draws_of(vae, 6),))
        params = dict(vae.named_parameters())
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for name, grad in zip(params, grads, strict=True):
            where = (prior, objective, depth, name)
            assert grad is not None, where
            assert grad.isfinite().all(), where
            assert grad.any() or "free bits" in objective, where  # below the floor nothing moves
        assert all(term.isfinite() for term in terms.values())


def test_no_part_is_named_outside_its_own_module() -> None:
    """Nothing knows parts by name: not as an import, an attribute, nor a word.

    But those that make use of a part: refinement and few labels have an objective each.
    """
    package = Path(pyrovae.__file__).parent
    modules = {ROLES[role][0].__name__.rpartition(".")[2]: set(parts(role)) for role in ROLES}
    found = []
    for file in set(package.rglob("*.py")) - {package / "__init__.py"}:
        path = file.relative_to(package).parts
        own = modules.get(path[0].removesuffix(".py"), set())
        others = {module: names for module, names in modules.items() if names is not own}
        words = set().union(*others.values()) - own
        if path[0] == "plotting":
            words = set()  # titles of panels
        for node in ast.walk(ast.parse(file.read_text())):
            found += [f"{file}:{node.lineno} {name}" for name in named(node, others, words)]
    users = {Path(line.split(":")[0]).name: line.split()[-1] for line in found}
    expected = {"refine.py": "StickingTheLanding", "semisupervised.py": "SemiSupervised"}
    assert users == expected, found
    assert len(found) == len(users)


def named(node: ast.AST, others: dict[str, set[str]], words: set[str]) -> list[str]:
    """Parts of other modules that a piece of code names."""
    if isinstance(node, ast.ImportFrom) and node.module:
        module = node.module.removeprefix("pyrovae.").split(".")[0]
        return [alias.name for alias in node.names if alias.name in others.get(module, set())]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return [node.attr] if node.attr in others.get(node.value.id, set()) else []
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value] if node.value in words else []
    return []
