"""Models compared datum by datum: errors against simulations, refusals, the command."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import PPCA

from pyrovae import cli
from pyrovae.evidence import LogPx, compare, log_px
from pyrovae.runs import Run


def estimate(values, std_error=0.0, **other):
    values = torch.as_tensor(values, dtype=torch.float64)
    known = {"method": "importance", "num_particles": 10, "seed": 0, "how": "hand", "data": "some"}
    khat = torch.zeros_like(values)
    noise = torch.full_like(values, std_error)
    return LogPx(values, noise, khat, khat, khat, khat + 10, **(known | other))


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_error_of_a_paired_difference_is_its_spread():
    """400 test sets whose data differ by far more than the models do; noise in both estimates."""
    sets, n, truth, own, noise = 400, 60, 0.3, 0.5, 0.4
    hard = 10 * normal(sets, n, seed=0)
    a = hard + noise * normal(sets, n, seed=1)
    b = hard + truth + own * normal(sets, n, seed=2) + noise * normal(sets, n, seed=3)
    found = [
        compare({"a": estimate(one, noise), "b": estimate(other, noise)}).difference("b")
        for one, other in zip(a, b, strict=True)
    ]
    z = torch.tensor([(one.mean - truth) / one.test_std_error for one in found])
    assert 0.9 < z.std() < 1.1
    assert abs(z.mean()) < 3.5 / sets**0.5
    exact = ((own**2 + 2 * noise**2) / n) ** 0.5
    assert np.mean([one.test_std_error for one in found]) == pytest.approx(exact, rel=0.02)
    # Monte Carlo's part of it: what other noise would do on the same data.
    assert found[0].mean_std_error == pytest.approx((2 * noise**2 / n) ** 0.5)
    share = 0.5 * (1 + math.erf(truth / (own**2 + 2 * noise**2) ** 0.5 / 2**0.5))
    assert np.mean([one.share for one in found]) == pytest.approx(share, abs=0.01)


def test_estimates_of_two_models_differ_by_what_is_exact():
    """PPCA with two sizes of noise, their posteriors widened: three Monte Carlo errors at most."""
    one, two = (PPCA(noise=noise, width=1.2).double() for noise in (0.7, 1.0))
    x = one.sample(40).double()
    estimates = {
        name: log_px(model.model, model.guide, x, 300, seed=seed)
        for seed, (name, model) in enumerate({"one": one, "two": two}.items())
    }
    found = compare(estimates).difference("two")
    exact = two.log_px(x) - one.log_px(x)
    assert abs(found.mean - exact.mean()) < 3 * found.mean_std_error
    assert found.mean_std_error < 0.02 < found.test_std_error
    assert found.test_std_error == pytest.approx(float(exact.std()) / 40**0.5, rel=0.1)


def test_any_pair_and_both_directions():
    values = {name: normal(20, seed=i) for i, name in enumerate("abc")}
    found = compare(values)
    forth, back = found.difference("c", "b"), found.difference("b", "c")
    assert torch.equal(forth.values, values["c"] - values["b"])
    assert forth.mean == -back.mean
    assert forth.test_std_error == back.test_std_error
    assert forth.share == pytest.approx(1 - back.share)
    assert math.isnan(forth.mean_std_error)
    assert found.names == ["a", "b", "c"]


def test_seeds_enter_with_their_mean_and_their_spread():
    """A model's seeds are shifts of their own: what the error from their choice must say."""
    models, seeds, spread = 300, 4, 0.5
    shifts = spread * normal(models, seeds, seed=0)
    hard = normal(30, seed=1)
    z = []
    for shift in shifts:
        runs = [estimate(hard + s, 0.1) for s in shift]
        entry = compare({"several": runs, "one": estimate(hard)}).entries["several"]
        assert entry.mean == pytest.approx(hard.mean().item() + shift.mean().item())
        z.append((entry.mean - hard.mean().item()) / entry.seed_std_error)
    # Student's t with 3 degrees of freedom: variance 3, and its quartiles at 0.765.
    assert np.mean(np.abs(z) < 0.765) == pytest.approx(0.5, abs=0.1)
    assert entry.std_error.tolist() == pytest.approx([0.1 / seeds**0.5] * 30)
    both = compare({"a": runs, "b": runs}).difference("b")
    assert both.seed_std_error == pytest.approx(2**0.5 * entry.seed_std_error)
    assert both.mean_std_error == pytest.approx(0.1 * (2 / seeds / 30) ** 0.5)
    alone = compare({"a": runs, "b": estimate(hard)}).difference("b")
    assert math.isnan(alone.seed_std_error)


