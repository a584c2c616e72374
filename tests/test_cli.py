"""The command line: what it writes, what it says, what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyrovae
from pyrovae import _build, _catalogue, _estimates, _flags, _train, cli
from pyrovae._build import load_data
from pyrovae._settings import Settings, saved_settings
from pyrovae.evidence.walk import Walk
from pyrovae.runs import Run

FAST = ("--epochs", "2", "--num-particles", "3", "--latent-dim", "2", "--net.hidden", "5")
OWN = '''
import pyro.distributions as dist
from pyrovae import likelihoods

class Student(likelihoods.Likelihood):
    """Student's t: noise with outliers.

    Args:
        df: Degrees of freedom.
    """
    num_params = 2

    def __init__(self, *args, df: float = 3.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.df = df

    def distribution(self, params):
        loc, log_scale = self.split(params)
        return self._independent(dist.StudentT(self.df, loc, log_scale.exp()))

class Plain(likelihoods.Normal):
    pass

class Untyped(likelihoods.Normal):
    def __init__(self, shape, latent_dim, net=None, scale=0.7):
        super().__init__(shape, latent_dim, net, scale)

class Broken(likelihoods.Normal):
    def distribution(self, params):
        raise RuntimeError("not today")
'''

OWN_ROLES = """
import pyro.distributions as dist
import torch
from pyrovae import evidence, guides, nets, objectives, priors

class MyPrior(priors.Prior):
    def __init__(self, latent_dim: int, width: float = 1.0):
        super().__init__(latent_dim)
        self.width = torch.nn.Parameter(torch.full((latent_dim,), width))

    def forward(self):
        return dist.Laplace(torch.zeros_like(self.width), self.width.exp()).to_event(1)

class MyGuide(guides.Guide):
    num_params = 1

    def __init__(self, *args, width: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.width = width

    def distribution(self, params):
        return dist.StudentT(5.0, params, self.width).to_event(1)

class MyNet(nets.Net):
    def __init__(self, width: float = 1.0):
        self.width = width

    def __call__(self, in_shape, out_shape):
        body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(self.width))
        head = torch.nn.Linear(torch.Size(in_shape).numel(), torch.Size(out_shape).numel())
        return nets.Network(in_shape, out_shape, body, head)

class MyMethod(evidence.Importance):
    particles = 11

    def __init__(self, width: float = 1.0):
        super().__init__()
        self.width = width

    def describe(self, num_particles):
        return f"{num_particles} draws of width {self.width}"

class MyObjective(objectives.ELBO):
    def __init__(self, width: float = 1.0):
        super().__init__(beta=width)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own to work in, with some data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYROVAE_DATA", raising=False)
    rng = np.random.default_rng(0)
    real = rng.normal(3, 2, (40, 4)).astype(np.float32)
    holes = np.where(rng.random(real.shape) < 0.2, np.nan, real)
    np.save("real.npy", real)
    np.save("holes.npy", holes)
    np.save("infinite.npy", np.where(holes > 3, np.inf, 1.0))
    np.save("empty.npy", real[:0])
    np.save("one.npy", real[:1])
    np.save("negative.npy", rng.integers(-3, 5, (40, 4)))
    np.save("binary.npy", rng.integers(0, 2, (40, 4)).astype(np.uint8))
    np.save("counts.npy", rng.poisson(3, (40, 4)))
    np.savez(
        "labelled.npz", x=rng.integers(0, 256, (40, 6, 7)).astype(np.uint8), y=np.arange(40) % 3
    )
    np.save("colour.npy", rng.integers(0, 256, (30, 3, 6, 7)).astype(np.uint8))
    Path("cut.npy").write_bytes(Path("real.npy").read_bytes()[:200])
    Path("table.csv").write_text(
        "a,b\n" + "".join(f"{i / 7:.3f},{'' if i % 5 else i}\n" for i in range(40))
    )
    Path("own_parts.py").write_text(OWN)
    Path("own_roles.py").write_text(OWN_ROLES)
    return tmp_path


@pytest.fixture(autouse=True)
def _modules_as_they_were() -> Any:
    before = list(sys.path)
    yield
    sys.path[:] = before
    for name in ("own_parts", "own_roles", "contributed"):
        sys.modules.pop(name, None)


@pytest.fixture
def pictures() -> None:
    """Asked for by tests that want figures; the others are quicker without."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("pyrovae.plotting.figures", lambda *_: {})


Ran = tuple[int, str, str]


@pytest.fixture
def pv(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command in this process: exit code, output, errors."""

    def run(*words: object) -> Ran:
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_data_changed_after_training_are_refused(pv: Callable[..., Ran]) -> None:
    np.save("own.npy", np.random.default_rng(0).normal(size=(40, 3)))
    assert pv("train", *FAST, "--data", "own.npy", "--out", "own")[0] == 0
    changed = np.load("own.npy")
    changed[-1] += 1
    np.save("own.npy", changed)
    code, _, err = pv("log-px", "own", "--num-particles", 3)
    assert code == 2
    assert "own.npy are not those of the run in own" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("pictures")
