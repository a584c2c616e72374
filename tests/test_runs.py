"""Saving and loading without pickle, and the folder of a run."""

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrovae
from pyrovae import VAE, guides, likelihoods, nets, priors
from pyrovae._config import from_config, to_config
from pyrovae.checkpoint import read_tensors, write_tensors
from pyrovae.runs import Run, model_config

LIKELIHOODS = {
    "Bernoulli": likelihoods.Bernoulli,
    "ContinuousBernoulli": likelihoods.ContinuousBernoulli,
    "Normal": likelihoods.Normal,
    "Poisson": likelihoods.Poisson,
}


class Student(likelihoods.Likelihood):
    """A likelihood of the user's own."""

    num_params = 2

    def __init__(self, *args: Any, df: float = 3.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.df = df
        self.register_buffer("seen", torch.zeros(()))

    def distribution(self, params: Tensor) -> dist.TorchDistribution:
        """Student's t."""
        loc, log_scale = self.split(params)
        return dist.StudentT(self.df, loc, log_scale.exp()).to_event(1)


def make(kind: Any = likelihoods.Bernoulli, latent_dim: int = 2, **options: Any) -> VAE:
    likelihood = kind((5,), latent_dim, nets.MLP(hidden=(7,), batch_norm=True), **options)
    vae = VAE(priors.StandardNormal(latent_dim), likelihood, guides.Normal((5,), latent_dim))
    with torch.no_grad():
        for param in vae.parameters():
            param.add_(0.2 * torch.randn_like(param))
    return vae


def log_px(vae: VAE, x: Tensor) -> Tensor:
    return pyrovae.log_px(vae.model, vae.guide, x, 20, seed=0).values


class Opaque(nn.Module):
    """A module that only its maker can build."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


# Round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_loaded_model_gives_the_same_numbers_bit_for_bit(name: str, tmp_path: Path) -> None:
    vae, x = make(LIKELIHOODS[name]), torch.ones(4, 5)
    vae.train().reconstruct(x)
    vae.likelihood.net(torch.randn(4, 2))  # moves batch statistics
    pyrovae.save(vae, tmp_path / "model")
    again = pyrovae.load(tmp_path / "model")
    assert torch.equal(log_px(vae, x), log_px(again, x))
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "config.json",
        "weights.safetensors",
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    vae = make(likelihoods.Normal).to(dtype)
    pyrovae.save(vae, tmp_path)
    again = pyrovae.load(tmp_path)
    assert {t.dtype for t in again.state_dict().values() if t.is_floating_point()} == {dtype}
    assert again.prior().sample().dtype == dtype
    assert again.sample(3).dtype == dtype
    into = pyrovae.load(tmp_path, make(likelihoods.Normal))
    assert {p.dtype for p in into.parameters()} == {torch.float32}


def test_mixed_precision_is_kept(tmp_path: Path) -> None:
    vae = make()
    vae.encoder.double()
    pyrovae.save(vae, tmp_path)
    again = pyrovae.load(tmp_path)
    assert all(p.dtype == torch.float64 for p in again.encoder.parameters())
    assert all(p.dtype == torch.float32 for p in again.likelihood.parameters())


def test_a_part_of_ones_own_comes_back_with_its_arguments_and_buffers(tmp_path: Path) -> None:
    vae = make(Student, df=5)
    vae.likelihood.seen.fill_(7)
    pyrovae.save(vae, tmp_path)
    again = pyrovae.load(tmp_path)
    assert type(again.likelihood) is Student
    assert (again.likelihood.df, again.likelihood.seen) == (5, 7)
    x = torch.randn(4, 5)
    assert torch.equal(log_px(vae, x), log_px(again, x))


def test_copies_are_saved_like_their_originals(tmp_path: Path) -> None:
    vae = make()
    pyrovae.save(copy.deepcopy(vae), tmp_path)
    assert torch.equal(
        log_px(pyrovae.load(tmp_path), torch.ones(2, 5)), log_px(vae, torch.ones(2, 5))
    )


def test_modules_that_cannot_be_rebuilt_take_their_weights(tmp_path: Path) -> None:
    module = Opaque(nn.Linear(2, 3))
    pyrovae.save(module, tmp_path)
    with pytest.raises(ValueError, match=r"build it yourself and call load\(path, vae\)"):
        pyrovae.load(tmp_path)
    again = Opaque(nn.Linear(2, 3))
    assert pyrovae.load(tmp_path, again) is again
    assert torch.equal(again.layer.weight, module.layer.weight)


def test_a_model_whose_part_was_replaced_is_not_rebuilt_as_it_was(tmp_path: Path) -> None:
    vae = make(likelihoods.Bernoulli)
    vae.likelihood = likelihoods.Normal((5,), 2)
    pyrovae.save(vae, tmp_path)
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        pyrovae.load(tmp_path)


def test_a_class_that_nobody_finds_again_is_saved_as_weights(tmp_path: Path) -> None:
    class Local(likelihoods.Bernoulli):
        pass

    vae = make(Local)
    pyrovae.save(vae, tmp_path)
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        pyrovae.load(tmp_path)
    assert torch.equal(
        log_px(pyrovae.load(tmp_path, make(Local)), torch.ones(2, 5)), log_px(vae, torch.ones(2, 5))
    )


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    pyrovae.save(nn.Sequential(layer, layer), tmp_path)
    other = nn.Linear(2, 2)
    again = pyrovae.load(tmp_path, nn.Sequential(other, other))
    assert again[0].weight is again[1].weight
    assert torch.equal(other.weight, layer.weight)


def test_saving_replaces_an_earlier_model(tmp_path: Path) -> None:
    pyrovae.save(make(latent_dim=3), tmp_path)
    vae = make(likelihoods.Normal)
    pyrovae.save(vae, tmp_path)
    assert torch.equal(
        log_px(pyrovae.load(tmp_path), torch.ones(2, 5)), log_px(vae, torch.ones(2, 5))
    )


def test_a_failed_save_leaves_the_earlier_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = make()
    pyrovae.save(vae, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("pyrovae.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space"):
        pyrovae.save(make(likelihoods.Normal), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# What load refuses --------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pyrovae.save(make(), tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, *keys: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


PRIOR = ("model", "init_args", "prior")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (
            (*PRIOR, "class_path"),
            "pyrovae.priors.Nope",
            "is not found .* put its module on the Python",
        ),
        ((*PRIOR, "class_path"), "nowhere.Prior", "is not found"),
        ((*PRIOR, "class_path"), "Prior", "is not found"),
        ((*PRIOR, "class_path"), "os.system", "is not a part of a pyrovae model"),
        ((*PRIOR, "class_path"), "builtins.eval", "is not a part of a pyrovae model"),
        ((*PRIOR, "class_path"), "subprocess.Popen", "is not a part of a pyrovae model"),
        ((*PRIOR, "class_path"), 3, "expected class_path and init_args"),
        ((*PRIOR, "init_args"), {"size": 2}, "does not take the arguments saved with it"),
        ((*PRIOR, "init_args"), {"latent_dim": "a"}, "latent_dim must be at least 1"),
        ((*PRIOR, "init_args"), [2], "expected class_path and init_args"),
        ((*PRIOR, "init_args"), {"latent_dim": 3}, "disagree on latent_dim"),
        (("model",), {"class_path": "pyrovae.nets.MLP", "init_args": {}}, "an? MLP, not a model"),
        (("model", "init_args", "likelihood", "init_args", "shape"), [6], "disagree on shape"),
    ],
)
def test_a_configuration_that_is_no_model_is_refused(
    saved: Path, keys: Any, value: Any, message: str
) -> None:
    edit(saved, *keys, value=value)
    with pytest.raises(ValueError, match=message) as caught:
        pyrovae.load(saved)
    assert "\n" not in str(caught.value)


def test_no_constructor_but_those_of_parts_runs(saved: Path, monkeypatch: Any) -> None:
    ran = []
    monkeypatch.setattr("os.system", ran.append)
    edit(saved, *PRIOR, value={"class_path": "os.system", "init_args": {"command": "true"}})
    with pytest.raises(ValueError, match="is not a part"):
        pyrovae.load(saved)
    assert not ran


def test_weights_of_another_model_are_refused_before_any_is_copied(saved: Path) -> None:
    other = make(latent_dim=3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"do not fit the model: .* has shape .*, and \d+ more"):
        pyrovae.load(saved, other)
    assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())
    with pytest.raises(ValueError, match="do not fit the model: the file has no weight"):
        pyrovae.load(saved, nn.Linear(2, 2))


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_weights_cut_short_are_refused(saved: Path, keep: float) -> None:
    file = saved / "weights.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(ValueError, match="damaged or cut short"):
        pyrovae.load(saved)


def test_missing_files_are_named(saved: Path, tmp_path: Path) -> None:
    (saved / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights yet"):
        pyrovae.load(saved)
    with pytest.raises(ValueError, match="is no run or saved model"):
        pyrovae.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json is a file: name the folder of a run"):
        pyrovae.load(saved / "config.json")
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        pyrovae.load(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object, got a list"):
        pyrovae.load(saved)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(ValueError, match="_extra_state is a dict, not a tensor"):
        pyrovae.save(Stateful(1, 1), tmp_path / "a")
    with pytest.raises(ValueError, match=r"pyro.get_param_store\(\).save"):
        pyrovae.save(pyrovae.Program(lambda x: None, lambda x: None), tmp_path / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        pyrovae.save(make(), tmp_path / "file")


def test_tensors_without_names_in_common_do_not_load(tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(1)}, {})
    assert read_tensors(tmp_path / "weights.safetensors")[0].keys() == {"a"}


# Configurations -----------------------------------------------------------------------------------


def test_arguments_are_kept_by_name_however_they_were_given() -> None:
    net = nets.MLP(hidden=(3,))
    by_position = Student((5,), 2, net, df=4)
    by_name = Student(df=4, net=net, latent_dim=2, shape=(5,))
    assert to_config(by_position)["init_args"].keys() == {"shape", "latent_dim", "net", "df"}
    assert to_config(by_position)["init_args"] == to_config(by_name)["init_args"]
    assert from_config(to_config(by_position)).df == 4


def test_values_that_json_lacks_are_refused() -> None:
    class Bad(nets.Net):
        def __init__(self, f: Any):
            self.f = f

    with pytest.raises(TypeError, match="nobody can find it again"):
        to_config(Bad(1))
    with pytest.raises(TypeError, match="cannot be rebuilt from a configuration"):
        to_config(nets.MLP(activation="tanh", batch_norm=print))  # type: ignore[arg-type]


# The folder of a run ------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run")


def test_metrics_come_back_and_a_resumed_epoch_replaces_its_rows(run: Run) -> None:
    for epoch in (1, 2, 3):
        run.add_epoch({"epoch": epoch, "elbo": -1.5 * epoch})
    Run(run.path).add_epoch({"epoch": 2, "elbo": -9.0})
    assert run.metrics() == [{"epoch": 1, "elbo": -1.5}, {"epoch": 2, "elbo": -9.0}]
    assert (run.path / "metrics.csv").read_text().splitlines()[1] == "1,-1.5"


@pytest.mark.parametrize(
    "text",
    ["", "epoch,elbo\n1,-1", "epoch,elbo\n1\n", "epoch,elbo\n1,-\n", "elbo\n1\n", "\0\n\0\n"],
)
def test_tables_cut_short_say_so(run: Run, text: str) -> None:
    for name, column, read in (
        ("metrics.csv", "epoch", run.metrics),
        ("log_px.csv", "log_px", run.per_datum),
    ):
        (run.path / name).write_text(text.replace("epoch", column))
        with pytest.raises(ValueError, match=f"{name} is damaged or cut short: .*{column!r}"):
            read()


def test_whole_tables_are_read(run: Run) -> None:
    assert run.metrics() == []
    assert run.per_datum() is None
    (run.path / "metrics.csv").write_text("epoch,elbo\n1,nan\n2,-inf\n")
    (run.path / "log_px.csv").write_text("index,log_px\r\n0,-1.5\r\n1,-2\r\n")
    assert [row["epoch"] for row in run.metrics()] == [1, 2]
    assert run.metrics()[1]["elbo"] == -math.inf
    values = run.per_datum()
    assert values is not None
    assert values.tolist() == [-1.5, -2.0]


def test_json_is_strict(run: Run) -> None:
    run.write_json("log_px.json", {"mean": math.nan, "values": [1.0, -math.inf], "deep": {"a": 1}})
    text = (run.path / "log_px.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"mean": None, "values": [1.0, None], "deep": {"a": 1}}


def test_an_existing_folder_is_left_alone(run: Run, tmp_path: Path) -> None:
    run.describe({"data": "digits"})
    with pytest.raises(ValueError, match="choose another --out, or continue it with --resume"):
        Run.create(run.path)
    (run.path / "notes.json").write_text("mine")
    (run.path / "seed-0" / "figures").mkdir(parents=True)
    (run.path / "seed-0" / "figures" / "a.png").touch()
    Run.create(run.path, overwrite=True)
    assert [p.name for p in run.path.iterdir()] == ["notes.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists, and holds no run"):
            Run.create(tmp_path / "other", overwrite)
    with pytest.raises(ValueError, match="cannot be written: Not a directory"):
        Run.create(tmp_path / "other" / "mine.txt" / "run")


def test_folders_made_in_the_same_second_have_names_of_their_own(tmp_path: Path) -> None:
    runs = [Run.create_beside(tmp_path / "runs", "digits") for _ in range(3)]
    assert [one.path.name for one in runs] == ["digits", "digits-2", "digits-3"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be"):
        Run.create_beside(tmp_path / "file", "digits")


def test_a_run_that_never_began_to_train_leaves_nothing(run: Run, tmp_path: Path) -> None:
    run.describe({"data": "digits"})
    run.discard_unless_trained()
    assert not list(tmp_path.iterdir())
    kept = Run.create(tmp_path / "run")
    kept.describe({})
    kept.checkpoint.touch()
    kept.discard_unless_trained()
    assert kept.begun
    assert not kept.finished


def test_sys_path_is_searched_for_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someones_parts.py").write_text(
        "from pyrovae import priors\nclass Mine(priors.StandardNormal):\n    pass\n"
    )
    config = {"class_path": "someones_parts.Mine", "init_args": {"latent_dim": 2}}
    with pytest.raises(ValueError, match="put its module on the Python path"):
        from_config(config)
    monkeypatch.syspath_prepend(tmp_path)
    assert from_config(config).latent_dim == 2
    sys.modules.pop("someones_parts")


def test_a_model_changed_after_it_was_made_is_saved_as_weights_alone(tmp_path):
    vae = VAE(
        priors.StandardNormal(2),
        likelihoods.Normal((4,), 2, scale=0.5),
        guides.Normal((4,), 2),
    )
    assert model_config(vae) is not None
    vae.likelihood.fixed_scale = 0.1
    pyrovae.save(vae, tmp_path)
    with pytest.raises(ValueError, match="build it yourself"):
        pyrovae.load(tmp_path)
    swapped = VAE(
        priors.StandardNormal(2), likelihoods.Normal((4,), 2, scale=0.5), guides.Normal((4,), 2)
    )
    swapped.encoder.net.body[2] = torch.nn.Tanh()
    assert model_config(swapped) is None
