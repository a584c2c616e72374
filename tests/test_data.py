"""Data sets and own files: what is read, how it is split, what the model sees."""

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae import data

ROOT = os.environ.get("PYROVAE_DATA")
needs_root = pytest.mark.skipif(not ROOT, reason="PYROVAE_DATA does not name the real data files")
SPLITS = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No data folder, an empty cache, no torchvision: nothing is fetched."""
    torch.manual_seed(0)
    monkeypatch.delenv("PYROVAE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "torchvision", None)


def levels(count=60, shape=(4, 5), seed=0):
    """Grey levels, 0 and 255 among them."""
    x = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    x.flat[:2] = (0, 255)
    return x


def reals(count=60, dim=3):
    return np.random.default_rng(1).normal(5.0, 2.0, (count, dim))


def splits_of(dataset):
    return [getattr(dataset, name) for name in SPLITS]


# What the model sees, for each way of reading: source, arguments, stored kind, kind, shape.
CASES = {
    "binary": (levels() > 99, {}, "binary", "binary", (1, 4, 5)),
    "binary, missing": (
        np.where(levels() > 200, np.nan, levels() > 99),
        {"missing": True},
        "binary",
        "binary",
        (1, 4, 5),
    ),
    "grey": (levels(), {}, "grey", "grey", (1, 4, 5)),
    "grey, plain": (levels(), {"dequantize": False}, "grey", "grey", (1, 4, 5)),
    "grey, dynamic": (levels(), {"binarize": "dynamic"}, "grey", "binary", (1, 4, 5)),
    "grey, fixed": (levels(), {"binarize": "fixed"}, "grey", "binary", (1, 4, 5)),
    "grey, missing, dynamic": (
        np.where(levels() > 200, np.nan, levels() / 255),
        {"binarize": "dynamic", "missing": True},
        "grey",
        "binary",
        (1, 4, 5),
    ),
    "grey, floats": (levels() / 255, {}, "grey", "grey", (1, 4, 5)),
    "levels": (levels(), {"kind": "levels"}, "levels", "levels", (1, 4, 5)),
    "levels, wide": (
        levels().astype(int) * 257,
        {"kind": "levels"},
        "levels",
        "levels",
        (1, 4, 5),
    ),
    "levels, missing": (
        np.where(levels() > 200, np.nan, levels()),
        {"kind": "levels", "missing": True},
        "levels",
        "levels",
        (1, 4, 5),
    ),
    "levels, colours last": (
        levels(shape=(7, 5, 3)),
        {"kind": "levels"},
        "levels",
        "levels",
        (3, 7, 5),
    ),
    "grey, colours last": (levels(shape=(7, 5, 3)), {}, "grey", "grey", (3, 7, 5)),
    "real": (reals(), {}, "real", "real", (3,)),
    "real, unit interval": (levels(shape=(5,)) / 255, {}, "real", "real", (5,)),
    "real, plain": (reals(), {"standardize": False}, "real", "real", (3,)),
    "real, missing": (
        np.where(reals() > 6, np.nan, reals()),
        {"missing": True},
        "real",
        "real",
        (3,),
    ),
    "real, integers": (levels().reshape(60, 20).astype(int) - 9, {}, "real", "real", (20,)),
    "counts": (levels().astype(np.int32).reshape(60, 20), {}, "counts", "counts", (20,)),
    "scalars": (reals()[:, 0], {}, "real", "real", (1,)),
}


@pytest.fixture(params=CASES, name="case")
def fixture_case(request):
    source, arguments, *expected = CASES[request.param]
    return data.load(source, **arguments), *expected


class TestEveryCase:
    def test_kind_and_shape(self, case):
        dataset, stored_kind, kind, shape = case
        assert dataset.preprocess.stored_kind == stored_kind
        assert (dataset.kind, dataset.shape) == (kind, shape)

    def test_index_keeps_the_batch_and_gives_float32(self, case):
        dataset, _, _, shape = case
        for split in splits_of(dataset):
            for index in (slice(0, 3), [0, 1, 2], (0, 1, 2), torch.arange(3), np.arange(3)):
                seen = split[index]
                assert seen.shape == (3, *shape)
                assert seen.dtype == torch.float32
            assert split[[]].shape == (0, *shape)

    def test_values_are_in_the_support(self, case):
        dataset, _, kind, _ = case
        for split in splits_of(dataset):
            seen = split[:]
            seen = seen[~seen.isnan()]
            if kind == "binary":
                assert set(seen.unique().tolist()) <= {0.0, 1.0}
            elif kind == "grey":
                assert 0 <= seen.min() <= seen.max() <= 1
            elif kind == "levels":
                level = seen * dataset.preprocess.max_value
                assert (level - level.round()).abs().max() < 0.01
                assert 0 <= seen.min() < seen.max() <= 1
            elif kind == "counts":
                assert (seen == seen.round()).all()

    def test_missing_entries_stay_missing(self, case):
        for split in splits_of(case[0]):
            torch.testing.assert_close(split[:].isnan(), split.x.isnan())

    def test_valid_and_test_are_drawn_once(self, case):
        dataset = case[0]
        for split in (dataset.valid, dataset.test):
            torch.testing.assert_close(split[:], split[:], equal_nan=True, rtol=0, atol=0)
            assert split.data.dtype in (torch.uint8, torch.float32)

    def test_train_is_drawn_afresh_where_there_is_noise(self, case):
        dataset = case[0]
        train, settings = dataset.train, dataset.preprocess
        afresh = settings.dequantize or settings.binarize == "dynamic"
        assert (train.data is train.x) == (settings.binarize != "fixed")
        same = torch.equal(train[:].nan_to_num(-1), train[:].nan_to_num(-1))
        assert same != afresh

    def test_splits_cover_the_data_once(self, case):
        dataset = case[0]
        assert [len(split) for split in splits_of(dataset)] == [48, 6, 6]

    def test_preprocess_survives_json(self, case):
        dataset = case[0]
        text = json.dumps(dataset.preprocess.to_config(), allow_nan=False)
        again = data.Preprocess.from_config(json.loads(text))
        assert again.to_config() == dataset.preprocess.to_config()
        before, after = dataset.preprocess.fix(dataset.train.x, 5), again.fix(dataset.train.x, 5)
        torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)

    def test_global_generator_is_left_alone(self, case):
        dataset = case[0]
        state = torch.get_rng_state()
        dataset.preprocess.fix(dataset.train.x, 5)
        data.load(dataset.train.x, missing=dataset.preprocess.missing)
        assert torch.equal(state, torch.get_rng_state())

    def test_log_det_has_one_finite_number_per_datum(self, case):
        for split in splits_of(case[0]):
            assert split.log_det.shape == (len(split),)
            assert split.log_det.isfinite().all()

    def test_traces_to_a_graph(self, case):
        dataset = case[0]
        x = dataset.train.x
        graph = make_fx(dataset.preprocess)(x[:2])
        torch.manual_seed(3)
        expected = dataset.preprocess(x[2:4])
        torch.manual_seed(3)
        torch.testing.assert_close(graph(x[2:4]), expected, equal_nan=True)

    def test_file_split_sees_what_test_sees(self, case):
        dataset = case[0]
        split = data.file_split(dataset.test.x, dataset.preprocess)
        assert torch.equal(split.data.nan_to_num(-1), dataset.test.data.nan_to_num(-1))
        torch.testing.assert_close(split.log_det, dataset.test.log_det)
        one = data.file_split(dataset.test.x[:1], dataset.preprocess)
        assert torch.equal(one.data.nan_to_num(-1), dataset.test.data[:1].nan_to_num(-1))


class TestLevels:
    def test_they_are_seen_as_fractions_and_need_no_correction(self):
        x = levels()
        dataset = data.load(x, kind="levels")
        assert dataset.preprocess.max_value == 255
        for split in splits_of(dataset):
            assert torch.equal(split[:], split.x / 255)
            assert (split.log_det == 0).all()
            assert split.description.endswith("256 levels, each with a probability")

    def test_a_named_set_knows_how_many_there_are(self):
        dataset = data.load("digits", kind="levels")
        assert (dataset.kind, dataset.preprocess.max_value) == ("levels", 16)
        assert not dataset.preprocess.noisy
        assert dataset.test[:].mul(16).unique().tolist() == list(range(17))

    def test_files_are_read_by_the_levels_of_the_run(self):
        preprocess = data.load(levels(), kind="levels").preprocess
        black = np.zeros((1, 4, 5), np.uint8)
        assert data.file_split(black, preprocess)[:].sum() == 0
        for wrong in (levels() > 99, levels() * 0.5, levels().astype(int) * 2):
            with pytest.raises(ValueError, match=r"expected (levels data|grey levels)"):
                data.file_split(wrong, preprocess)


class TestNoise:
    def test_binarization_has_the_right_frequency(self):
        x = torch.arange(256).repeat_interleave(2000).to(torch.uint8)[:, None]
        preprocess = data.Preprocess("grey", (1,), 255.0, binarize="dynamic")
        p = torch.arange(256) / 255
        for seen in (preprocess(x), preprocess.fix(x, 1)):
            error = seen.reshape(256, 2000).mean(1) - p
            # Five standard errors: a false alarm in 256 levels has probability below 2e-4.
            assert (error.abs() <= 5 * (p * (1 - p) / 2000).sqrt() + 1e-6).all()
            assert error.mean().abs() < 5 * (1 / 6 / x.numel()) ** 0.5

    def test_dequantization_keeps_the_level_and_fills_the_bin(self):
        x = torch.arange(256).repeat_interleave(2000).to(torch.uint8)[:, None]
        preprocess = data.Preprocess("grey", (1,), 255.0, dequantize=True)
        for seen in (preprocess(x), preprocess.fix(x, 1)):
            u = seen.double() * 256 - x
            assert seen.min() > 0
            assert seen.max() < 1
            assert u.min() >= 0
            assert u.max() <= 1
            # Standard deviation of the mean of n uniforms: (12 n)^-1/2.
            assert (u.mean() - 0.5).abs() < 5 * (12 * x.numel()) ** -0.5

    def test_training_noise_is_inside_and_repeats_nothing(self):
        u = data.preprocess._uniform(torch.zeros(250, 401)).flatten().double()
        assert 0 < u.min() < 1e-4 < 1 - 1e-4 < u.max() < 1
        spectrum = torch.fft.rfft((u - 0.5) * 12**0.5)
        echoes = torch.fft.irfft(spectrum.abs().square(), n=len(u))[1:] / len(u)
        # Six standard errors: a false alarm in 100,000 lags has probability 2e-4.
        assert echoes.abs().max() < 6 * len(u) ** -0.5

    @pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
    def test_dequantized_values_are_never_zero_or_one(self, monkeypatch, u):
        monkeypatch.setattr(data.preprocess, "_uniform", lambda x: torch.full_like(x, u))
        x = torch.tensor([[0, 255]], dtype=torch.uint8)
        seen = data.Preprocess("grey", (2,), 255.0, dequantize=True)(x)
        assert 0 < seen.min() < seen.max() < 1

    def test_seed_of_the_preprocessing_decides_for_a_file(self):
        one, two = (data.Preprocess("grey", (1, 4, 5), 255.0, "dynamic", seed=s) for s in (1, 2))
        assert not torch.equal(
            data.file_split(levels(), one).data, data.file_split(levels(), two).data
        )

    def test_valid_and_test_get_different_noise(self):
        x = torch.full((30, 50), 128, dtype=torch.uint8)
        dataset = data.load(x, binarize="fixed")
        noises = [split[:3] for split in splits_of(dataset)]
        assert not torch.equal(noises[0], noises[1])
        assert not torch.equal(noises[1], noises[2])

    def test_seed_decides(self):
        one, same, other = (data.load(levels(), binarize="fixed", seed=s) for s in (1, 1, 2))
        for name in SPLITS:
            a, b, c = (getattr(d, name) for d in (one, same, other))
            assert torch.equal(a.data, b.data)
            assert torch.equal(a.x, b.x)
            assert not torch.equal(a.x, c.x)

    def test_global_seed_does_not(self):
        torch.manual_seed(1)
        one = data.load("digits")
        torch.manual_seed(2)
        two = data.load("digits")
        assert torch.equal(one.test.data, two.test.data)
        assert torch.equal(one.train.x, two.train.x)

    def test_fix_of_a_prefix_is_a_prefix(self):
        x = torch.from_numpy(levels(5000))
        preprocess = data.Preprocess("grey", (4, 5), 255.0, binarize="dynamic")
        assert torch.equal(preprocess.fix(x, 1)[:4500], preprocess.fix(x[:4500], 1))

    def test_binary_data_accept_any_binarize(self):
        for binarize in ("dynamic", "fixed", "none"):
            dataset = data.load(CASES["binary"][0], binarize=binarize)
            assert dataset.preprocess.describe() == "static binary"


class TestLogDet:
    def test_standardized_density_integrates_to_one(self):
        x = torch.from_numpy(reals(100, 1))
        preprocess = data.load(x).preprocess
        grid = torch.linspace(-40, 50, 20001, dtype=torch.float64)[:, None]
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(preprocess(grid)).sum(1)
        density = (log_p + preprocess.log_det(grid)).exp().double()
        assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-4)

    @pytest.mark.parametrize("dequantize", [True, False])
    def test_grey_density_integrates_to_one(self, dequantize):
        preprocess = data.Preprocess("grey", (1,), 16.0, dequantize=dequantize)
        # A stored value x + u spreads over [0, 17) and a scaled one over [0, 16].
        stored = torch.linspace(0, 17 if dequantize else 16, 2001, dtype=torch.float64)
        seen = stored / stored[-1]
        log_p = torch.distributions.Beta(2.0, 3.0).log_prob(seen)
        log_det = preprocess.log_det(torch.zeros(1, 1)).double()
        assert torch.trapezoid((log_p + log_det).exp(), stored).item() == pytest.approx(1, abs=1e-4)

    def test_counts_observed_entries_only(self):
        nan = float("nan")
        x = torch.tensor([[1.0, nan, 3.0], [nan, nan, nan], [0.0, 8.0, 16.0]])
        grey = data.Preprocess("grey", (3,), 16.0, dequantize=True, missing=True)
        expected = -np.log(17) * torch.tensor([2.0, 0.0, 3.0], dtype=torch.float32)
        torch.testing.assert_close(grey.log_det(x), expected)
        scale = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
        real = data.Preprocess("real", (3,), missing=True, loc=scale, scale=scale)
        expected = -torch.tensor([np.log(10), 0.0, np.log(30)], dtype=torch.float32)
        torch.testing.assert_close(real.log_det(x), expected)

    @pytest.mark.parametrize("name", ["binary", "grey, dynamic", "counts", "real, plain"])
    def test_is_zero_where_units_do_not_change(self, name):
        source, arguments, *_ = CASES[name]
        assert (data.load(source, **arguments).test.log_det == 0).all()


class TestStandardize:
    def test_train_has_mean_zero_and_deviation_one(self):
        seen = data.load(1e6 + 1e-2 * reals(1000)).train[:].double()
        torch.testing.assert_close(seen.mean(0), torch.zeros(3).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            seen.std(0, correction=0), torch.ones(3).double(), atol=1e-5, rtol=0
        )

    def test_statistics_are_of_train_alone(self):
        dataset = data.load(reals())
        torch.testing.assert_close(dataset.preprocess.loc, dataset.train.x.mean(0))

    def test_missing_entries_do_not_count(self):
        x = torch.from_numpy(reals())
        x[::2, 0] = torch.nan
        x[:, 1] = torch.nan
        dataset = data.load(x, missing=True)
        observed = dataset.train.x[:, 0][~dataset.train.x[:, 0].isnan()]
        torch.testing.assert_close(dataset.preprocess.loc[0], observed.mean())
        torch.testing.assert_close(dataset.preprocess.scale[0], observed.std(correction=0))
        assert dataset.preprocess.scale[1] == 1

    def test_constant_feature_gets_scale_one(self):
        x = reals()
        x[:, 1] = 0.1
        dataset = data.load(x)
        assert dataset.preprocess.scale[1] == 1
        assert dataset.train[:][:, 1].abs().max() < 1e-6


class TestSplit:
    def test_splits_are_disjoint_and_cover_the_data(self):
        dataset = data.load(torch.arange(100) - 50, standardize=False)
        rows = torch.cat([split.x[:, 0] for split in splits_of(dataset)])
        assert sorted(rows.tolist()) == list(range(-50, 50))

    def test_three_data_are_enough(self):
        assert [len(s) for s in splits_of(data.load(torch.randn(3, 2)))] == [1, 1, 1]

    def test_digits(self):
        dataset = data.load("digits")
        assert [len(s) for s in splits_of(dataset)] == [1197, 300, 300]
        assert (dataset.shape, dataset.kind, dataset.preprocess.max_value) == (
            (1, 8, 8),
            "binary",
            16,
        )
        assert dataset.test.y.shape == (300,)
        from sklearn.datasets import load_digits

        x = torch.cat([s.x for s in splits_of(dataset)]).flatten(1)
        y = torch.cat([s.y for s in splits_of(dataset)])[:, None]
        ours, theirs = torch.cat([x, y], 1), torch.from_numpy(load_digits().images).flatten(1)
        theirs = torch.cat([theirs, torch.from_numpy(load_digits().target)[:, None]], 1)
        assert sorted(ours.tolist()) == sorted(theirs.tolist())

    def test_subset_keeps_the_values(self):
        test = data.load("digits").test
        part = test.subset([3, 1])
        assert torch.equal(part[:], test[[3, 1]])
        assert torch.equal(part.y, test.y[[3, 1]])
        assert part.description.startswith("subset of digits test split, 2 images, binarized once")
        train = data.load("digits").train.subset(slice(5))
        assert train.data is train.x
        assert len(train) == 5

    def test_to_a_device(self):
        split = data.load(reals()).train.to("meta")
        assert split[:2].device.type == "meta"
        assert {split.x.device.type, split.log_det.device.type} == {"meta"}

    def test_description(self):
        assert data.load("digits").test.description == (
            "digits test split, 300 images, binarized once with seed 777"
        )
        assert data.load("digits").train.description == (
            "digits train split, 1,197 images, binarized dynamically"
        )
        assert data.load(reals()).test.description == "array test split, 6 rows, standardized"
        missing = data.load(CASES["binary, missing"][0], missing=True, seed=1)
        assert missing.preprocess.describe() == "static binary, NaN marks missing entries"

    def test_describe_in_full(self):
        assert data.load("digits").preprocess.describe() == (
            "grey pixels binarized dynamically in training, "
            "once with seed 777 in validation and test"
        )
        fixed = data.load("digits", binarize="fixed").preprocess
        assert fixed.describe() == "grey pixels binarized once with seed 777"
        assert "dequantized afresh" in data.load("digits", binarize="none").preprocess.describe()


class TestAsSplit:
    def test_a_split_is_returned(self):
        split = data.load("digits").train
        assert data.as_split(split) is split

    def test_tensors_and_arrays(self):
        assert data.as_split(torch.zeros(4, 2, dtype=torch.float64))[:2].dtype == torch.float64
        assert data.as_split(np.ones((4, 2), np.float16))[:2].dtype == torch.float16
        for dtype in (torch.uint8, torch.bool, torch.int64):
            split = data.as_split(torch.ones(4, 2).to(dtype))
            assert split[[0]].dtype == torch.float32
        assert (split.log_det == 0).all()

    def test_a_tuple_is_indexed_as_one(self):
        x, y = torch.arange(8).reshape(4, 2).to(torch.uint8), torch.arange(4)
        split = data.as_split((x, y))
        seen = split[[2, 0]]
        assert torch.equal(seen[0], x[[2, 0]].float())
        assert torch.equal(seen[1], y[[2, 0]])
        assert seen[1].dtype == torch.int64
        assert len(split) == 4
        assert len(split.subset([1]).to("cpu")[:][0]) == 1

    def test_torch_data_sets(self):
        x, y = torch.randn(4, 2), torch.arange(4)
        for dataset in (
            torch.utils.data.TensorDataset(x, y),
            Listed(zip(x.numpy(), y, strict=True)),
        ):
            split = data.as_split(dataset)
            assert torch.equal(split[:], x)
            assert torch.equal(split.y, y)
        assert data.as_split(torch.utils.data.TensorDataset(x)).y is None

    def test_messages(self):
        with pytest.raises(TypeError, match=r"x: expected a Split.*got str; read files"):
            data.as_split("mnist")
        with pytest.raises(ValueError, match=r"same first dimension, got \[3, 4\]"):
            data.as_split((torch.ones(3), torch.ones(4)))


class Listed(torch.utils.data.Dataset):
    """A torch data set of the items in a list."""

    def __init__(self, items):
        self.items = list(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def save(path, x):
    """Write an array, or a dictionary of arrays, as the ending says."""
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".npz":
        np.savez(path, **x) if isinstance(x, dict) else np.savez(path, x)
    elif path.suffix == ".pt":
        as_tensors = {k: torch.from_numpy(v) for k, v in x.items()} if isinstance(x, dict) else None
        torch.save(as_tensors or torch.from_numpy(x), path)
    else:
        path.write_text(x)
    return path


def everything(dataset, of="x"):
    return torch.cat([getattr(split, of) for split in splits_of(dataset)])


class TestOwnFiles:
    @pytest.mark.parametrize("ending", [".npy", ".npz", ".pt"])
    def test_one_array(self, tmp_path, ending):
        dataset = data.load(save(tmp_path / f"a{ending}", levels()))
        assert dataset.name == f"a{ending}"
        ours, theirs = everything(dataset).flatten(1), levels().reshape(60, 20)
        assert sorted(ours.tolist()) == sorted(theirs.tolist())

    @pytest.mark.parametrize("ending", [".npz", ".pt"])
    def test_labels_stay_with_their_data(self, tmp_path, ending):
        y = np.arange(60)
        path = save(tmp_path / f"a{ending}", {"x": y[:, None] * 10, "y": y})
        dataset = data.load(str(path))
        assert torch.equal(everything(dataset)[:, 0], everything(dataset, "y") * 10)

    @pytest.mark.parametrize("ending", [".npz", ".pt"])
    def test_splits_in_the_file_are_used(self, tmp_path, ending):
        arrays = {"train": levels(9), "valid": levels(2), "test": levels(4)}
        arrays |= {f"y_{name}": np.arange(len(x)) for name, x in arrays.items()}
        path = save(tmp_path / f"a{ending}", arrays)
        dataset = data.load(path)
        for split in splits_of(dataset):
            assert torch.equal(split.x[:, 0], torch.from_numpy(arrays[split.name]))
            assert torch.equal(split.y, torch.arange(len(split)))
        split = data.file_split(path, dataset.preprocess)
        assert torch.equal(split.x, dataset.test.x)
        assert split.name == f"a{ending} test split"

    def test_csv(self, tmp_path):
        text = "\ufefflabel,a,b\n" + "".join(f"{i},{i}.5,\n" for i in range(12)) + "\n"
        dataset = data.load(save(tmp_path / "a.csv", text), missing=True)
        assert (dataset.shape, dataset.kind) == ((2,), "real")
        assert torch.equal(everything(dataset)[:, 0], everything(dataset, "y") + 0.5)
        assert everything(dataset)[:, 1].isnan().all()

    def test_csv_without_header(self, tmp_path):
        path = save(tmp_path / "a.csv", "".join(f"{i}, {i + 2}\n" for i in range(12)))
        dataset = data.load(path)
        assert (dataset.kind, len(everything(dataset)), dataset.train.y) == ("counts", 12, None)
        grey = data.load(path, kind="grey")
        assert (grey.preprocess.max_value, grey.preprocess.dequantize) == (255, True)

    def test_folder_with_classes(self, tmp_path):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "a" / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.full((4, 5), 100 * label + i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "a" / name / f"{i}.png")
        dataset = data.load(tmp_path / "a")
        assert (dataset.name, dataset.shape, dataset.kind) == ("a", (1, 4, 5), "grey")
        assert torch.equal(everything(dataset)[:, 0, 0, 0] // 100, everything(dataset, "y"))

    @pytest.mark.parametrize(
        ("mode", "shape", "kind"),
        [
            ("1", (1, 4, 5), "binary"),
            ("L", (1, 4, 5), "grey"),
            ("LA", (1, 4, 5), "grey"),
            ("P", (3, 4, 5), "grey"),
            ("RGB", (3, 4, 5), "grey"),
            ("RGBA", (3, 4, 5), "grey"),
        ],
    )
    def test_image_modes(self, tmp_path, mode, shape, kind):
        for i, pixels in enumerate(levels(4, (4, 5, 3))):
            Image.fromarray(pixels).convert(mode).save(tmp_path / f"{i}.png")
        dataset = data.load(tmp_path)
        assert (dataset.shape, dataset.kind) == (shape, kind)
        split = data.file_split(tmp_path / "2.png", dataset.preprocess)
        assert len(split) == 1

    def test_rgb_pixels_are_channels_first(self, tmp_path):
        pixels = levels(3, (4, 5, 3))
        for i in range(3):
            Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
        split = data.file_split(tmp_path, data.load(tmp_path).preprocess)
        assert torch.equal(split.x, torch.from_numpy(pixels).movedim(-1, 1))

    def test_own_array_is_copied(self):
        x = levels()
        x.flags.writeable = False
        dataset = data.load(x[:, ::-1])
        assert dataset.shape == (1, 4, 5)

    def test_byte_order_and_width_do_not_matter(self):
        for dtype in (">f8", "<f8", np.longdouble):
            split = data.file_split(reals().astype(dtype), data.load(reals()).preprocess)
            assert torch.equal(split.x, torch.from_numpy(reals()))

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        save(tmp_path / "a.npy", levels())
        assert data.load("~/a.npy").kind == "grey"

    def test_channels_last_become_first(self):
        x = levels(shape=(7, 5, 3))
        split = data.file_split(x, data.load(x).preprocess)
        assert torch.equal(split.x, torch.from_numpy(x).movedim(-1, 1))

    def test_channels_first_stay(self):
        assert data.load(levels(shape=(3, 4, 5))).shape == (3, 4, 5)
        assert data.load(torch.randn(9, 7, 6, 3)).shape == (7, 6, 3)


def write_idx(path, array):
    """The idx format: two zeros, 8 for bytes, the number of dimensions, big-endian sizes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_mnist(root, class_name="MNIST", ending=".gz"):
    raw = root / class_name / "raw"
    write_idx(raw / f"train-images-idx3-ubyte{ending}", levels(12, (28, 28)))
    write_idx(raw / f"train-labels-idx1-ubyte{ending}", np.arange(12))
    write_idx(raw / f"t10k-images-idx3-ubyte{ending}", levels(5, (28, 28), seed=1))
    write_idx(raw / f"t10k-labels-idx1-ubyte{ending}", np.arange(5))
    return raw