def test_a_table_in_markdown():
    found = compare(
        {"a": estimate([-3.0, -2.0, -4.0], 0.1), "b": estimate([-2.0, -1.5, -4.5], 0.1)}
    )
    table, _, words = str(found).partition("\n\n")
    assert table.splitlines() == [
        "| model | log p(x) | error | less a | error | of it Monte Carlo | better on |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a | -3.00 | 0.58 |  |  |  |  |",
        "| b | -2.67 | 0.93 | +0.33 | 0.44 | 0.082 | 67% |",
    ]
    assert "mean over 3 data (some)." in words
    assert "log p(x) is a lower bound by hand." in words
    assert "favour the model whose bound is the tighter one" in words
    assert "k-hat" not in words
    heavy = estimate([-2.0, -1.5, -4.5])
    heavy = dataclasses.replace(heavy, khat=torch.ones(3))
    assert "k-hat is above 0.7 for this many data: 3 under b." in str(
        compare({"a": estimate([-3.0, -2.0, -4.0]), "b": heavy})
    )
    rows = found.rows()
    assert rows[1]["difference"] == pytest.approx(1 / 3)
    assert rows[1]["better_on"] == pytest.approx(2 / 3)
    seeds = str(compare({"a": [estimate([-3.0]), estimate([-2.0])], "b": estimate([-2.0])}))
    assert "Means over seeds of log p(x): a 2 (standard deviation 0.71)" in seeds
    assert "nan" not in seeds


def test_values_given_are_compared_as_they_are():
    text = str(compare({"a": torch.tensor([-2.0, -5.0]), "b": torch.tensor([-1.0, -3.0])}))
    assert "| b | -2.00 | 1.00 | +1.50 | 0.50 |  | 100% |" in text
    assert ">=" not in text
    assert "nan" not in text


one = estimate([-1.0, -2.0])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": one}, "two models or more to compare, got 1"),
        ({"a": one, "b": estimate([-1.0])}, "a has 2 data and b 1: only the same data"),
        ({"a": one, "b": [one, estimate([-1.0])]}, "b has 2 data and b 1"),
        (
            {"a": one, "b": estimate([-1.0, -2.0], data="others")},
            "a and b are not of the same data, treated alike: 'some' and 'others'",
        ),
        (
            {"a": one, "b": estimate([-1.0, -2.0], claim="the value", method="exact")},
            "is a lower bound for a and the value for b: the difference would count",
        ),
        (
            {"a": one, "b": estimate([-1.0, -2.0], num_particles=20, how="20")},
            "estimated by hand for a, by 20 for b, .*estimate both alike",
        ),
        (
            {"a": one, "b": [one, estimate([-1.0, -2.0], settings={"steps": 3})]},
            "estimate both alike",
        ),
        ({"a": one, "b": torch.zeros(2)}, "b is a tensor, .* and a does"),
    ],
)
def test_unlike_things_are_refused(found, message):
    with pytest.raises(ValueError, match=message):
        compare(found)


def test_other_types_are_refused():
    for wrong in ([-1.0, -2.0], torch.zeros(2, 2), [], None):
        with pytest.raises(TypeError, match="b must be what log_px found, a list of that, or a"):
            compare({"a": one, "b": wrong})


def test_what_is_alike_all_the_same():
    """Units of standardized data are those that they were stored in; exact values are exact."""
    stored = estimate([-1.0, -2.0], data="t.csv test split, 2 rows, real values as stored")
    scaled = estimate([-2.0, -2.0], data="t.csv test split, 2 rows, standardized")
    assert compare({"a": stored, "b": scaled}).difference("b").mean == -0.5
    exact = [
        estimate([-1.0, -2.0], claim="the value", method="exact", settings={"points": points})
        for points in (10, 20)
    ]
    assert compare({"a": exact[0], "b": exact[1]}).difference("b").mean == 0


# Runs ---------------------------------------------------------------------------------------------


def make(path, values, name="log_px", test=7, **other):
    run = Run.create(path)
    run.describe({"data": "digits"}, data={"test": test})
    run.add_log_px(estimate(values, 0.1, **other), name)
    return run