def test_a_run_is_all_there(pv: Callable[..., Ran]) -> None:
    code, out, err = pv("train", *FAST, "--out", "run")
    assert (code, err) == (0, "")
    assert "log p(x) >= " in out
    assert "Run in run, figures in run/figures" in out
    names = {str(p.relative_to("run")) for p in Path("run").rglob("*") if p.is_file()}
    figures = {"interpolations", "latent_space", "log_px", "manifold", "reconstructions"}
    figures |= {"samples", "training_curves"}
    assert names == {
        *("config.json", "weights.safetensors", "training.safetensors", "summary.json"),
        *("metrics.csv", "log_px.csv", "log_px.json", "log_px.npz", "latents.csv", "latents.json"),
        *(f"figures/{name}.png" for name in figures),
    }
    rows = Run("run").metrics()
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"elbo", "reconstruction", "kl", "valid_elbo"} <= set(rows[0])
    found = json.loads(Path("run/log_px.json").read_text())
    assert {"mean", "mean_std_error", "test_std_error", "method", "num_particles"} <= set(found)
    values = torch.tensor(
        [float(v) for v in np.loadtxt("run/log_px.csv", str, delimiter=",")[1:, 1]]
    )
    assert len(values) == found["num_data"] == 300
    assert values.double().mean() == pytest.approx(found["mean"], rel=1e-5)
    assert isinstance(pyrovae.load("run"), pyrovae.VAE)


@pytest.mark.usefixtures("pictures")
def test_using_a_run(pv: Callable[..., Ran]) -> None:
    pv("train", *FAST, "--data", "labelled.npz", "--out", "run")
    before = Path("run/log_px.json").read_text()
    Path("run").rename("moved run")
    assert pv("log-px", "moved run", "--num-particles", 3)[0] == 0
    assert Path("moved run/log_px.json").read_text() == before
    code, _out, _ = pv("log-px", "moved run", "--num-particles", 3, "--data", "labelled.npz")
    assert code == 0
    assert json.loads(Path("moved run/log_px-labelled.json").read_text())["num_data"] == 40
    assert pv("encode", "moved run")[1] == "4 codes in moved run/codes.npz\n"
    assert pv("encode", "moved run", "--data", "labelled.npz", "--out", "z.npz")[0] == 0
    codes = np.load("z.npz")
    assert (codes["loc"].shape, codes["scale"].shape, codes["y"].shape) == ((40, 2), (40, 2), (40,))
    assert (codes["scale"] > 0).all()
    assert pv("sample", "moved run", "--num-samples", 5)[0] == 0
    drawn = np.load("moved run/samples.npz")
    assert drawn["x"].shape == drawn["mean"].shape == (5, 1, 6, 7)
    Path("moved run/figures/samples.png").unlink()
    assert "moved run/figures/samples.png" in pv("plot", "moved run")[1]
    assert Path("moved run/figures/samples.png").exists()


def test_numbers_of_several_methods_lie_beside_each_other(pv: Callable[..., Ran]) -> None:
    pv("train", *FAST, "--data", "real.npy", "--out", "run")
    before = Path("run/log_px.json").read_text()
    annealed = ("--method", "annealed", "--method.num-distributions", 3, "--num-particles", 2)
    code, out, err = pv("log-px", "run", *annealed)
    assert (code, err) == (0, "")
    assert "K = 2 chains of 3 distributions" in " ".join(out.split())
    assert "Per datum: run/log_px-annealed.csv\nPer latent: run/latents.csv\n" in out
    found = json.loads(Path("run/log_px-annealed.json").read_text())
    assert found["method"] == "annealed"
    assert found["settings"]["num_distributions"] == 3
    own = ("--data", "real.npy", "--num-particles", 30)
    assert pv("log-px", "run", *own, "--refine", 2)[0] == 0
    found = json.loads(Path("run/log_px-refined-real.json").read_text())
    assert (found["settings"]["refine"], found["num_data"]) == (2, 40)
    assert "guide refined" in found["data"]
    assert Path("run/log_px.json").read_text() == before
    code, out, _ = pv("log-px", "run", "--method", "Bidirectional", *annealed[2:], "--num-data", 3)
    assert code == 0
    assert "data drawn from the model" in " ".join(out.split())
    assert json.loads(Path("run/bidirectional.json").read_text())["num_data"] == 3
    assert len(Path("run/bidirectional.csv").read_text().splitlines()) == 4
    assert not list(Path("run").glob("*.partial*"))
    assert pv("train", *FAST, "--data", "real.npy", "--out", "run", "--overwrite")[0] == 0
    assert not [p for p in Path("run").iterdir() if "anneal" in p.name or "bidir" in p.name]


def test_a_method_of_ones_own(pv: Callable[..., Ran]) -> None:
    pv("train", *FAST, "--data", "real.npy", "--out", "run")
    own = ("--method", "own_roles.MyMethod", "--method.width", "0.5")
    code, out, err = pv("log-px", "run", *own)
    assert (code, err) == (0, "")
    assert "a lower bound by 11 draws of width 0.5" in " ".join(out.split())
    found = json.loads(Path("run/log_px-mymethod.json").read_text())
    assert (found["num_particles"], found["settings"]) == (11, {"width": 0.5})


def test_what_is_long_says_so_before(
    pv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    pv("train", *FAST, "--data", "real.npy", "--out", "run")
    assert " data x " not in pv("log-px", "run", "--num-particles", 30)[1]
    monkeypatch.setattr(_estimates, "LONG", 0.0)
    out = pv("log-px", "run", "--num-particles", 30)[1]
    assert out.startswith("4 data x 30 particles = 120: about 1 s.\nlog p(x) >= ")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "24 of 40 data are done already. 16 data x 150 particles = 2,400: about 1 s."),
        (
            ("--seed", 1),
            "run/log_px-real.partial is part of an estimate with other seed: begun anew.",
        ),
    ],
)
def test_an_interrupted_estimate_goes_on_or_begins_anew(
    pv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, more: tuple[Any, ...], said: str
) -> None:
    pv("train", *FAST, "--data", "real.npy", "--out", "run")
    words = ("log-px", "run", "--data", "real.npy", "--num-particles", 150)
    assert pv(*words)[0] == 0
    whole = Path("run/log_px-real.csv").read_bytes()
    block = Walk._block

    def stops(walk: Walk, function: Any, number: int) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return block(walk, function, number)

    with monkeypatch.context() as patched:
        patched.setattr(Walk, "_block", stops)
        code, _, err = pv(*words)
    assert code == 130
    assert "Stopped. The same command goes on from here.\n" in err
    assert Path("run/log_px-real.partial").exists()
    code, out, err = pv(*words, *more)
    assert (code, err) == (0, "")
    assert said in " ".join(out.split())
    assert not Path("run/log_px-real.partial").exists()
    assert (Path("run/log_px-real.csv").read_bytes() == whole) == (not more)