def write_npz(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


class TestNamed:
    @pytest.mark.parametrize("ending", [".gz", ""])
    @pytest.mark.parametrize(
        ("name", "class_name"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
    )
    def test_idx(self, tmp_path, monkeypatch, name, class_name, ending):
        write_mnist(tmp_path, class_name, ending)
        monkeypatch.setenv("PYROVAE_DATA", str(tmp_path))
        dataset = data.load(name)
        assert [len(s) for s in splits_of(dataset)] == [10, 2, 5]
        assert torch.equal(dataset.train.x[:, 0], torch.from_numpy(levels(12, (28, 28))[:10]))
        assert dataset.valid.y.tolist() == [10, 11]
        assert dataset.kind == "binary"

    def test_cache_is_read_where_root_has_no_files(self, tmp_path):
        write_mnist(tmp_path / "cache" / "pyrovae")
        (tmp_path / "root").mkdir()
        assert len(data.load("mnist", tmp_path / "root").test) == 5
        assert len(data.load("mnist").test) == 5
        labels = write_mnist(tmp_path / "root") / "t10k-labels-idx1-ubyte.gz"
        write_idx(labels, np.arange(5) + 3)
        assert data.load("mnist", tmp_path / "root").test.y.tolist() == [3, 4, 5, 6, 7]

    def test_binarized_mnist(self, tmp_path):
        bits = {name: levels(n, (784,)) > 99 for name, n in zip(SPLITS, (9, 3, 4), strict=True)}
        packed = {name: np.packbits(x, axis=-1) for name, x in bits.items()}
        write_npz(tmp_path / "BinarizedMNIST" / "binarized_mnist.npz", **packed)
        dataset = data.load("binarized-mnist", tmp_path)
        for split in splits_of(dataset):
            assert torch.equal(split[:].flatten(1) == 1, torch.from_numpy(bits[split.name]))
        # A model of binarized grey data is scored on binary data as they are.
        grey = data.Preprocess("grey", (1, 28, 28), 255.0, binarize="dynamic")
        split = data.file_split("binarized-mnist", grey, tmp_path)
        assert torch.equal(split[:], dataset.test[:])
        with pytest.raises(
            ValueError, match="expected grey levels from 0 to 255, got only 0 and 1"
        ):
            data.file_split(
                "binarized-mnist", data.Preprocess("grey", (1, 28, 28), 255.0), tmp_path
            )

    def test_omniglot(self, tmp_path):
        drawer = np.tile(np.arange(1, 21), 1623)
        images = np.arange(32460, dtype=np.uint16).view(np.uint8).reshape(-1, 1, 2)
        arrays = {"images": images, "drawer": drawer, "alphabet": drawer + 5}
        write_npz(tmp_path / "OMNIGLOT" / "omniglot_28x28.npz", **arrays)
        dataset = data.load("omniglot", tmp_path)
        assert [len(s) for s in splits_of(dataset)] == [23000, 1345, 8115]
        assert dataset.test.y.unique().tolist() == [21, 22, 23, 24, 25]
        ids = everything(dataset).flatten(1).long() @ torch.tensor([1, 256])
        assert torch.equal(ids.sort().values, torch.arange(32460))

    def test_frey_faces(self, tmp_path):
        write_npz(tmp_path / "FreyFace" / "frey_faces.npz", images=levels(1965, (28, 20)))
        dataset = data.load("frey-faces", tmp_path)
        assert [len(s) for s in splits_of(dataset)] == [1565, 200, 200]
        assert (dataset.shape, dataset.kind) == ((1, 28, 20), "grey")
        assert dataset.preprocess.dequantize

    def test_file_split_of_a_named_set_is_its_test_split(self):
        dataset = data.load("digits", seed=5)
        split = data.file_split("digits", dataset.preprocess)
        assert torch.equal(split.data, dataset.test.data)
        assert torch.equal(split.y, dataset.test.y)


@needs_root
class TestRealFiles:
    @pytest.fixture(autouse=True)
    def nothing_is_written(self, monkeypatch):
        monkeypatch.setenv("PYROVAE_DATA", ROOT)
        before = self.listing()
        yield
        assert self.listing() == before

    @staticmethod
    def listing():
        found = sorted(Path(ROOT).rglob("*"))
        return [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in found]

    def test_mnist(self):
        dataset = data.load("mnist")
        assert [len(s) for s in splits_of(dataset)] == [50_000, 10_000, 10_000]
        counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
        assert dataset.test.y.bincount().tolist() == counts
        y = torch.cat([dataset.train.y, dataset.valid.y])
        assert y.bincount().tolist()[:3] == [5923, 6742, 5958]
        assert dataset.test.x.double().mean().item() / 255 == pytest.approx(0.1325, abs=5e-5)
        # The sum of 7.84 million Bernoulli draws has a standard error of the mean below 2e-4.
        assert dataset.test[:].mean().item() == pytest.approx(0.1325, abs=1e-3)

    def test_fashion_mnist(self):
        dataset = data.load("fashion-mnist", ROOT)
        assert dataset.test.y.bincount().tolist() == [1000] * 10
        assert dataset.test.x.double().mean().item() / 255 == pytest.approx(0.2868, abs=5e-5)

    def test_binarized_mnist(self):
        dataset = data.load("binarized-mnist")
        means = [split.x.double().mean().item() for split in splits_of(dataset)]
        assert means == pytest.approx([0.13056227, 0.13112704, 0.13251224], abs=1e-8)

    def test_omniglot(self):
        dataset = data.load("omniglot", binarize="none")
        x = everything(dataset).double().mean().item() / 255
        assert (len(everything(dataset)), x) == (32460, pytest.approx(0.0806, abs=5e-5))
        assert len(everything(dataset, "y").unique()) == 50

    def test_frey_faces(self):
        x = everything(data.load("frey-faces"))
        assert (x.shape, x.min(), x.max()) == ((1965, 1, 28, 20), 8, 238)


NAN = np.where(reals() > 6, np.nan, reals())
INFINITE = np.where(reals() > 6, np.inf, reals())
MESSAGES = {
    "unknown name": ("minst", {}, "expected one of digits, mnist.*did you mean mnist"),
    "far name": ("qqqq", {}, "got 'qqqq'; check the name or the path"),
    "missing file": ("nowhere/a.npy", {}, "nowhere/a.npy: no such file or folder"),
    "type": (3, {}, "source: expected a name.*got int"),
    "NaN": (
        NAN,
        {},
        r"expected no NaN, got \d+ in \d+ of 60 data; pass missing=True \(--missing\)",
    ),
    "only NaN": (np.full((9, 2), np.nan), {"missing": True}, "got nothing but NaN"),
    "infinite": (INFINITE, {}, r"expected finite values, got \d+ infinite"),
    "infinite, missing": (INFINITE, {"missing": True}, "expected finite values"),
    "empty": (np.ones((0, 3)), {}, r"expected data of shape \(N, ...\), got shape \(0, 3\)"),
    "no entries": (torch.ones(5, 0), {}, r"got shape \(5, 0\)"),
    "one number": (torch.tensor(1.0), {}, r"got shape \(\)"),
    "one datum": (np.ones((1, 3)), {}, "expected at least three data.*got 1; give more"),
    "complex": (torch.ones(5, dtype=torch.complex64), {}, "expected real numbers, got dtype"),
    "complex array": (np.ones(5, complex), {}, "expected real numbers, got dtype"),
    "words": (np.array(["a", "b", "c"]), {}, "expected numbers, got dtype <U1"),
    "objects": (np.array([None, 1, 2]), {}, "expected numbers, got dtype object"),
    "kind": (
        levels(),
        {"kind": "gray"},
        "kind: expected one of binary, grey, levels, real, counts, got 'gray'",
    ),
    "binarize": (
        levels(),
        {"binarize": "static"},
        "binarize: expected one of dynamic, fixed, none",
    ),
    "binarize real": (reals(), {"binarize": "fixed"}, "expected grey data, got real data"),
    "binarize counts": (
        np.arange(9),
        {"binarize": "dynamic"},
        "binarize='dynamic': expected grey data, got counts data",
    ),
    "not binary": (levels(), {"kind": "binary"}, "expected binary data, 0 and 1, got whole values"),
    "half": (np.full((5, 2), 0.5), {"kind": "binary"}, "got fractional values from 0.5 to 0.5"),
    "negative counts": (np.arange(9) - 4, {"kind": "counts"}, "expected counts data.*from -4 to 4"),
    "fractional counts": (reals(), {"kind": "counts"}, "expected counts data.*fractional"),
    "negative grey": (np.arange(9) - 4, {"kind": "grey"}, "expected grey data.*from -4 to 4"),
    "fractional levels": (reals(), {"kind": "grey"}, "expected grey data, whole levels"),
    "large levels": (np.arange(9) * 10**6, {"kind": "grey"}, "levels from 0 to 65535.*8e\\+06"),
    "dequantize binarized": (
        "digits",
        {"dequantize": True},
        "dequantize=True.*got binarized data; pass binarize='none'",
    ),
    "dequantize real": (reals(), {"dequantize": True}, "dequantize=True: expected grey levels"),
    "dequantize floats": (
        levels() / 255,
        {"dequantize": True},
        "dequantize=True: expected grey levels",
    ),
    "levels of floats": (
        levels() / 255,
        {"kind": "levels"},
        "expected levels data, whole levels from 0 to 255, got fractional values from 0 to 1",
    ),
    "levels of zeros and ones": (
        levels() > 99,
        {"kind": "levels"},
        "expected levels data, whole levels from 0 to 255, got whole values from 0 to 1",
    ),
    "levels of negatives": (np.arange(9) - 4, {"kind": "levels"}, "expected levels data"),
    "levels too high": (np.arange(9) * 10**6, {"kind": "levels"}, "whole levels from 0 to 65535"),
    "levels binarized": (
        levels(),
        {"kind": "levels", "binarize": "dynamic"},
        "expected grey data, got levels data; leave binarize out",
    ),
    "levels dequantized": (
        levels(),
        {"kind": "levels", "dequantize": True},
        "got 256 levels, each with a probability; .*for levels of kind 'grey'",
    ),
    "levels standardized": (
        levels(),
        {"kind": "levels", "standardize": True},
        "expected real data, got levels data",
    ),
    "standardize grey": (levels(), {"standardize": True}, "standardize=True: expected real data"),
    "no files": (
        "omniglot",
        {},
        "OMNIGLOT/omniglot_28x28.npz: no such file.*--data-root.*PYROVAE_DATA",
    ),
    "no root": ("mnist", {"root": "nowhere"}, "root: expected a folder with data, got nowhere"),
    "no torchvision": ("mnist", {}, "torchvision cannot be imported.*pip install --upgrade"),
    "no items": (Listed([]), {}, "expected items, got none"),
    "dictionaries": (Listed([{"x": 1}] * 3), {}, "expected items x or .x, y., got dict"),
    "shapes": (Listed([np.ones(2), np.ones(3)]), {}, r"one shape, got \(2,\) at 0 and \(3,\) at 1"),
}


class TestMessages:
    @pytest.mark.parametrize("name", MESSAGES)
    def test_one_line_that_says_what_to_do(self, name):
        source, arguments, match = MESSAGES[name]
        with pytest.raises((ValueError, FileNotFoundError, TypeError), match=match) as caught:
            data.load(source, **arguments)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("ending", [".npy", ".npz", ".pt", ".png"])
    def test_damaged_files(self, tmp_path, ending):
        path = tmp_path / f"a{ending}"
        if ending == ".png":
            Image.fromarray(levels(1, (40, 50))[0]).save(path)
        else:
            save(path, levels(200))
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"nothing of the kind\n" * 9):
            path.write_bytes(content)
            with pytest.raises(
                ValueError, match=rf"a\{ending}: expected a whole, readable"
            ) as caught:
                data.load(path)
            assert "\n" not in str(caught.value)

    def test_damaged_bytes_inside(self, tmp_path):
        path = save(tmp_path / "a.npz", levels(200))
        content = bytearray(path.read_bytes())
        content[2000] ^= 255
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected a whole, readable file, got BadZipFile"):
            data.load(path)

    def test_damaged_idx(self, tmp_path):
        raw = write_mnist(tmp_path)
        path = raw / "t10k-images-idx3-ubyte.gz"
        whole = path.read_bytes()
        unzipped = gzip.decompress(whole)
        for content in (whole[:-40], unzipped, gzip.compress(unzipped[:-9]), gzip.compress(b"")):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz: expected a whole"):
                data.load("mnist", tmp_path)

    def test_labels_of_another_length(self, tmp_path):
        write_idx(write_mnist(tmp_path) / "t10k-labels-idx1-ubyte.gz", np.arange(4))
        with pytest.raises(ValueError, match="one label per image, got 5 images and 4 labels"):
            data.load("mnist", tmp_path)

    @pytest.mark.parametrize(
        ("arrays", "match"),
        [
            ({"a": levels(), "b": levels()}, "expected arrays named x .and y., or .*, got a, b"),
            (
                {"x": levels(), "y": np.arange(3)},
                r"labels of shape \(60,\), one per datum, got \(3,\)",
            ),
            ({"x": levels(), "y": np.arange(60) / 7}, "expected whole numbers"),
            (
                {"train": levels(), "valid": levels(), "test": levels(9, (3, 3))},
                "expected splits of one shape",
            ),
            (
                {"train": levels(9), "valid": levels(9), "test": levels(9), "y_test": np.arange(9)},
                "expected y_train, y_valid and y_test or none",
            ),
        ],
    )
    def test_names_in_a_file(self, tmp_path, arrays, match):
        for ending in (".npz", ".pt"):
            with pytest.raises(ValueError, match=match):
                data.load(save(tmp_path / f"a{ending}", arrays))

    def test_pickles_are_not_opened(self, tmp_path):
        np.save(tmp_path / "a.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
        np.savez(tmp_path / "a.npz", np.array([{}, 1], dtype=object), allow_pickle=True)
        torch.save(Path("a"), tmp_path / "a.pt")
        for name in ("a.npy", "a.npz", "a.pt"):
            with pytest.raises(ValueError, match=f"{name}: expected a whole, readable file"):
                data.load(tmp_path / name)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("", "expected rows of numbers, got none"),
            ("a,b\n", "expected rows of numbers, got none"),
            ("1,2\n3\n", "expected 2 cells in each row, got 1 in data row 2"),
            ("a,b\n1,2\n3,red\n", "expected numbers, got 'red' in data row 2"),
            ("1,2\n3,\n4,5\n", "expected no NaN, got 1 in 1 of 3 data"),
            ("y\n1\n2\n3\n", r"got shape \(3, 0\)"),
        ],
    )
    def test_tables(self, tmp_path, text, match):
        with pytest.raises(ValueError, match=match):
            data.load(save(tmp_path / "a.csv", text))

    def test_unknown_ending(self, tmp_path):
        with pytest.raises(ValueError, match=r"ending in .npy, .npz, .pt, .csv.*got '.txt'"):
            data.load(save(tmp_path / "a.txt", "1"))

    def test_folders(self, tmp_path):
        with pytest.raises(ValueError, match=r"either in the folder or in class folders.*got none"):
            data.load(tmp_path)
        for i in (1, 2):
            Image.new("L", (4, 5 * i)).save(tmp_path / f"{i}.png")
        sizes = r"got 1.png \(1 x 5 x 4 uint8\) and 2.png \(1 x 10 x 4 uint8\)"
        with pytest.raises(ValueError, match=f"images of one size and mode, {sizes}"):
            data.load(tmp_path)
        Image.new("RGB", (4, 5)).save(tmp_path / "2.png")
        with pytest.raises(ValueError, match=r"2.png \(3 x 5 x 4 uint8\)"):
            data.load(tmp_path)
        (tmp_path / "cat").mkdir()
        Image.new("L", (4, 5)).save(tmp_path / "cat" / "1.png")
        with pytest.raises(ValueError, match="got both; move"):
            data.load(tmp_path)

    def test_file_split(self):
        grey = data.load(levels()).preprocess
        with pytest.raises(
            ValueError, match=r"expected data of shape \(N, 1, 4, 5\), got \(9, 3\)"
        ):
            data.file_split(np.ones((9, 3)), grey)
        with pytest.raises(ValueError, match="whole levels from 0 to 255, got fractional"):
            data.file_split(levels() / 255, grey)
        with pytest.raises(ValueError, match=r"values in \[0, 1\], got whole values from 0 to 255"):
            data.file_split(levels(), data.load(levels() / 255).preprocess)
        with pytest.raises(ValueError, match="expected no NaN"):
            data.file_split(np.full((1, 3), np.nan), data.load(reals()).preprocess)


