"""Labels hidden, and the order in which training takes what has them and what has not."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pyrovae import data
from pyrovae.data.labels import UNKNOWN
from pyrovae.data.order import Order
from pyrovae.data.preprocess import Preprocess
from pyrovae.data.split import Split, dynamic_split


def whole(count: int = 40, classes: int = 4) -> Split:
    """Rows that say which they are, class by class in turn."""
    rows = torch.arange(count, dtype=torch.float32)
    return replace(data.as_split(rows[:, None]), y=torch.arange(count) % classes)


def partly(count: int, known: int) -> Any:
    """The first so many with labels."""
    y = torch.where(torch.arange(count) < known, torch.arange(count) % 2, UNKNOWN)
    return data.known_or_not(data.as_split((torch.arange(count)[:, None].float(), y)))


# Hidden labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_labels", [4, 8, 11, 20, 39])
def test_as_many_labels_stay_of_each_class(num_labels: int) -> None:
    split, before = data.hide_labels(whole(), num_labels), whole()
    assert isinstance(split, data.PartlyLabelled)
    x, y = split[:]
    known = y != UNKNOWN
    assert torch.equal(split.known, known)
    assert known.sum() == num_labels
    assert torch.equal(y[known], before.y[known])
    assert torch.equal(split.y, y)
    assert torch.equal(x, before[:])
    counts = y[known].bincount(minlength=4)
    more = num_labels % 4
    assert counts.tolist() == [num_labels // 4 + (label < more) for label in range(4)]
    assert f"{num_labels} with labels, by seed 0" in split.description


def test_all_labels_hide_none() -> None:
    split = data.hide_labels(whole(), 40)
    assert type(split) is Split
    assert torch.equal(split[:][1], whole().y)


def test_which_labels_stay_is_chosen_by_the_seed_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (data.hide_labels(whole(), 8, seed).y for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    kept = torch.stack([data.hide_labels(whole(), 8, seed).known for seed in range(300)])
    share = kept.double().mean(0)  # each datum as often as any other
    assert ((share - 0.2).abs() < 4.5 * math.sqrt(0.2 * 0.8 / 300)).all()


@pytest.mark.parametrize(
    ("split", "num_labels", "reason"),
    [
        (whole(), 3, "num_labels must be from 4, one for each class, to 40, the data of data giv"),
        (whole(), 41, "num_labels must be from 4, one for each class, to 40"),
        (replace(whole(), y=(torch.arange(40) > 37).long()), 6, "class 1, .* has 2: ask for fewer"),
        (replace(whole(), y=torch.arange(40) % 2 * 2), 6, "class 1, .* has 0: number the classes"),
        (replace(whole(), y=None), 4, "has no labels"),
        (data.hide_labels(whole(), 8), 4, "has several tensors already"),
    ],
)
def test_labels_that_are_not_there_cannot_stay(split: Split, num_labels: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        data.hide_labels(split, num_labels)


# Known or not -------------------------------------------------------------------------------------


def test_minus_one_stands_for_a_label_that_is_not_given() -> None:
    split = partly(10, 4)
    assert isinstance(split, data.PartlyLabelled)
    assert split.known.tolist() == [True] * 4 + [False] * 6
    assert "4 with labels" in split.description
    assert data.known_or_not(split) is split


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 2),
        (torch.zeros(4, 2), torch.arange(4)),
        (torch.zeros(4, 2), -torch.ones(4)),
        (torch.zeros(4, 2), -torch.ones(4, 2).long()),
        (torch.zeros(4, 2), torch.arange(4) - 1, torch.zeros(4)),
    ],
)
def test_other_data_stay_as_they_are(x: Any) -> None:
    split = data.as_split(x)
    assert data.known_or_not(split) is split
    assert split.parts == (split,)


def test_arrays_and_odd_integers_may_have_labels_too() -> None:
    y = np.array([0, 1, -1, -1], dtype=np.int16)
    split = data.known_or_not(data.as_split((np.zeros((4, 2)), y)))
    assert split.known.tolist() == [True, True, False, False]


def test_a_part_without_labels_is_refused_and_one_with_all_is_plain() -> None:
    split = partly(10, 4)
    with pytest.raises(ValueError, match="no datum has a label: give some, or train a VAE"):
        data.known_or_not(split.subset(range(4, 10)))
    plain = data.known_or_not(split.subset(range(4)))
    assert type(plain) is Split
    assert plain[:][1].tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"labels must be 0, 1, \.\.\., or -1 .*; got -2"):
        data.known_or_not(data.as_split((torch.zeros(3, 2), torch.tensor([0, -2, -1]))))


# Parts --------------------------------------------------------------------------------------------


def test_the_parts_are_data_with_labels_and_data_without() -> None:
    given, others = partly(10, 4).parts
    x, y = given[:]
    assert (type(given), type(others)) == (Split, Split)
    assert x[:, 0].tolist() == [0, 1, 2, 3]
    assert y.tolist() == [0, 1, 0, 1]
    assert others[:][:, 0].tolist() == [4, 5, 6, 7, 8, 9]
    assert others.y is None
    assert (len(given), len(others)) == (4, 6)


@pytest.mark.parametrize("index", [[0, 5, 2], torch.tensor([7, 3]), slice(2, 9), np.array([1, 8])])
def test_a_subset_keeps_its_labels(index: Any) -> None:
    split = data.hide_labels(whole(), 12)
    part = split.subset(index)
    assert isinstance(part, data.PartlyLabelled)
    assert torch.equal(part.known, split.known[index])
    for one, other in zip(part[:], split[index], strict=True):
        assert torch.equal(one, other)
    assert len(part.parts[0]) == part.known.sum()


def test_a_split_moves_with_its_labels() -> None:
    split = data.hide_labels(whole(), 12)
    moved = split.to("cpu")
    assert isinstance(moved, data.PartlyLabelled)
    assert torch.equal(moved.known, split.known)
    meta = split.to("meta")
    assert {t.device.type for t in (*meta.data, meta.y, meta.log_det)} == {"meta"}


def test_what_is_drawn_afresh_is_drawn_for_both_parts() -> None:
    grey = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    preprocess = Preprocess("grey", (1, 4, 4), 255.0, binarize="dynamic")
    y = torch.arange(40) % 4
    split: Any = data.hide_labels(dynamic_split(grey, y, "train", preprocess, "grey"), 8)
    given, others = split.parts
    x, labels = given[:]
    assert set(x.unique().tolist()) == set(others[:].unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(given[:][0], given[:][0])
    assert not torch.equal(others[:], others[:])
    assert labels.tolist() == y[split.known].tolist()
    mean = torch.stack([others[:] for _ in range(300)]).mean(0)
    expected = grey[~split.known] / 255
    assert ((mean - expected).abs() < 5 * (0.25 / 300) ** 0.5).all()
    assert split.to("cpu")[:3][0].shape == (3, 1, 4, 4)
    assert torch.equal(others.log_det, split.log_det[~split.known])


# Order --------------------------------------------------------------------------------------------


def test_an_epoch_of_data_that_are_all_alike_takes_each_once_at_most() -> None:
    order = data.as_split(torch.zeros(11, 2)).order(4)
    assert (order.batch_size, order.steps, order.given, order.share) == (4, 2, 0, 0.0)
    epoch = order.epoch()
    assert epoch.shape == (2, 4)
    assert len(epoch.unique()) == 8
    assert not torch.equal(epoch, order.epoch())
    assert data.as_split(torch.zeros(3, 2)).order(128).epoch().shape == (1, 3)


SIZES = [(40, 2), (40, 4), (40, 20), (40, 30), (40, 38), (40, 39), (7, 1), (7, 6), (2, 1), (3, 2)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 16, 39, 40, 128])
@pytest.mark.parametrize(("count", "known"), SIZES)
def test_batches_have_labelled_data_first_and_the_others_once(
    count: int, known: int, batch_size: int
) -> None:
    split = partly(count, known)
    order = split.order(batch_size)
    assert order.share == known / count
    assert order.batch_size <= max(batch_size, 2)
    assert 0 < order.given < order.batch_size
    assert order.given >= min(0.25 * order.batch_size, order.batch_size - 1) - 0.5
    epoch = order.epoch()
    assert epoch.shape == (order.steps, order.batch_size)
    assert order.steps >= 1
    given, others = epoch[:, : order.given], epoch[:, order.given :]
    assert split.known[given].all()
    assert not split.known[others].any()
    counts = others.flatten().bincount(minlength=count)[known:]
    if order.steps * others.shape[1] <= count - known:
        assert counts.max() == 1
        assert (counts == 0).sum() < others.shape[1]
    else:  # nearly all have labels, and few others come again, in turn
        assert counts.max() - counts.min() <= 1
        assert given.numel() + others.numel() <= count + order.batch_size
    counts = given.flatten().bincount(minlength=count)[:known]
    assert counts.max() - counts.min() <= 1


def test_a_quarter_of_a_batch_has_labels_or_their_share_if_that_is_more() -> None:
    orders = [partly(400, known).order(40) for known in (2, 100, 200, 380, 399)]
    assert [order.given for order in orders] == [10, 10, 20, 38, 39]
    assert [order.steps for order in orders] == [13, 10, 10, 10, 9]
    assert {order.batch_size for order in orders} == {40}


def test_an_epoch_is_about_as_long_as_one_of_all_data_if_most_have_labels() -> None:
    for known in (300, 380, 398, 399):
        assert 9 <= partly(400, known).order(40).steps <= 10


def test_every_labelled_datum_is_used_as_often_as_any_other() -> None:
    order = partly(50, 7).order(10)
    epochs = torch.stack([order.epoch() for _ in range(60)])
    counts = epochs.flatten().bincount(minlength=50)
    assert counts[:7].min() > 0
    expected = epochs.shape[0] * epochs.shape[1] * order.given / 7
    assert ((counts[:7] - expected).abs() < 60).all()
    assert counts[7:].min() > 0
    assert not torch.equal(epochs[0], epochs[1])


def test_an_order_repeats_under_one_seed() -> None:
    order = partly(50, 7).order(10)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(order.epoch())
    assert torch.equal(*found)


def test_batches_of_one_kind_are_drawn_without_the_other() -> None:
    """The pairing of labelled data with others is by chance, too."""
    order = Order(torch.arange(2, 4), 2, torch.arange(2), 1)
    pairs = {tuple(row) for _ in range(60) for row in order.epoch().tolist()}
    assert pairs == {(0, 2), (0, 3), (1, 2), (1, 3)}


def test_one_label_of_each_class_is_enough() -> None:
    split: Any = data.hide_labels(whole(), 4)
    assert sorted(split.y[split.known].tolist()) == [0, 1, 2, 3]
    order = split.order(8)
    assert (order.given, order.steps) == (2, 6)
    assert set(split.y[order.epoch()[:, :2]].flatten().tolist()) == {0, 1, 2, 3}