def test_parts_are_found_in_any_case(pv: Callable[..., Ran]) -> None:
    words = ("--guide", "NORMAL", "--net", "mlp", "--objective", "elbo")
    assert pv("train", *FAST, "--data", "real.npy", *words, "--out", "run")[0] == 0
    model = json.loads(Path("run/config.json").read_text())["model"]["init_args"]
    assert model["guide"]["class_path"] == "pyrovae.guides.Normal"


def test_samples_of_standardized_data_come_in_their_own_units(pv: Callable[..., Ran]) -> None:
    pv("train", *FAST, "--data", "real.npy", "--out", "run")
    pv("sample", "run", "--num-samples", 2000)
    drawn = np.load("run/samples.npz")["x"]
    assert np.abs(drawn.mean(0) - 3).max() < 1.5
    assert (np.abs(drawn.std(0) - 2) < 1).all()


def later(*words: str) -> Any:
    """Flags that are tried among the slow tests."""
    return pytest.param(words, marks=pytest.mark.slow, id=" ".join(words))


@pytest.mark.parametrize(
    "words",
    [
        ("--data", "table.csv", "--missing"),
        ("--data", "colour.npy", "--net", "Conv", "--net.channels", "4,8", "--net.hidden", "5"),
        later("--data", "labelled.npz", "--binarize", "dynamic", "--guide.net", "Conv"),
        ("--data", "counts.npy", "--objective.analytic-kl", "--objective.beta", "0.5"),
        later("--data", "binary.npy", "--batch_size=100000", "--kl-warmup", "1", "--patience", "5"),
        ("--data", "real.npy", "--likelihood.scale", "per-pixel", "--likelihood", "Normal"),
        later("--data", "real.npy", "--likelihood", "Normal", "--likelihood.net", "MLP"),
        later("--data", "real.npy", "--standardize", "false", "--clip-norm", "1"),
    ],
    ids=lambda words: " ".join(words),
)
@pytest.mark.usefixtures("pictures")
def test_what_newcomers_try(pv: Callable[..., Ran], words: tuple[str, ...]) -> None:
    fast = FAST if "Conv" not in words[:4] else FAST[:-2]
    code, _out, err = pv("train", *fast, *words, "--out", Path("run").resolve())
    assert (code, err) == (0, ""), err
    assert pv("log-px", "run", "--num-particles", 3)[0] == 0


def test_codes_of_a_guide_whose_mean_is_taken_from_draws(pv: Callable[..., Ran]) -> None:
    words = ("--data", "labelled.npz", "--guide", "IAF", "--guide.transforms", "2")
    assert pv("train", *FAST, *words, "--binarize", "fixed", "--out", "run")[0] == 0
    code, out, err = pv("encode", "run")
    assert (code, out, err) == (0, "4 codes in run/codes.npz\n", "")
    codes = np.load("run/codes.npz")
    assert np.isfinite(codes["loc"]).all()
    assert (codes["scale"] > 0).all()


def test_grey_levels_are_counts_to_a_likelihood_of_counts(pv: Callable[..., Ran]) -> None:
    counts = ("--data", "digits", "--likelihood", "Poisson")
    code, out, err = pv("train", *FAST, *counts, "--epochs", 1, "--out", "run")
    assert (code, err) == (0, "")
    assert "counts as stored" in out
    seen = load_data(saved_settings(Run("run"))).test[slice(0, 300)]
    assert seen.max() == 16
    settings = {"kind": "grey", "binarize": "fixed"}  # flags prevail
    chosen = replace(saved_settings(Run("run")), **settings)
    assert load_data(chosen).kind == "binary"


def test_top_down_takes_any_guide_for_the_top_layer(pv: Callable[..., Ran]) -> None:
    layers = ("--latent-dim", "4,3,2", "--inference", "top-down", "--net.hidden", 5)
    guide = ("--guide", "IAF", "--guide.transforms", "2", "--guide.net", "MLP")
    words = (*FAST[:4], "--data", "binary.npy", *layers, *guide, "--guide.net.hidden", 7)
    code, out, err = pv("train", *words, "--out", "run")
    assert (code, err) == (0, "")
    assert "guide Normal + Normal + IAF" in " ".join(out.split())
    vae: Any = pyrovae.load("run")
    assert [type(encoder).__name__ for encoder in vae.encoders] == ["Normal", "Normal", "IAF"]
    assert {encoder.net.head.in_features for encoder in vae.encoders} == {7}
    assert pv("encode", "run")[0] == 0
    given = _flags.parse("train", Settings, [*map(str, words), "--inference", "bottom-up"])
    settings = Settings(**given)
    vae, _ = _build.build(settings, load_data(settings))
    assert [type(encoder).__name__ for encoder in vae.encoders] == ["IAF"] * 3


