import math

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from sklearn.decomposition import PCA

from pyrovae import ConditionalVAE, guides, likelihoods, nets, plotting, priors
from pyrovae.plotting import panels
from pyrovae.vae import VAE

GREY, RGB, ODD, TABLE = (1, 6, 6), (3, 5, 7), (1, 7, 3), (14,)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(shape, latent_dim=2, missing=False, binary=True):
    kind = likelihoods.Bernoulli if binary else likelihoods.Normal
    net = nets.MLP((8,))
    return VAE(
        priors.StandardNormal(latent_dim),
        kind(shape, latent_dim, net),
        guides.Normal(shape, latent_dim, net),
        missing,
    )


def bits(num, shape):
    return torch.rand(num, *shape).round()


def canvas(ax):
    return np.asarray(ax.images[0].get_array())


def labels(axis):
    return [text.get_text().replace("\N{MINUS SIGN}", "-") for text in axis.get_ticklabels()]


def legend(ax_or_figure):
    found = (
        ax_or_figure.legends if hasattr(ax_or_figure, "legends") else [ax_or_figure.get_legend()]
    )
    return [text.get_text() for each in found for text in each.get_texts()]


def offsets(ax):
    kept = [c for c in ax.collections if isinstance(c, PathCollection)]
    return np.concatenate([c.get_offsets() for c in kept])


HISTORY = [
    {"epoch": e, "elbo": -90 - 2000 / e**3, "valid_elbo": -95 - 2000 / e**3,
     "reconstruction": -70 - 2000 / e**3, "kl": 20.0 + 1 / e, "kl_weight": min(1, e / 4)}
    for e in range(1, 31)
]  # fmt: skip


# Everything at once


@pytest.mark.parametrize("shape", [GREY, RGB, (1, 1, 1), TABLE, (1,), (2, 2, 1)], ids=str)
@pytest.mark.parametrize(("latent_dim", "num"), [(1, 2), (2, 1), (2, 13), (5, 1)])
def test_every_picture_of_any_data(shape, latent_dim, num):
    vae, x = make(shape, latent_dim, binary=len(shape) == 3), bits(num, shape)
    made = plotting.figures(vae, x, torch.arange(num), HISTORY, torch.randn(num))
    image = len(shape) == 3 and shape[0] != 2
    expected = {"reconstructions", "samples", "latent_space", "training_curves", "log_px"}
    expected |= {"manifold"} if image and latent_dim == 2 else set()
    expected |= {"interpolations"} if image and num > 1 else set()
    assert set(made) == expected
    for figure in made.values():
        width, height = figure.get_size_inches()
        assert figure.dpi == 150
        assert 3 < width <= 10
        assert 1 < height <= 10
        assert all(ax.get_title() or figure.get_suptitle() for ax in figure.axes if ax.images)


@pytest.mark.parametrize("shape", [GREY, (2,)], ids=str)
@pytest.mark.parametrize("fill", [0.0, 0.5, 7.0, -3.0, math.nan])
def test_constant_data(shape, fill, tmp_path):
    vae = make(shape, missing=True, binary=False)
    for name, figure in plotting.figures(vae, torch.full((3, *shape), fill)).items():
        figure.savefig(tmp_path / f"{name}.png", dpi=30)


def test_nothing_clipped_when_saved(tmp_path):
    x = bits(20, GREY)
    made = plotting.figures(make(GREY), x, torch.arange(20) % 12, HISTORY, torch.randn(20) * 1e3)
    for name, figure in made.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=150)
        page = figure.bbox
        for ax in figure.axes:
            box = ax.get_tightbbox()
            assert box.x0 >= -1, name
            assert box.y0 >= -1, name
            assert box.x1 <= page.x1 + 1, name
            assert box.y1 <= page.y1 + 1, name


