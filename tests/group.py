"""What the processes of a group run, for `test_processes`: python group.py TASK FOLDER."""

import os
import sys
from pathlib import Path
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrovae
from pyrovae import _processes
from pyrovae.objectives import SemiSupervised

SIZES = {"train": 23, "valid": 9, "batch": 7}
"""None is even: shares differ by one."""


class FromRow(dist.TorchDistribution):
    """A normal whose draws take their noise from the data: the same in any number of processes."""

    arg_constraints: ClassVar = {}
    has_rsample = True

    def __init__(self, loc, noise):
        super().__init__(loc.shape[:1], loc.shape[1:], validate_args=False)
        self.drawn, self.normal = loc + 0.5 * noise, dist.Normal(loc, 0.5).to_event(1)

    def rsample(self, sample_shape=()):
        return self.drawn.expand(*sample_shape, *self.drawn.shape)

    def log_prob(self, value):
        return self.normal.log_prob(value)


class Linear(nn.Module):
    """Probabilistic PCA, with a buffer that follows the data as running statistics do."""

    def __init__(self, fixed):
        super().__init__()
        torch.manual_seed(
            int(os.environ["RANK"])
        )  # weights that differ until the first one's are sent
        self.w = nn.Parameter(torch.randn(2, 3).T)
        self.scale = nn.Parameter(torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float32))  # a precision of its own
        self.register_buffer("mean", torch.zeros(()))
        self.fixed, self.drawn = fixed, []

    def model(self, x, noise):
        if self.training:
            self.mean.add_(x.detach().mean())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            px = dist.Normal(z @ self.w.T + self.shift, self.scale.exp()).to_event(1)
            pyro.sample("x", px, obs=x)

    def guide(self, x, noise):
        with pyro.plate("data", len(x)):
            loc = x @ self.w
            q = FromRow(loc, noise) if self.fixed else dist.Normal(loc, 0.5).to_event(1)
            z = pyro.sample("z", q)
            if not self.fixed:
                self.drawn.append(z.detach())


class Labelled(Linear):
    """With a label that is summed out where it is not given; noise stands in x behind the data."""

    def __init__(self):
        super().__init__(fixed=True)
        self.slope = nn.Parameter(torch.randn(3, 2))

    def model(self, x, y=None):
        x = x[:, :3]
        with pyro.plate("data", len(x)):
            probs = torch.tensor([0.3, 0.7])
            y = pyro.sample("y", dist.Categorical(probs), obs=y, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = z @ self.w.T + self.shift + y[..., None]
            pyro.sample("x", dist.Normal(loc, self.scale.exp()).to_event(1), obs=x)

    def guide(self, x, y=None):
        x, noise = x[:, :3], x[:, 3:]
        with pyro.plate("data", len(x)):
            if y is None:
                q = dist.Categorical(logits=x @ self.slope)
                pyro.sample("y", q, infer={"enumerate": "parallel"})
            pyro.sample("z", FromRow(x @ self.w, noise))


def data():
    """Training and validation data, each with a row of noise beside it."""
    noise = torch.Generator().manual_seed(3)
    drawn = torch.randn(SIZES["train"] + SIZES["valid"], 5, generator=noise, dtype=torch.float64)
    split = drawn.split([SIZES["train"], SIZES["valid"]])
    return [(part[:, :3], part[:, 3:]) for part in split]


def fit(program, **options):
    train, valid = data()
    how = {"epochs": 3, "batch_size": SIZES["batch"], "lr": 0.05, "progress": False}
    return pyrovae.fit(program, train, valid=valid, accelerator="cpu", **how | options)


def compare(folder):
    """Train and score; write what came out."""
    found = {}
    for compile_it in (False, True):
        program = Linear(fixed=True)
        history = fit(program, clip_norm=1.0, compile=compile_it, checkpoint=folder / "state")
        elbos = [[row["elbo"], row["valid_elbo"]] for row in history]
        found[compile_it] = {"weights": program.state_dict(), "elbos": elbos}
    assert all(
        torch.equal(t, other[name])
        for other in _processes.gather(program.state_dict())
        for name, t in program.state_dict().items()
    )
    found["labels"] = few_labels()
    free = Linear(fixed=False)
    fit(free, compile=False)
    shares = _processes.gather(free.drawn[-1])
    assert len(shares) == 1 or not torch.isin(shares[0], shares[1]).any(), "the same noise twice"
    free.load_state_dict(program.state_dict())
    how = {"seed": 1, "block_size": 5, "shared": True}
    found["log_px"] = pyrovae.log_px(free.model, free.guide, data()[0], 50, **how).values
    one_seed = pyrovae.log_px(free.model, free.guide, data()[0], 5, shared=True).seed
    assert len(set(_processes.gather(one_seed))) == 1
    if _processes.leads():
        torch.save(found, folder / f"found-{_processes.size()}.pt")


def few_labels():
    """Train on data of which a quarter have labels: shares are even, as means are of shares."""
    (x, noise), _ = data()
    y = torch.where(torch.arange(SIZES["train"]) < 6, torch.arange(SIZES["train"]) % 2, -1)
    program, how = Labelled(), {"epochs": 3, "batch_size": 8, "lr": 0.05, "progress": False}
    history = pyrovae.fit(
        program,
        (torch.cat([x, noise], 1), y),
        objective=SemiSupervised(alpha=0.5),
        accelerator="cpu",
        **how,
    )
    terms = ("elbo", "labelled_elbo", "cross_entropy", "accuracy")
    return {
        "weights": program.state_dict(),
        "elbos": [[row[term] for term in terms] for row in history],
    }


def die(folder):
    """The second process ends in the middle of an epoch."""

    class Dies(Linear):
        def guide(self, x, noise):
            if self.training and len(self.drawn) > 20 and _processes.rank() == 1:
                os._exit(3)
            super().guide(x, noise)

    try:
        fit(Dies(fixed=False), epochs=1000, compile=False)
    except _processes.ProcessLost as error:
        (folder / "said").write_text(str(error))
        raise


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    {"compare": compare, "die": die}[sys.argv[1]](Path(sys.argv[2]))
    _processes.leave()