def test_flags_reach_the_parts(pv: Callable[..., Ran]) -> None:
    words = ("--guide.net", "MLP", "--guide.net.hidden", "3,4", "--likelihood", "Normal")
    pv("train", *FAST, "--data", "real.npy", *words, "--likelihood.scale", "0.5", "--out", "run")
    model = json.loads(Path("run/config.json").read_text())["model"]["init_args"]
    assert model["guide"]["init_args"]["net"]["init_args"]["hidden"] == [3, 4]
    assert model["likelihood"]["init_args"]["net"]["init_args"]["hidden"] == 5
    assert model["likelihood"]["init_args"]["scale"] == 0.5


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("Student", ("--likelihood.df", "5"), {"df": 5.0}),
        ("Plain", ("--likelihood.scale", "0.3"), {"fixed_scale": 0.3}),
        ("Untyped", (), {"fixed_scale": 0.7}),
        ("Untyped", ("--likelihood.scale", "0.3"), {"fixed_scale": 0.3}),
    ],
)
def test_a_likelihood_of_ones_own(
    pv: Callable[..., Ran], name: str, words: tuple[str, ...], expected: dict[str, float]
) -> None:
    own = ("--data", "real.npy", "--likelihood", f"own_parts.{name}", *words)
    code, _, err = pv("train", *FAST, *own, "--out", "run")
    assert (code, err) == (0, "")
    before = Path("run/log_px.json").read_text()
    Path("run/summary.json").unlink()
    assert pv("train", "--resume", "run")[0] == 0
    assert Path("run/log_px.json").read_text() == before
    assert pv("log-px", "run", "--num-particles", 3)[0] == 0
    loaded: Any = pyrovae.load("run")
    assert type(loaded.likelihood).__name__ == name
    assert {key: getattr(loaded.likelihood, key) for key in expected} == expected


def test_the_example_for_contributors_is_short_and_works(pv: Callable[..., Ran]) -> None:
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert example.count("\n") < 20
    Path("contributed.py").write_text(example)
    own = ("--data", "real.npy", "--likelihood", "contributed.Gumbel")
    code, out, err = pv("train", *FAST, *own, "--out", "run")
    assert (code, err) == (0, "")
    assert "likelihood Gumbel" in out
    assert type(pyrovae.load("run").likelihood).__name__ == "Gumbel"


@pytest.mark.parametrize("role", ["prior", "guide", "net", "objective"])
def test_parts_of_ones_own_of_the_other_roles(pv: Callable[..., Ran], role: str) -> None:
    own = (f"--{role}", f"own_roles.My{role.capitalize()}", f"--{role}.width", "0.5")
    code, _, err = pv("train", *FAST[:-2], "--data", "binary.npy", *own, "--out", "run")
    assert (code, err) == (0, "")
    assert pv("log-px", "run", "--num-particles", 3)[0] == 0


# Resuming -----------------------------------------------------------------------------------------


def test_a_finished_run_has_nothing_to_go_on_with(pv: Callable[..., Ran]) -> None:
    pv("train", *FAST, "--out", "run")
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")}
    code, out, _ = pv("train", "--resume", "run")
    assert code == 0
    assert "is finished" in out
    assert {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")} == before


def test_a_run_that_was_killed_early_ends_like_one_that_was_not(pv: Callable[..., Ran]) -> None:
    pv("train", *FAST, "--out", "whole")
    (Path("begun")).mkdir()
    Path("begun/config.json").write_text(Path("whole/config.json").read_text())
    assert pv("train", "--resume", "begun")[0] == 0
    weights = [Path(run, "weights.safetensors").read_bytes() for run in ("whole", "begun")]
    assert weights[0] == weights[1]


def test_data_are_found_from_another_folder(
    pv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    pv("train", *FAST, "--data", "real.npy", "--out", "run")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert pv("log-px", "../run", "--num-particles", 3)[0] == 0


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: _cut(run / "training.safetensors"), "damaged or cut short .* start anew"),
        (lambda run: _lower_lr(run / "config.json"), "other settings: lr .* start anew"),
        (lambda run: _cut(run / "config.json"), "config.json is damaged"),
        (lambda run: (run / "config.json").unlink(), "is no run or saved model"),
        (lambda run: (run / "config.json").write_text('{"settings": {"a": 1}}'), "another version"),
        (
            lambda run: (run / "config.json").write_text('{"model": null}'),
            "a saved model, not a run",
        ),
    ],
)
def test_what_cannot_be_resumed_says_why(pv: Callable[..., Ran], harm: Any, message: str) -> None:
    pv("train", *FAST, "--out", "run")
    Path("run/summary.json").unlink()
    harm(Path("run"))
    _refused(pv("train", "--resume", "run"), message)
    assert Path("run/weights.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("likelihood", "Bernoulli", "likelihood must be class_path and init_args"),
        ("guide", {"init_args": {}}, "guide must be class_path and init_args"),
        ("prior", {"class_path": "nowhere"}, "prior must be class_path and init_args"),
        ("net", None, "net must be class_path and init_args"),
        ("epochs", "2", "epochs must be a whole number"),
        ("lr", "fast", "lr must be a number"),
        ("latent_dim", {"a": 1}, "latent_dim must be a whole number or numbers like 50,20"),
        ("data", 3, "data must be a word"),
        ("seeds", None, "seeds must be a whole number"),
    ],
)
def test_settings_that_no_command_wrote_are_refused(
    pv: Callable[..., Ran], name: str, value: Any, message: str
) -> None:
    given = _flags.parse("train", Settings, ["--data", "real.npy"])
    Path("run").mkdir()
    for settings in (Settings(**given).plain() | {name: value}, [name]):
        Path("run/config.json").write_text(json.dumps({"settings": settings}))
        where = "the settings in run are damaged: "
        expected = message if isinstance(settings, dict) else "expected an object"
        _refused(pv("train", "--resume", "run"), f"{where}{expected}$")


