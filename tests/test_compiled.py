"""A step as one compiled graph: the numbers of eager, and eager where there is no graph."""

import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyrovae
from pyrovae import VAE, compiled, guides, likelihoods, nets, priors
from pyrovae.objectives import ELBO

BATCH = 6
NUMPY = np.random.default_rng(0)


class HalfDetached(torch.autograd.Function):
    """The identity, whose gradient is halved: lost in a graph traced forward only."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class Program(nn.Module):
    """Batch norm, a detached term, a backward of its own, parameters laid out in three ways."""

    def __init__(self):
        super().__init__()
        net = nets.MLP((5,), batch_norm=True)
        self.vae = VAE(
            priors.StandardNormal(2),
            likelihoods.Bernoulli((4,), 2, net),
            guides.Normal((4,), 2, net),
        ).float()
        self.kernel = nn.Parameter(torch.randn(4, 3))
        self.shift = nn.Parameter(torch.randn(7))

    def loss(self, kl_weight, x8):
        x = (torch.rand(x8.shape) < x8 / 255).float()
        value, terms = ELBO().surrogate(self.vae.model, self.vae.guide, (x,), kl_weight)
        kernel = HalfDetached.apply(self.kernel)
        extra = (self.kernel.detach() * kernel).sum() + (kernel.T @ x.T).square().sum()
        return value + extra + self.shift.sum(), terms


@pytest.fixture(scope="module")
def steps():
    """One program, its eager step and its compiled one, which draws the same noise."""
    torch.manual_seed(0)
    x8 = torch.randint(0, 256, (BATCH, 4), dtype=torch.uint8)
    program = Program()
    eager = compiled.with_gradients(program.loss, list(program.parameters()))
    state = {name: t.clone() for name, t in program.state_dict().items()}
    with pyro.validation_enabled(False):
        args, trial = (torch.tensor(1.0), x8), (torch.tensor(0.5), 255 - x8)
        fast = compiled.compile_function(eager, args, trial, torch.random.fork_rng, "it")
    assert fast is not None
    program.load_state_dict(state)
    return program, eager, fast, x8


def run(program, step, kl_weight, x8):
    """Output, gradients and batch statistics of a step, which are put back."""
    state = {name: t.clone() for name, t in program.state_dict().items()}
    torch.manual_seed(3)
    with pyro.validation_enabled(False):
        output, grads = step(torch.tensor(kl_weight), x8)
    buffers = {name: b.clone() for name, b in program.named_buffers()}
    program.load_state_dict(state)
    return output, list(grads), buffers


@pytest.mark.parametrize("kl_weight", [1.0, 0.25, 0.0])
def test_compiled_loss_gradients_and_batch_statistics_are_those_of_eager(steps, kl_weight):
    program, eager, fast, x8 = steps
    first, second = run(program, eager, kl_weight, x8), run(program, fast, kl_weight, x8)
    # Sums of a few dozen float32 numbers in another order.
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
    moved = [n for n, b in program.named_buffers() if not torch.equal(b, first[2][n])]
    kinds = {name.rpartition(".")[2] for name in moved}
    assert kinds == {"num_batches_tracked", "running_mean", "running_var"}


def test_a_graph_is_tried_on_another_batch_though_one_holds_all_data(monkeypatch):
    seen = []
    monkeypatch.setattr(compiled, "compile_function", lambda step, *batches: seen.extend(batches))
    x = torch.arange(40.0).view(10, 4) / 40
    prior, likelihood = priors.StandardNormal(2), likelihoods.Normal((4,), 2)
    vae = VAE(prior, likelihood, guides.Normal((4,), 2))
    pyrovae.fit(vae, x, epochs=1, progress=False, compile=True)
    (_, first), (_, second) = seen[:2]
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0)[0], second.sort(0)[0])


def test_the_graph_follows_parameters_as_they_change(steps):
    program, eager, fast, x8 = steps
    with torch.no_grad():
        for p in program.parameters():
            p.add_(0.1)
    torch.testing.assert_close(
        run(program, fast, 1.0, x8), run(program, eager, 1.0, x8), rtol=1e-4, atol=1e-5
    )


def test_gradients_have_the_layout_of_their_parameters(steps):
    """A fused optimizer reads memory as it lies: a transposed or expanded gradient misleads it."""
    program, eager, fast, x8 = steps
    params = list(program.parameters())
    for step in (eager, fast):
        for grad, param in zip(run(program, step, 1.0, x8)[1], params, strict=True):
            assert grad.stride() == param.stride()


def test_gradients_equal_those_of_trace_elbo_times_the_batch_size(steps):
    program, _, fast, x8 = steps
    vae = program.vae
    params = list(vae.parameters())
    ours = run(program, fast, 1.0, x8)[1]
    state = {name: t.clone() for name, t in program.state_dict().items()}
    torch.manual_seed(3)
    x = (torch.rand(x8.shape) < x8 / 255).float()
    theirs = torch.autograd.grad(Trace_ELBO().differentiable_loss(vae.model, vae.guide, x), params)
    program.load_state_dict(state)
    names = [name for name, _ in program.named_parameters()]
    of_vae = [g for name, g in zip(names, ours, strict=True) if name.startswith("vae.")]
    torch.testing.assert_close(of_vae, list(theirs), rtol=1e-4, atol=1e-5)


def test_a_parameter_that_the_loss_leaves_out_has_gradient_zero():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    step = compiled.with_gradients(lambda x: ((used * x).sum(), {"x": x}), [used, unused])
    output, grads = step(torch.tensor(2.0))
    assert output.tolist() == [4.0, 2.0]
    assert not output.requires_grad
    assert grads[0].tolist() == [2.0, 2.0]
    assert grads[1].tolist() == [0.0, 0.0, 0.0]


class Branches(nn.Module):
    """A model that asks a tensor a question, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            mean = z if x.sum() > 0 else z + 0.0
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + self.loc, 1.0).to_event(1))