def test_what_is_not_there_is_skipped():
    made = plotting.figures(make(GREY, 3), bits(4, GREY), history=[], log_px_values=None)
    assert set(made) == {"reconstructions", "samples", "latent_space", "interpolations"}
    none_finite = torch.full((4,), -math.inf)
    assert "log_px" not in plotting.figures(make(GREY), bits(4, GREY), None, None, none_finite)


@pytest.mark.parametrize("shape", [GREY, TABLE], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_model_and_random_state_are_left_alone(shape, training):
    vae = make(shape).train(training)
    vae.encoder.train(not training)
    modes = [m.training for m in vae.modules()]
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    x = bits(12, shape)
    kept, state, numpy_state = x.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    plotting.figures(
        vae, x, torch.arange(12), HISTORY, torch.randn(12, generator=torch.Generator())
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert [m.training for m in vae.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())
    assert torch.equal(x, kept)


# Images


def test_reconstructions_show_data_above_the_mean():
    vae, x = make(GREY), bits(5, GREY)
    ax = plotting.reconstructions(vae, x).axes[0]
    picture, again = canvas(ax), vae.reconstruct(x)
    assert picture.shape == (13, 34, 3)
    for i in range(5):
        left = slice(7 * i, 7 * i + 6)
        assert np.allclose(picture[:6, left, 0], x[i, 0])
        assert np.allclose(picture[7:, left, 0], again[i, 0], atol=1e-6)
    assert np.all(picture[6] == 1)
    assert labels(ax.yaxis) == ["data", "reconstruction"]
    assert list(ax.get_yticks()) == [2.5, 9.5]
    assert ax.get_legend() is None


def test_reconstructions_are_spread_over_the_data():
    x = (torch.arange(21.0) / 20)[:, None, None, None].expand(21, *GREY)
    picture = canvas(plotting.reconstructions(make(GREY), x, num=3).axes[0])
    assert np.allclose(picture[0, [0, 7, 14], 0], [0, 0.5, 1])


def test_colours_stay_in_their_channels():
    vae, x = make(RGB), bits(2, RGB)
    picture = canvas(plotting.reconstructions(vae, x).axes[0])
    assert np.allclose(picture[:5, :7], x[0].permute(1, 2, 0))
    assert np.allclose(picture[6:, 8:], vae.reconstruct(x)[1].permute(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize("shape", [GREY, RGB], ids=str)
def test_missing_entries_have_their_colour(shape):
    vae, x = make(shape, missing=True), bits(3, shape)
    x[1, -1, 2, 3] = math.nan
    ax = plotting.reconstructions(vae, x).axes[0]
    orange = np.all(np.isclose(canvas(ax), to_rgb(panels.MISSING)), axis=-1)
    width = shape[2] + 1
    assert np.argwhere(orange).tolist() == [[2, width + 3]]
    assert legend(ax) == ["missing"]


def test_grey_levels_follow_the_data_and_are_shared():
    vae, x = make(GREY, binary=False), 20 * torch.rand(4, *GREY) - 10
    low, high = x.min(), x.max()
    picture = canvas(plotting.reconstructions(vae, x).axes[0])
    scaled = (torch.stack([x[0, 0], vae.reconstruct(x)[0, 0]]) - low) / (high - low)
    assert np.allclose(picture[:6, :6, 0], scaled[0], atol=1e-6)
    assert np.allclose(picture[7:, :6, 0], scaled[1].clamp(0, 1), atol=1e-6)


def test_reconstructions_beyond_the_data_are_white():
    vae, x = make(GREY, binary=False), torch.rand(4, *GREY)
    torch.nn.init.constant_(vae.likelihood.net.bias, 100.0)
    assert np.all(canvas(plotting.reconstructions(vae, x).axes[0])[7:] == 1)


def test_samples_are_means_drawn_by_seed():
    vae = make(ODD)
    picture = canvas(plotting.samples(vae, rows=2, columns=3, seed=5).axes[0])
    torch.manual_seed(5)
    drawn = vae.sample(6, mean=True)
    assert picture.shape == (2 * 8 - 1, 3 * 4 - 1, 3)
    assert np.allclose(picture[8:, 4:7, 0], drawn[4, 0], atol=1e-6)
    assert not np.allclose(canvas(plotting.samples(vae, 2, 3, seed=6).axes[0]), picture)


def test_manifold_has_z1_rightwards_and_z2_upwards():
    vae = make(ODD)
    ax = plotting.manifold(vae, size=5).axes[0]
    picture = canvas(ax)
    assert picture.shape == (35, 15, 3)
    edge = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.975)).item()
    corners = {(-edge, edge): (0, 0), (edge, edge): (0, 12), (-edge, -edge): (28, 0)}
    for z, (top, left) in corners.items():
        image = vae.decode(torch.tensor(z))[0]
        assert np.allclose(picture[top : top + 7, left : left + 3, 0], image, atol=1e-6)
    assert np.allclose(picture[14:21, 6:9, 0], vae.decode(torch.zeros(2))[0], atol=1e-6)
    assert labels(ax.xaxis) == labels(ax.yaxis) == ["-1.96", "-0.64", "0.00", "0.64", "1.96"]
    assert list(ax.get_xticks()) == [1, 4, 7, 10, 13]
    assert list(ax.get_yticks()) == [31, 24, 17, 10, 3]
    assert ax.yaxis_inverted()  # row 0 of the picture, the largest z2, is on top
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z1", "z2")


def test_manifold_goes_as_far_as_asked():
    vae = make(GREY)
    ax = plotting.manifold(vae, size=3, bound=4).axes[0]
    assert np.allclose(canvas(ax)[:6, :6, 0], vae.decode(torch.tensor([-4.0, 4.0]))[0], atol=1e-6)
    assert labels(ax.xaxis) == labels(ax.yaxis) == ["-4.00", "0.00", "4.00"]


def test_interpolations_go_from_start_to_end():
    vae, x = make(GREY), bits(4, GREY)
    ax = plotting.interpolations(vae, x[:2], x[2:], steps=4).axes[0]
    picture, path = canvas(ax), vae.interpolate(x[:2], x[2:], 4)
    shown = [x[1], *path[:, 1], x[3]]
    for i, image in enumerate(shown):
        assert np.allclose(picture[7:, 7 * i : 7 * i + 6, 0], image[0], atol=1e-6)
    assert labels(ax.xaxis) == ["start", "0.00", "0.33", "0.67", "1.00", "end"]
    frames = sorted(patch.get_xy() for patch in ax.patches)
    assert frames == [(-0.5, -0.5), (-0.5, 6.5), (34.5, -0.5), (34.5, 6.5)]


# Tables


def test_reconstructions_of_a_table_are_scatters_of_observed_entries():
    vae, x = make(TABLE, missing=True, binary=False), torch.randn(50, *TABLE)
    x[:10, 0] = math.nan
    figure = plotting.reconstructions(vae, x)
    assert len(figure.axes) == 12
    first, last = figure.axes[0], figure.axes[-1]
    again = vae.reconstruct(x)
    assert np.allclose(offsets(first), torch.stack([x[10:, 0], again[10:, 0]], 1))
    assert np.allclose(offsets(last), torch.stack([x[:, 13], again[:, 13]], 1))
    fit = 1 - (x[:, 13] - again[:, 13]).square().sum() / x[:, 13].var(correction=0) / 50
    assert f"{fit:.2f}" in last.get_title().replace("\N{MINUS SIGN}", "-")
    assert last.get_title().startswith("x[13]")
    assert first.lines[0].get_slope() == 1


def test_samples_of_a_table_keep_their_noise_beside_the_data():
    vae = make((2,), binary=False)
    x = 5 + torch.randn(300, 2)
    figure = plotting.samples(vae, x=x)
    data, drawn = figure.axes[1].patches[:-1], figure.axes[1].patches[-1]
    areas = [bar.get_width() * bar.get_height() for bar in data]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in data]
    assert sum(areas) == pytest.approx(1)
    assert np.dot(areas, middles) == pytest.approx(x[:, 1].mean().item(), abs=0.2)
    torch.manual_seed(0)
    with torch.no_grad():
        vae.sample(64, mean=True)
        low = vae.sample(2000)[:, 1].quantile(0.01).item()
    steps = drawn.get_xy()
    assert steps[steps[:, 1] > 0, 0].min() < low
    assert legend(figure) == ["data", "samples"]


def test_counts_get_a_bin_for_each_value():
    edges = panels.bin_edges(np.array([0.0, 1, 2, 2]), np.array([3.0]))
    assert edges == [-0.5, 0.5, 1.5, 2.5, 3.5]


# Latent space


def test_two_latents_are_drawn_as_they_are():
    vae, x, y = make(GREY), bits(30, GREY), torch.arange(30) % 3
    ax = plotting.latent_space(vae, x, y).axes[0]
    z = vae.encode(x)
    assert np.allclose(offsets(ax), torch.cat([z[y == label] for label in range(3)]))
    assert legend(ax) == ["0", "1", "2"]
    assert len({tuple(c.get_facecolor()[0]) for c in ax.collections}) == 3
    assert [text.get_text() for text in ax.texts] == ["0", "1", "2"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z1", "z2")
    assert "n = 30" in ax.get_title()


def test_many_latents_are_drawn_as_principal_components():
    vae, x = make(GREY, 6), bits(40, GREY)
    ax = plotting.latent_space(vae, x).axes[0]
    pca = PCA(2)
    expected = pca.fit_transform(vae.encode(x).double().numpy())
    assert np.allclose(np.abs(offsets(ax)), np.abs(expected))
    first, second = pca.explained_variance_ratio_
    assert ax.get_xlabel() == f"PC 1 ({first:.0%} of variance)"
    assert ax.get_ylabel() == f"PC 2 ({second:.0%} of variance)"
    assert ax.get_legend() is None


def test_many_labels_get_a_colour_bar():
    vae, x = make(GREY), bits(21, GREY)
    figure = plotting.latent_space(vae, x, torch.arange(21))
    ax, bar = figure.axes
    assert bar.get_ylabel() == "label y"
    assert ax.collections[0].get_array().tolist() == list(range(21))
    assert len(plotting.latent_space(vae, x[:20], torch.arange(20)).axes) == 1


def test_one_latent_is_a_histogram_stacked_by_label():
    vae, x, y = make(GREY, 1), bits(50, GREY), torch.arange(50) % 11
    ax = plotting.latent_space(vae, x, y).axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert [sum(h) for h in heights] == [(y == label).sum() for label in range(11)]
    counts, _ = np.histogram(vae.encode(x)[:, 0].double(), 40)
    assert np.sum(heights, 0).tolist() == counts.tolist()
    assert legend(ax) == [str(label) for label in range(11)]
    tops = [bar.get_y() + bar.get_height() for bar in ax.containers[-1]]
    assert tops == counts.tolist()


def test_one_latent_against_many_labels():
    vae, x, y = make(GREY, 1), bits(30, GREY), torch.randn(30)
    ax = plotting.latent_space(vae, x, y).axes[0]
    assert np.allclose(offsets(ax), torch.stack([vae.encode(x)[:, 0], y], 1))


def test_large_data_are_thinned_evenly_with_their_labels():
    vae, x, y = make(GREY), bits(101, GREY), torch.arange(101)
    ax = plotting.latent_space(vae, x, y, max_points=51).axes[0]
    assert ax.collections[0].get_array().tolist() == list(range(0, 101, 2))
    assert np.allclose(offsets(ax), vae.encode(x[::2]), atol=1e-6)
    assert "n = 51 of 101" in ax.get_title()


# Numbers


def test_training_curves():
    figure = plotting.training_curves(HISTORY)
    elbo, reconstruction, kl = figure.axes
    assert [line.get_label() for line in elbo.lines] == ["training", "validation"]
    assert elbo.lines[1].get_ydata().tolist() == [row["valid_elbo"] for row in HISTORY]
    assert elbo.lines[0].get_xdata().tolist() == list(range(1, 31))
    assert reconstruction.lines[0].get_ydata()[-1] == HISTORY[-1]["reconstruction"]
    assert kl.lines[0].get_ydata()[0] == 21
    low, high = elbo.get_ylim()
    assert -140 < low < HISTORY[3]["valid_elbo"]
    assert high > HISTORY[-1]["elbo"]
    assert all("nats" in ax.get_ylabel() for ax in figure.axes)
    shade = elbo.patches[0].get_extents().transformed(elbo.transData.inverted())
    assert (shade.x0, shade.x1) == pytest.approx((0.5, 3.5))
    assert legend(figure) == ["training", "validation", "KL weight < 1"]


def test_training_curves_that_are_not_there():
    history = [{"epoch": 1, "elbo": -3.0}, {"epoch": 2, "elbo": math.nan, "kl": None}]
    figure = plotting.training_curves(history)
    assert len(figure.axes) == 1
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1]
    assert legend(figure) == ["training"]


def test_a_kl_of_zero_is_a_value():
    history = [
        {"epoch": e, "elbo": -3.0, "kl": 0.0, "kl_weight": (e - 1) / 3} for e in (1, 2, 3, 4)
    ]
    elbo, kl = plotting.training_curves(history).axes
    assert kl.lines[0].get_ydata().tolist() == [0, 0, 0, 0]
    shade = elbo.patches[0].get_extents().transformed(elbo.transData.inverted())
    assert (shade.x0, shade.x1) == pytest.approx((0.5, 3.5))


def test_log_px_histogram_counts_what_it_leaves_out():
    values = torch.tensor([-math.inf, -90.0, -80.0, -70.0, math.nan, -100.0])
    ax = plotting.log_px_histogram(values).axes[0]
    assert sum(bar.get_height() for bar in ax.patches) == 4
    assert ax.lines[0].get_xdata()[0] == -85
    (text,) = legend(ax)
    assert "85.0 nats" in text
    assert "without 2 of 6" in text
    assert "nats" in ax.get_xlabel()


def test_log_px_histogram_shows_the_extremes():
    values = torch.tensor([-5.0, -math.inf, -9.0, -1.0, -2.0, -7.0])
    x = (torch.arange(6.0) / 5)[:, None, None, None].expand(6, *GREY)
    _, least, most = plotting.log_px_histogram(values, x, num=2).axes
    assert labels(least.xaxis) == ["-inf", "-9.0"]
    assert labels(most.xaxis) == ["-1.0", "-2.0"]
    assert np.allclose(canvas(least)[0, [0, 7], 0], [0.2, 0.4])
    assert np.allclose(canvas(most)[0, [0, 7], 0], [0.6, 0.8])
    assert least.get_title() == "Least likely"
    values[4] = math.nan
    _, _, most = plotting.log_px_histogram(values, x, num=2).axes
    assert labels(most.xaxis) == ["-1.0", "-5.0"]


# Messages


# Labels -------------------------------------------------------------------------------------------


def with_label(latent_dim=2, **y):
    """A model whose decoder draws one row of pixels for each class, and nothing of z."""
    torch.manual_seed(0)
    width = y.get("num_classes") or y["label_dim"]
    vae = ConditionalVAE(
        priors.StandardNormal(latent_dim),
        likelihoods.Bernoulli((1, 3, 3), latent_dim + width, nets.MLP(())),
        guides.Normal((9 + width,), latent_dim, nets.MLP(())),
        **y,
    )
    with torch.no_grad():
        vae.likelihood.net.head.weight.zero_()
        for k in range(width):
            vae.likelihood.net.head.weight[3 * k : 3 * k + 3, latent_dim + k] = 50.0
        vae.likelihood.net.bias.fill_(-25.0)
    return vae


def rows_lit(picture):
    """Which row of each 3x3 image of a picture is lit, image by image from left to right."""
    grey = picture[..., 0]
    across = range(0, grey.shape[1], 4)
    return [int(grey[:3, i : i + 3].mean(1).argmax()) for i in across]


def test_analogies_show_the_datum_and_every_class():
    vae = with_label(num_classes=3)
    x = bits(4, (1, 3, 3))
    figure = plotting.analogies(vae, x, torch.tensor([0, 1, 2, 0]), num=2)
    (ax,) = figure.axes
    assert labels(ax.xaxis) == ["data", "0", "1", "2"]
    assert rows_lit(canvas(ax)[:3, 4:]) == [0, 1, 2]
    assert len(ax.patches) == 2


def test_analogies_of_a_vector_are_under_those_of_data():
    vae = with_label(label_dim=2)
    figure = plotting.analogies(vae, bits(3, (1, 3, 3)), torch.eye(3)[:, :2], num=3)
    assert labels(figure.axes[0].xaxis)[:2] == ["data", "1.0\n0.0"]
    with pytest.raises(ValueError, match="y is a vector: see analogies"):
        plotting.styles(vae)


def test_styles_have_a_class_a_column():
    (ax,) = plotting.styles(with_label(num_classes=3), rows=2).axes
    assert labels(ax.xaxis) == ["0", "1", "2"]
    assert rows_lit(canvas(ax)) == [0, 1, 2]


def test_manifold_of_a_label():
    figure = plotting.manifold(with_label(num_classes=3), 2, y=torch.tensor(2))
    assert figure.axes[0].get_title().endswith("y = 2")
    assert canvas(figure.axes[0])[2::3, :, 0].min() > 0.9


def test_pictures_of_a_model_with_a_label():
    y = torch.tensor([0, 1, 2, 0])
    made = plotting.figures(with_label(num_classes=3), bits(4, (1, 3, 3)), y)
    assert set(made) == {"reconstructions", "latent_space", "analogies", "samples", "manifold"}
    vector = plotting.figures(with_label(label_dim=2), bits(4, (1, 3, 3)), torch.rand(4, 2))
    assert set(vector) == {"reconstructions", "latent_space", "analogies"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.manifold(make(GREY, 3)), "needs 2 latents, the model has 3"),
        (lambda: plotting.manifold(make(TABLE)), r"needs images, the data have shape \(14,\)"),
        (lambda: plotting.manifold(make(GREY), size=1), "size must be at least 2, got 1"),
        (lambda: plotting.manifold(make(GREY), bound=0.0), "bound must be positive and finite"),
        (
            lambda: plotting.interpolations(make(TABLE), torch.rand(2, 14), torch.rand(2, 14)),
            r"need images, got shape \(14,\)",
        ),
        (
            lambda: plotting.interpolations(make(GREY), bits(2, GREY), bits(3, GREY)),
            "start and end must have one shape",
        ),
        (lambda: plotting.training_curves([]), "history holds no curve"),
        (lambda: plotting.training_curves([{"epoch": 1}]), "history holds no curve"),
        (
            lambda: plotting.log_px_histogram(torch.full((3,), -math.inf)),
            "finite log p.x., got none among 3",
        ),
        (
            lambda: plotting.log_px_histogram(torch.zeros(3), bits(2, GREY)),
            "as long as values, 3, got 2",
        ),
        (lambda: plotting.reconstructions(make(GREY), bits(0, GREY)), "at least one datum"),
        (
            lambda: plotting.latent_space(make(GREY), bits(3, GREY), torch.zeros(2)),
            "y must be as long as x, 3, got 2",
        ),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