def test_a_part_inside_a_part_is_looked_at_too(pv: Callable[..., Ran]) -> None:
    given = _flags.parse("train", Settings, ["--guide.net", "MLP", "--guide", "Normal"])
    settings = Settings(**given).plain() | {"lr": 1}
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps({"settings": settings}))
    assert json.dumps(saved_settings(Run("run")).plain()) == json.dumps(settings)
    del settings["guide"]["init_args"]["net"]["class_path"]
    Path("run/config.json").write_text(json.dumps({"settings": settings}))
    _refused(pv("train", "--resume", "run"), "guide must be class_path and init_args$")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def _lower_lr(file: Path) -> None:
    file.write_text(file.read_text().replace('"lr": 0.004', '"lr": 0.002'))


def test_seeds_report_mean_and_spread_and_go_on_where_they_stopped(pv: Callable[..., Ran]) -> None:
    code, out, _ = pv("train", *FAST, "--seeds", 3, "--seed", 4, "--out", "run")
    assert code == 0
    assert "log p(x) over 3 seeds: mean " in out
    found = json.loads(Path("run/log_px.json").read_text())
    values = [json.loads(Path(f"run/seed-{i}/log_px.json").read_text())["mean"] for i in (4, 5, 6)]
    assert found["values"] == values
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert len(set(values)) == 3
    Path("run/summary.json").unlink()
    Path("run/seed-6/summary.json").unlink()
    Path("run/seed-6/config.json").unlink()
    done = Path("run/seed-4/summary.json").stat().st_mtime_ns
    assert pv("train", "--resume", "run")[0] == 0
    assert Path("run/seed-4/summary.json").stat().st_mtime_ns == done
    assert json.loads(Path("run/log_px.json").read_text()) == found
    _refused(pv("log-px", "run"), "several seeds: name one, such as run/seed-4")
    pv("train", *FAST, "--out", "alone", "--seed", 5)
    assert json.loads(Path("alone/log_px.json").read_text())["mean"] == values[1]


# Labels -------------------------------------------------------------------------------------------

LABELLED = ("train", "--data", "labelled.npz", *FAST)


@pytest.mark.parametrize(
    "model",
    [
        "semi-supervised",
        pytest.param("conditional", marks=pytest.mark.slow),
        pytest.param("auxiliary", marks=pytest.mark.slow),
    ],
)
def test_models_with_a_label_are_used_like_others(
    pv: Callable[..., Ran], model: str, pictures: None
) -> None:
    few = () if model == "conditional" else ("--labels", 6)
    code, out, err = pv(*LABELLED, "--model", model, *few, "--out", "run")
    assert code == 0, err
    vae = pyrovae.load("run")
    assert vae.num_classes == 3
    assert {"samples.png", "analogies.png"} < {p.name for p in Path("run/figures").iterdir()}
    found = json.loads(Path("run/log_px.json").read_text())
    assert found["num_data"] == 4
    assert Path("run/latents.json").exists()
    assert ("Classes: " in out) == (model != "conditional")
    np.savez("new.npz", x=np.zeros((5, 6, 7), np.uint8), y=np.arange(5) % 3)
    for words in (
        ("log-px", "run", "--num-particles", 4),
        ("log-px", "run", "--data", "new.npz", "--num-particles", 4),
        ("log-px", "run", "--method", "annealed", "--method.num-distributions", 3),
        ("gaps", "run", "--num-data", 2, "--steps", 2, "--method", "importance"),
        ("encode", "run", "--data", "new.npz", "--out", "z.npz"),
        ("sample", "run", "--num-samples", 7),
        ("plot", "run"),
    ):
        code, _, err = pv(*words)
        assert code == 0, (words, err)
    with np.load("z.npz") as codes:
        assert codes["loc"].shape == (5, 2)
    with np.load("run/samples.npz") as drawn:
        assert drawn["x"].shape == (7, 1, 6, 7)
        assert drawn["y"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert pv("train", "--resume", "run")[0] == 0


def test_classes_are_written_and_judged(pv: Callable[..., Ran]) -> None:
    settings = ("--model", "semi-supervised", "--labels", 6, "--objective.alpha", 2)
    assert pv(*LABELLED, *settings, "--out", "run")[0] == 0
    config = json.loads(Path("run/config.json").read_text())["settings"]
    assert config["objective"]["class_path"] == "pyrovae.objectives.SemiSupervised"
    assert config["objective"]["init_args"]["alpha"] == 2
    judged = json.loads(Path("run/classes.json").read_text())
    rows = Path("run/classes.csv").read_text().splitlines()
    assert rows[0] == "index,predicted,label,p0,p1,p2"
    table = np.genfromtxt(rows[1:], delimiter=",")
    assert len(table) == judged["num_data"] == 4
    np.testing.assert_allclose(table[:, 3:].sum(1), 1, atol=1e-5)
    assert (table[:, 1] == table[:, 3:].argmax(1)).all()
    assert judged["error"] == pytest.approx((table[:, 1] != table[:, 2]).mean())
    np.save("new.npy", np.zeros((5, 6, 7), np.uint8))
    code, out, _ = pv("classify", "run", "--data", "new.npy")
    assert code == 0
    assert "Classes" not in out
    assert Path("run/classes-new.csv").read_text().startswith("index,predicted,p0,p1,p2\n0,")
    assert not Path("run/classes-new.json").exists()


def test_other_seeds_draw_other_labels(pv: Callable[..., Ran]) -> None:
    dataset = load_data(Settings(data="labelled.npz"))
    few = [
        _build.arranged(
            Settings(data="labelled.npz", model="semi-supervised", labels=6, seed=seed), dataset
        ).train.y
        for seed in (0, 0, 1)
    ]
    assert torch.equal(few[0], few[1])
    assert not torch.equal(few[0], few[2])
    assert all(int((y >= 0).sum()) == 6 for y in few)


def test_a_prior_given_the_label_and_channels_of_labels(pv: Callable[..., Ran]) -> None:
    words = ("--model", "conditional", "--conditional-prior", "--guide.net", "Conv")
    assert pv(*LABELLED, *words, "--out", "run")[0] == 0
    vae = pyrovae.load("run")
    assert isinstance(vae.prior, pyrovae.guides.Normal)
    assert vae.encoder.shape == (1 + 3, 6, 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data labelled.npz --model semi", "--model must be one of vae, conditional, semi-super"),
        ("--data real.npy --model conditional", "--model conditional needs labels, and real.npy"),
        ("--data labelled.npz --labels 6", "--labels is for models that learn them"),
        ("--data labelled.npz --model auxiliary --labels 2", "--labels: .* from 3, one for each"),
        ("--data labelled.npz --model semi-supervised --labels 900", "--labels: .* got 900"),
        ("--data labelled.npz --model semi-supervised --labels few", "must be a whole number"),
        ("--data labelled.npz --model conditional --latent-dim 3,2", "has one layer"),
        ("--data labelled.npz --conditional-prior", "--conditional-prior is for models with"),
        (
            "--data labelled.npz --model semi-supervised --labels 6 --objective ELBO",
            "ELBO takes data that all have labels, or none",
        ),
        (
            "--data labelled.npz --model semi-supervised --labels 6 --objective.alpha -1",
            "--objective: alpha must be a number from 0 on",
        ),
    ],
)
def test_labels_that_cannot_be(pv: Callable[..., Ran], words: str, message: str) -> None:
    _refused(pv("train", *FAST, *words.split()), message)
    assert not Path("runs").exists()