def fit(program, **options):
    data = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    given = {"epochs": 2, "batch_size": 8, "progress": False, "accelerator": "cpu"}
    return pyrovae.fit(program, data, **given | options)


def fit_warned(program, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(program, **options)
    return history, [str(w.message) for w in caught if "uncompiled" in str(w.message)]


def test_a_program_that_cannot_be_traced_runs_eagerly_with_one_warning():
    program, same = Branches(), Branches()
    _, said = fit_warned(program, compile=True)
    fit(same)
    assert len(said) == 1
    assert "\n" not in said[0]
    assert torch.equal(program.loc, same.loc)
    assert program.loc.abs().min() > 0


class Linear(nn.Module):
    """Probabilistic PCA."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.w = nn.Parameter(torch.randn(3, 2))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w.T, self.noise()).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.w, 0.5).to_event(1))

    def noise(self):
        return 1.0


class Frozen(Linear):
    """A model whose scale is nothing that torch drew or decided."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.calls = scale, 0

    def noise(self):
        self.calls += 1
        return self.scale(self.calls)


@pytest.mark.parametrize(
    "scale",
    [
        lambda calls: 1 + 0.1 * float(NUMPY.random()),
        lambda calls: 1 + 0.1 * random.random(),
        lambda calls: min(1.0, 0.5 + calls / 100),
    ],
    ids=["numpy", "random", "counter"],
)
def test_what_a_graph_would_freeze_is_found_before_it_is_trusted(scale):
    _, said = fit_warned(Frozen(scale), compile=True)
    assert len(said) == 1
    assert "frozen" in said[0]


@pytest.mark.parametrize("objective", [Trace_ELBO, pyro.infer.TraceMeanField_ELBO])
def test_pyros_objectives_train_and_warn_only_when_compiling_is_asked_for(objective):
    program, same = Branches(), Branches()
    history = fit(program, objective=objective())
    _, said = fit_warned(same, objective=objective(), compile=True)
    assert len(said) == 1
    assert torch.equal(program.loc, same.loc)
    assert program.loc.abs().min() > 0
    assert history[-1]["elbo"] < 0


def test_without_a_compiler_training_runs_eagerly_with_one_warning(monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    program, same = Linear(), Linear()
    with config.patch({"cpp.cxx": ("/nowhere/c++",)}):
        _, said = fit_warned(program, compile=True)
    fit(same)
    assert len(said) == 1
    assert "compiler" in said[0]
    assert torch.equal(program.w, same.w)


def test_a_compiled_run_ends_where_an_eager_one_does(monkeypatch):
    """KL warm-up, learning-rate schedule, clipping: nothing is frozen in the graph."""
    original = compiled.compile_function
    made = []

    def same_noise(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(compiled, "compile_function", same_noise)
    program, same = Linear(), Linear()
    options = {"epochs": 6, "kl_warmup": 3, "lr": 0.05, "clip_norm": 1.0}
    fast, eager = fit(program, compile=True, **options), fit(same, compile=False, **options)
    assert made[0] is not None
    # float32 rounding, grown over 12 steps of 0.05.
    torch.testing.assert_close(program.w, same.w, rtol=1e-3, atol=1e-4)
    for one, other in zip(fast, eager, strict=True):
        assert one["elbo"] == pytest.approx(other["elbo"], abs=1e-2)
        assert one["kl_weight"] == other["kl_weight"]


@pytest.mark.slow
def test_many_programs_compile_in_one_process():
    for _ in range(10):
        program = Linear()
        _, said = fit_warned(program, compile=True)
        assert said == []


@pytest.mark.slow
def test_two_vaes_trained_one_after_the_other_compiled_both_learn():
    x = torch.rand(64, 4, generator=torch.Generator().manual_seed(0)).round()
    for _ in range(2):
        vae = VAE(
            priors.StandardNormal(2),
            likelihoods.Bernoulli((4,), 2, nets.MLP((8,))),
            guides.Normal((4,), 2, nets.MLP((8,))),
        )
        before = {name: p.clone() for name, p in vae.named_parameters()}
        pyrovae.fit(vae, x, epochs=3, batch_size=16, progress=False, compile=True)
        assert not any(torch.equal(p, before[name]) for name, p in vae.named_parameters())


@pytest.mark.parametrize(
    ("epochs", "compile", "asked"),
    [(1, None, False), (2, None, True), (1, True, True), (2, False, False)],
)
def test_runs_with_steps_enough_are_compiled_unless_told(monkeypatch, epochs, compile, asked):
    asks = []
    monkeypatch.setattr("pyrovae.loop.COMPILE_STEPS", 8)
    monkeypatch.setattr(compiled, "compile_function", lambda *args: asks.append(args))
    x = torch.rand(20, 4).round()
    pyrovae.fit(Program().vae, x, epochs=epochs, batch_size=5, compile=compile, progress=False)
    assert bool(asks) == asked


def emulated(function, args):
    """What a CUDA graph does with a step: it runs to be warm, then on arguments of its own."""
    own = [arg.clone() for arg in args]
    for _ in range(compiled.WARM_UP):
        function(*own)

    def replay(*args):
        for mine, given in zip(own, args, strict=True):
            mine.copy_(given)
        return function(*own).clone()

    return replay


def trained(device="cpu"):
    """Weights and history of a short compiled run."""
    torch.manual_seed(0)
    vae = Program().vae
    x = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)).round()
    options = {"batch_size": 5, "lr": 0.05, "kl_warmup": 2, "compile": True}
    history = pyrovae.fit(vae, x, epochs=3, accelerator=device, **options)
    return {n: t.cpu() for n, t in vae.state_dict().items()}, history


@pytest.fixture(scope="module")
def launched():
    """A run whose steps are launched one by one."""
    return trained()


def test_a_captured_step_trains_as_one_that_is_launched(monkeypatch, launched):
    """On a CPU, where only the capture itself is left out: all that changes is a tensor, and the
    runs that warm it up leave no trace."""
    monkeypatch.setattr(compiled, "captures", lambda device: True)
    monkeypatch.setattr(compiled, "capture", emulated)
    _same_run(trained(), launched)


def test_without_a_cuda_graph_steps_are_launched_one_by_one_with_one_warning(monkeypatch, launched):
    monkeypatch.setattr(compiled, "captures", lambda device: True)
    with pytest.warns(UserWarning, match="launched one by one: no CUDA graph of them"):
        found = trained()
    _same_run(found, launched)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_captured_step_trains_as_one_that_is_launched(monkeypatch):
    captured = trained(device="cuda")
    monkeypatch.setattr(compiled, "captures", lambda device: False)
    _same_run(captured, trained(device="cuda"))


def _same_run(found, expected):
    """The same weights and rows, up to the rounding of a learning rate in float32."""
    for name, tensor in expected[0].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=1e-4, atol=1e-5)
    for row, like in zip(found[1], expected[1], strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**like, "seconds": 0}, rel=1e-4)