class TestDownload:
    def fake(self, monkeypatch, tmp_path, text):
        """A torchvision of our own, first on the path."""
        package = tmp_path / "site" / "torchvision"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, "torchvision")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def test_builds_that_do_not_match(self, monkeypatch, tmp_path):
        reason = "operator torchvision::nms does not exist"
        self.fake(monkeypatch, tmp_path, f"raise RuntimeError({reason!r})")
        match = f"{reason}.*different builds.*pip install --upgrade torch torchvision.*MNIST/raw"
        with pytest.raises(ValueError, match=match):
            data.load("mnist")

    def test_no_network(self, monkeypatch, tmp_path):
        text = (
            "class datasets:\n"
            "    def FashionMNIST(root, download):\n"
            "        raise RuntimeError('Error downloading\\nmore')"
        )
        self.fake(monkeypatch, tmp_path, text)
        match = r"fashion-mnist: files not found and not downloaded \(Error downloading\).*ubyte.gz"
        with pytest.raises(FileNotFoundError, match=match) as caught:
            data.load("fashion-mnist")
        assert "in FashionMNIST/raw/" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_files_go_to_the_cache(self, monkeypatch, tmp_path):
        here = write_mnist(tmp_path / "source").parent
        text = (
            "import shutil\n"
            "class datasets:\n"
            "    def MNIST(root, download):\n"
            f"        shutil.copytree({str(here)!r}, root + '/MNIST')"
        )
        self.fake(monkeypatch, tmp_path, text)
        (tmp_path / "root").mkdir()
        assert len(data.load("mnist", tmp_path / "root").test) == 5
        assert (tmp_path / "cache" / "pyrovae" / "MNIST" / "raw").is_dir()
        assert not any((tmp_path / "root").iterdir())