def test_what_has_no_classes_is_not_classified(pv: Callable[..., Ran]) -> None:
    assert pv(*LABELLED, "--out", "run")[0] == 0
    _refused(pv("classify", "run"), "run holds a VAE, which learns no label")
    assert pv(*LABELLED, "--model", "conditional", "--out", "given")[0] == 0
    np.save("new.npy", np.zeros((5, 6, 7), np.uint8))
    _refused(pv("log-px", "given", "--data", "new.npy"), "new.npy has no labels")
    assert pv(*LABELLED, "--model", "semi-supervised", "--out", "all")[0] == 0
    _refused(pv("classify", "all", "--out", "classes.txt"), "--out must be a .csv file")


# What bad input gets ------------------------------------------------------------------------------


def _refused(ran: Ran, message: str) -> None:
    """One line on the error stream that matches, and exit code 2."""
    code, _, err = ran
    assert code == 2
    assert err.startswith("pyrovae: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data digit", "got 'digit'; did you mean digits"),
        ("--data nothing.npy", "no such file or folder"),
        ("--data cut.npy", "expected a whole, readable file"),
        ("--data holes.npy", r"expected no NaN, .*\(--missing\)"),
        ("--data infinite.npy", "expected finite values"),
        ("--data infinite.npy --missing", "expected finite values"),
        ("--data empty.npy", "at least one datum"),
        ("--data one.npy", "at least three data"),
        ("--data=", "--data must be a name, a file or a folder"),
        ("--data mnist", r"not downloaded .* put .*\(--data-root\)"),
        ("--data mnist --data-root /nowhere", "expected a folder with data"),
        ("--data negative.npy --kind counts", "whole numbers from 0 on"),
        ("--data negative.npy --likelihood Poisson", "whole numbers from 0 on, got .* from -3 to"),
        ("--data real.npy --likelihood Poisson", "expected counts data, .* got fractional values"),
        ("--binarize none --likelihood Bernoulli", "outside the support of the likelihood"),
        ("--data real.npy --net Conv", "use MLP for other data"),
        ("--likelihood Bernouli", r"no likelihood called 'Bernouli' \(did you mean Bernoulli\?\)"),
        ("--likelihood Likelihood", "no likelihood called 'Likelihood'"),
        ("--guide.net Con", r"no net called 'Con' \(did you mean Conv\?\)"),
        ("--objective Nope", "no objective called 'Nope'; there are .*ELBO"),
        ("--prior nowhere.Prior", "the module 'nowhere' of .* cannot be imported"),
        ("--likelihood own_parts.Studen", r"no class 'Studen' \(did you mean Student\?\)"),
        ("--likelihood pyrovae.guides.Normal", "derived from pyrovae.likelihoods.Likelihood"),
        ("--data real.npy --likelihood own_parts.Broken", "not today"),
        ("--likelihood", "--likelihood needs a name"),
        ("--guide.net", "--guide.net needs a name"),
        (
            "--likelihood Normal --likelihood.scale big",
            "a number or learned or per-pixel or amortized or optimal, got 'big'",
        ),
        ("--likelihood Normal --likelihood.scale -1", "scale must be positive and finite"),
        ("--likelihood Normal --likelihood.scal 1", "Normal takes --likelihood.scale"),
        ("--likelihood.scale 1", "name the likelihood it belongs to"),
        (
            "--likelihood Bernoulli --likelihood.shape 1",
            "Bernoulli takes --likelihood.net; see pyr",
        ),
        ("--guide.nosuch 3", "--guide.nosuch: Normal takes --guide.net; see pyrovae parts"),
        ("--prior.nosuch 3", "StandardNormal takes no flags; see pyrovae parts"),
        ("--likelihood.net Conv", "name the likelihood it belongs to"),
        ("--net.hidden a", "--net.hidden must be a whole number or numbers like 50,20, got 'a'"),
        ("--net.hidden a,b", "numbers like 50,20, got 'a,b'$"),
        ("--net.hidden 0", "pyrovae: --net: hidden must be positive integers, got 0"),
        ("--guide.net MLP --guide.net.hidden 0", "pyrovae: --guide.net: hidden must be positive"),
        ("--guide IAF --guide.transforms 0", "pyrovae: --guide: transforms must be positive"),
        ("--objective.num-particles 0", "pyrovae: --objective: num_particles must be at least 1"),
        ("--objective.beta -1", "pyrovae: --objective: beta must not be negative"),
        ("--latent-dim 2,1 --objective.beta -1", "pyrovae: --objective: beta must not be"),
        ("--net.activation rel", "activation must be one of elu"),
        ("--objective.beta x", "--objective.beta must be a number, got 'x'"),
        ("--num-particles 0", "--num-particles must be at least 1, got 0"),
        ("--latent-dim 0", "--latent-dim must be at least 1, got 0"),
        ("--latent-dim 5,0", "--latent-dim must be at least 1, got 5,0$"),
        ("--latent-dim a,b", "--latent-dim must be .* or numbers like 50,20, got 'a,b'$"),
        ("--seeds 0", "--seeds must be at least 1"),
        ("--devices 0", "--devices must be at least 1, got 0"),
        ("--devices 3 --batch-size 2", "--devices must be at most --batch-size, 2"),
        ("--seed -1", "--seed must be a number from 0 on, got -1"),
        ("--batch-size 0", "batch_size must be"),
        ("--epochs 0", "epochs must be"),
        ("--epochs two", "--epochs must be a whole number, got 'two'"),
        ("--epochs", "--epochs needs a value"),
        ("--lr -1", "lr must be positive"),
        ("--lr nan", "lr must be"),
        ("--schedule foo", "schedule must be one of"),
        ("--precision 16", "precision must be one of"),
        ("--kind foo", "kind: expected one of"),
        ("--epoch 3", r"no flag --epoch \(did you mean --epochs\?\)"),
        ("stray", "'stray' is not expected here"),
        ("--missing maybe", "--missing takes true or false, got 'maybe'"),
        ("--compile maybe", "--compile takes true or false, got 'maybe'"),
        ("--compile=maybe", "--compile must be true or false, got 'maybe'"),
        ("--accelerator abacus", "accelerator 'abacus'"),
        ("--resume nothing", "is no run or saved model"),
        ("--resume nothing --epochs 3", "leave out --epochs"),
        ("--out real.npy", "exists, and holds no run"),
        ("--out real.npy/run", "cannot be written"),
        ("--out real.npy/run --seeds 2", "cannot be written"),
        ("--out . --overwrite", "exists, and holds no run"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(
    pv: Callable[..., Ran], words: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").resolve()))
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    _refused(pv("train", *words.split()), message)
    after = {
        p: p.read_bytes() for p in Path().rglob("*") if p.is_file() and "__pycache__" not in str(p)
    }
    assert after == before
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(pv: Callable[..., Ran]) -> None:
    _refused(pv("train", "--accelerator", "cuda"), "accelerator 'cuda' .* 'cpu'")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", r"no command 'trian' \(did you mean train\?\)"),
        ("log-px", "pyrovae log-px needs RUN"),
        ("log-px nothing", "is no run or saved model"),
        ("log-px real.npy", "real.npy is a file: name the folder of a run"),
        ("log-px run/config.json", "run/config.json is a file: name the folder of a run"),
        ("log-px run --num-particles 0", "num_particles must be at least 1"),
        ("log-px run --method guess", "no method called 'guess'; there are Annealed, .*Importance"),
        ("log-px run --method anealed", r"no method called 'anealed' \(did you mean Annealed\?\)"),
        ("log-px run --method own_roles.MyNet", "derived from pyrovae.evidence.Method"),
        ("log-px run --method annealed --method.schedule x", "--method: schedule must be one of"),
        ("log-px run --method annealed --method.acceptance x", "must be a number, got 'x'"),
        ("log-px run --method.start prior", "--method.start: Importance takes --method.widen, "),
        ("log-px run --refine -1", "--refine must be at least 0, got -1"),
        ("log-px run --num-data 3", "--num-data says how many data to draw, and importance draws"),
        ("log-px run --method bidirectional --num-data 0", "--num-data must be at least 1, got 0"),
        ("log-px run --method bidirectional --refine 2", "leave it out"),
        ("log-px run --data holes.npy", "expected no NaN"),
        ("log-px run --data binary.npy --latent-dim 3", "no flag --latent-dim"),
        ("log-px run --data table.csv", r"expected data of shape \(N, 4\)"),
        ("log-px run extra", "'extra' is not expected here"),
        ("encode run --out z.txt", "must be an .npz file"),
        ("encode run --out nowhere/z.npz", "there is no folder nowhere"),
        ("sample run --num-samples 0", "--num-samples must be at least 1"),
        ("plot run --data-root", "--data-root needs a value"),
        (
            "train --data real.npy --out run",
            "choose another --out, or continue it with --resume run",
        ),
        ("parts all", "'all' is not expected here"),
        ("train --likelihood.help Bernouli", "did you mean Bernoulli"),
    ],
)
def test_bad_input_to_other_commands(pv: Callable[..., Ran], words: str, message: str) -> None:
    pv("train", *FAST, "--data", "real.npy", "--out", "run")
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")}
    _refused(pv(*words.split()), message)
    assert {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")} == before


def test_a_run_without_weights_or_with_damaged_ones_says_so(pv: Callable[..., Ran]) -> None:
    pv("train", *FAST, "--data", "real.npy", "--out", "run")
    _cut(Path("run/weights.safetensors"))
    _refused(pv("sample", "run"), "damaged or cut short")
    Path("run/weights.safetensors").unlink()
    _refused(pv("sample", "run"), "pyrovae train --resume run")
    Path("real.npy").unlink()
    _refused(
        pv("train", "--resume", "run") if not Run("run").finished else pv("plot", "run"), "run"
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    pv: Callable[..., Ran],
) -> None:
    ran = pv("train", *FAST, "--data", "real.npy", "--lr", "1e30", "--epochs", 20, "--out", "run")
    _refused(ran, r"epoch \d+, step \d+: .*; the last good checkpoint is run/training.safetensors")
    assert "try a lower learning rate, clipped gradients (clip_norm, such as 100), or " in ran[2]
    assert Path("run/training.safetensors").exists()
    assert not Run("run").finished


def test_a_validation_that_is_never_finite_is_written_down_as_unknown(
    pv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"epoch": 1, "valid_elbo": -np.inf}, {"epoch": 2, "valid_elbo": np.nan}]
    monkeypatch.setattr("pyrovae._train.fit", lambda *_, **__: rows)
    assert pv("train", *FAST, "--data", "real.npy", "--out", "run")[0] == 0
    assert json.loads(Path("run/summary.json").read_text())["valid_elbo"] is None