def test_estimates_come_back_as_they_were(tmp_path):
    model = PPCA().double()
    settings = {"settings": {"num_distributions": 3}, "claim": "an estimate"}
    there = log_px(model.model, model.guide, model.sample(5).double(), 30, seed=4)
    for name, saved in {"log_px": there, "other": dataclasses.replace(there, **settings)}.items():
        run = Run(tmp_path)
        run.add_log_px(saved, name)
        back = run.log_px(name)
        for field in dataclasses.fields(LogPx):
            was, now = (getattr(one, field.name) for one in (saved, back))
            same = torch.allclose(was, now, 0, 0, True) if field.type == "Tensor" else was == now
            assert same, field.name
        arrays = np.load(tmp_path / f"{name}.npz")
        assert set(arrays) == {"index", "log_px", *("std_error", "ess", "khat")} | {
            "gain_per_doubling",
            "spent",
        }
        assert arrays["log_px"].tolist() == saved.values.tolist()
        assert arrays["index"].tolist() == list(range(5))
    assert run.log_px("nothing") is None


def test_files_of_older_versions_and_damaged_ones(tmp_path):
    run = make(tmp_path / "run", [-1.0, -2.0])
    old = json.loads((run.path / "log_px.json").read_text())
    for new in ("how", "settings", "claim", "spent_mean"):
        del old[new]
    (run.path / "log_px.json").write_text(json.dumps(old))
    (run.path / "log_px.csv").write_text("index,log_px,std_error\n0,-1,0.5\n1,-2,0.5\n")
    found = run.log_px()
    assert found.how == "importance with K = 10"
    assert found.khat.isnan().all()
    assert found.std_error.tolist() == [0.5, 0.5]
    (run.path / "log_px.csv").write_text("index,log_px\n0,-1\n")
    with pytest.raises(ValueError, match="not of each other: the one is of 2 data, the other of 1"):
        run.log_px()
    (run.path / "log_px.json").write_text("{")
    with pytest.raises(ValueError, match=r"log_px\.json is damaged"):
        run.log_px()


@pytest.fixture
def pv(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a", "b", "c")):
        make(name, normal(30, seed=i) - i)
    make("d", normal(30, seed=4), "log_px-annealed", method="annealed", how="annealing")
    make("e", normal(30, seed=5), test=8)
    make("f", normal(29, seed=6))
    for i in range(3):
        make(f"several/seed-{i}", normal(30, seed=7 + i))
    Run("several").describe({"data": "digits"})
    Run("several").write_json("log_px.json", {"mean": -1.0})

    def run(*words):
        code = cli.main(list(words))
        return code, *capsys.readouterr()

    return run


def test_runs_are_compared(pv):
    code, out, err = pv("compare", "b", "a/", "./c")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("| model | log p(x) | error | less b |")
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| b", "| a", "| c"]
    difference = (normal(30, seed=0) - normal(30, seed=1) + 1).mean()
    assert f"| {difference:+.2f} |" in lines[3]
    assert pv("compare", "--method", "importance", "b", "a", "c") == (0, out, "")
    assert pv("compare", "b", "--method", "importance", "a", "c") == (0, out, "")


def test_a_folder_of_several_seeds_is_one_model(pv):
    _, out, _ = pv("compare", "a", "several")
    means = torch.stack([normal(30, seed=7 + i).mean() for i in range(3)])
    assert f"| several | {means.mean():.2f} |" in out
    assert f"several 3 (standard deviation {means.std():.2f})" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "pyrovae compare needs RUNS"),
        ("a", "two models or more to compare, got 1"),
        ("a nothing", "nothing is no run or saved model"),
        ("a b a/", "a is named twice"),
        ("a d", "d has no log_px.json: make it with pyrovae log-px d --method importance"),
        ("d a --method annealed", "a has no log_px-annealed.json: .* log-px a --method annealed"),
        ("several d", "make it with pyrovae log-px d"),
        ("a e", "a and e were made with different test data"),
        ("a f", "a has 30 data and f 29"),
        ("a b --method guess", "there is no method called guess; there are Annealed"),
        ("a b --method bidirectional", "bidirectional says nothing of the test data"),
        ("a b --refined", "a has no log_px-refined.json: .* log-px a --method .* --refine 200"),
        ("a b --seed 3", "there is no flag --seed"),
    ],
)
def test_runs_that_cannot_be_compared(pv, words, message):
    code, out, err = pv("compare", *words.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(message, err.replace("'", "")), err


def test_the_files_of_a_run_go_with_it(tmp_path):
    run = make(tmp_path / "run", [-1.0, -2.0])
    assert Path(run.path / "log_px.npz").exists()
    Run.create(run.path, overwrite=True)
    assert not list(run.path.iterdir())