def test_memory_is_told_in_one_unit_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for platform, unit in (("linux", 2**10), ("darwin", 2**20)):
        monkeypatch.setattr(sys, "platform", platform)
        assert _train.peak_memory_mb() == pytest.approx(peak / unit, rel=0.1)
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert np.isnan(_train.peak_memory_mb())


def test_a_failure_before_the_first_step_leaves_no_folder(
    pv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("the first batch does not do")

    monkeypatch.setattr("pyrovae._train.fit", fails)
    _refused(pv("train", *FAST, "--out", "run"), "the first batch does not do")
    _refused(pv("train", *FAST, "--seeds", 2, "--out", "run"), "the first batch does not do")
    assert not Path("run").exists()


# Help ---------------------------------------------------------------------------------------------


def test_no_words_and_help_show_the_commands(pv: Callable[..., Ran]) -> None:
    assert pv() == pv("--help") == pv("-h")
    code, out, _ = pv()
    assert code == 0
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert pv("--version") == (0, f"{pyrovae.__version__}\n", "")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_names_every_flag_in_words(pv: Callable[..., Ran], command: str) -> None:
    code, out, err = pv(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: pyrovae {command}")
    assert max(map(len, out.splitlines())) <= 100
    for name, parameter in cli._flags.parameters_of(cli.COMMANDS[command]).items():
        flag = (
            name.upper() if parameter.default is parameter.empty else f"--{name.replace('_', '-')}"
        )
        (line,) = (i for i, line in enumerate(out.splitlines()) if line.split()[:1] == [flag])
        words = " ".join(out.splitlines()[line : line + 2]).split()
        assert len(words) > 3, f"{flag} is not explained"
    assert not any(word in out for word in ("Callable", "Optional", "class_path", "None", "null"))


def test_parts_shows_every_part_with_flags_and_papers(pv: Callable[..., Ran]) -> None:
    code, out, _ = pv("parts")
    assert code == 0
    for role in _catalogue.ROLES:
        assert f"--{role} NAME" in out
        for name, part in _catalogue.parts(role).items():
            assert f"\n  {name}: " in out
            for flag, words in _catalogue.flags(part).items():
                assert f"--{role}.{flag.replace('_', '-')}" in out
                assert _catalogue.read_docstring(part)[1].get(flag), f"{part} explains no {flag}"
                assert words.default is words.empty or _catalogue.shown_default(words) in out
    assert "arXiv:1312.6114" in out


def test_help_of_one_part(pv: Callable[..., Ran]) -> None:
    code, out, _ = pv("train", "--likelihood.help", "Normal")
    assert code == 0
    assert out.startswith("  Normal: ")
    assert "--likelihood.scale (a number or learned or per-pixel or amortized or optimal)" in out
    assert "Conv: " in pv("train", "--guide.net.help")[1]
    assert "Degrees of freedom" in pv("train", "--likelihood.help=own_parts.Student")[1]


# In a process of its own --------------------------------------------------------------------------


def _start(*words: str, **options: Any) -> subprocess.Popen[str]:
    root = str(Path(pyrovae.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pyrovae.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def _wait_for(file: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_text().count("\n") < lines:
        assert time.monotonic() < deadline, f"{file} did not come"
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_and_interrupted_runs_go_on(pv: Callable[..., Ran]) -> None:
    """One that is killed, then interrupted, ends where the undisturbed one does."""
    words = ("train", *FAST, "--epochs", "150")
    killed = _start(*words, "--out", "run")
    _wait_for(Path("run/metrics.csv"), 20)
    killed.kill()
    killed.communicate()
    again = _start("train", "--resume", "run")
    _wait_for(Path("run/metrics.csv"), 40)
    again.send_signal(signal.SIGINT)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 130
    assert "Go on with: pyrovae train --resume run" in err
    assert "Traceback" not in err
    assert pv("train", "--resume", "run")[0] == 0
    assert pv(*words, "--out", "whole")[0] == 0
    assert [row["epoch"] for row in Run("run").metrics()] == list(range(1, 151))
    for name in ("weights.safetensors", "log_px.csv"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()
    assert not list(Path("run").glob(".*.tmp"))


@pytest.mark.slow
def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    process = _start("parts")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141
