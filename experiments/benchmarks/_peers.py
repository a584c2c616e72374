"""One VAE, written for each library: x - hidden - latents and back, ReLU, Bernoulli pixels.

Data are uint8 pixels `(N, 784)`, binarized afresh at each step. `STEPS` hold peers that find them
in memory and differ in the step alone; `EPOCHS` those that load them as their documentation does.
A peer is built from a `Setting` and the data, and called to run once through the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from tqdm import tqdm

import pyrovae
from pyrovae import guides, likelihoods, nets, priors, program
from pyrovae.data import Preprocess
from pyrovae.data.split import dynamic_split
from pyrovae.loop import Loop
from pyrovae.objectives import ELBO, Objective
from pyrovae.options import Options

LR = 1e-3


@dataclass(frozen=True)
class Setting:
    """Sizes of a comparison."""

    batch: int = 128
    hidden: int = 400
    latents: int = 50
    pixels: int = 784

    def __str__(self) -> str:
        return f"{self.pixels}-{self.hidden}-{self.latents}, batch {self.batch}"


Peer = Callable[[], Any]


# pyrovae ------------------------------------------------------------------------------------------


def vae(setting: Setting) -> pyrovae.VAE:
    """Ours."""
    net = nets.MLP((setting.hidden,), activation="relu")
    shape = (setting.pixels,)
    return pyrovae.VAE(
        priors.StandardNormal(setting.latents),
        likelihoods.Bernoulli(shape, setting.latents, net),
        guides.Normal(shape, setting.latents, net),
    )


def ours(setting: Setting, x: Tensor, precision: str = "32-true", compile: bool = True) -> Peer:
    """`fit`, an epoch at a time."""
    return fitting(vae(setting), ELBO(), x, setting.batch, compile, precision)


def fitting(
    model: nn.Module,
    objective: Objective,
    x: Tensor,
    batch: int,
    compile: bool,
    precision: str = "32-true",
) -> Peer:
    """`fit` of a model, an epoch at a time."""
    binarized = Preprocess("grey", tuple(x.shape[1:]), 255.0, binarize="dynamic")
    split = dynamic_split(x, None, "train", binarized, "pixels")
    options = Options(
        epochs=1000, batch_size=batch, lr=LR, schedule="constant", compile=compile,
        accelerator=x.device.type, precision=precision,
    )  # fmt: skip
    loop = Loop(model.to(x.device), split, None, objective, options, options.fabric())
    with program.validation(False):
        loop.prepare(None)

    def epoch() -> None:
        with program.validation(False):
            loop._epoch(tqdm(disable=True))

    return epoch


# torch, by hand -----------------------------------------------------------------------------------


class ByHand(nn.Module):
    """Encoder, decoder and loss, as one writes them without a library."""

    def __init__(self, setting: Setting):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(setting.pixels, setting.hidden), nn.ReLU())
        self.head = nn.Linear(setting.hidden, 2 * setting.latents)
        self.decoder = nn.Sequential(
            nn.Linear(setting.latents, setting.hidden),
            nn.ReLU(),
            nn.Linear(setting.hidden, setting.pixels),
        )

    def forward(self, x8: Tensor) -> Tensor:
        """Negative ELBO per datum, nats."""
        x = (torch.rand(x8.shape, device=x8.device) < x8 / 255).float()
        loc, raw = self.head(self.encoder(x)).chunk(2, -1)
        scale = softplus(raw)
        z = loc + scale * torch.randn_like(scale)
        distortion = binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        rate = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum()
        return (distortion + rate) / len(x)


def by_hand(
    setting: Setting,
    x: Tensor,
    compile: bool = True,
    bf16: bool = False,
    mode: str = "default",
) -> Peer:
    """A loop over a permutation of data in memory, a fused optimizer."""
    model = ByHand(setting).to(x.device)
    loss: Any = torch.compile(model, mode=mode) if compile else model
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)

    def epoch() -> None:
        for index in torch.randperm(len(x), device=x.device).split(setting.batch):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                value = loss(x[index])
            value.backward()
            optimizer.step()

    return epoch


class Pixels(torch.utils.data.Dataset):
    """MNIST as torchvision has it: a picture for each item, turned to a tensor."""

    def __init__(self, x: Tensor):
        from torchvision.transforms import ToTensor

        self.x, self.transform = x.reshape(len(x), 28, 28), ToTensor()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        return self.transform(Image.fromarray(self.x[index].numpy()))


def torch_example(setting: Setting, x: Tensor) -> Peer:
    """Torch's own VAE example: eager, a loader that makes each item."""
    model = ByHand(setting)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    loader = torch.utils.data.DataLoader(Pixels(x), setting.batch, shuffle=True)

    def epoch() -> None:
        total = 0.0
        for images in loader:
            optimizer.zero_grad()
            loss = model(images.reshape(-1, setting.pixels) * 255)
            loss.backward()
            total += loss.item()
            optimizer.step()

    return epoch


# Pyro ---------------------------------------------------------------------------------------------


def svi(setting: Setting, x: Tensor) -> Callable[[Tensor], float]:
    """Pyro's SVI as its tutorial has it: a step on grey values in [0, 1]."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO

    pyro.clear_param_store()
    net = ByHand(setting)

    def model(x: Tensor) -> None:
        pyro.module("decoder", net.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), setting.latents), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net.decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", net.encoder)
        pyro.module("head", net.head)
        with pyro.plate("data", len(x)):
            loc, raw = net.head(net.encoder(x)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw)).to_event(1))

    inference = SVI(model, guide, pyro.optim.Adam({"lr": LR}), Trace_ELBO())
    return lambda grey: inference.step(torch.bernoulli(grey))


def pyro_svi(setting: Setting, x: Tensor) -> Peer:
    """SVI on data in memory."""
    step = svi(setting, x)
    return lambda: [step(x[index] / 255) for index in torch.randperm(len(x)).split(setting.batch)]


def pyro_documented(setting: Setting, x: Tensor) -> Peer:
    """SVI with the loader of Pyro's VAE example."""
    step = svi(setting, x)
    loader = torch.utils.data.DataLoader(Pixels(x), setting.batch, shuffle=True)
    return lambda: [step(images.reshape(-1, setting.pixels)) for images in loader]


# NumPyro ------------------------------------------------------------------------------------------


def numpyro_jitted(setting: Setting, x: Tensor) -> Peer:
    """A whole epoch as one compiled loop, as NumPyro's VAE example has it."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax.example_libraries import stax
    from numpyro.infer import SVI, Trace_ELBO

    encoder = stax.serial(
        stax.Dense(setting.hidden),
        stax.Relu,
        stax.FanOut(2),
        stax.parallel(
            stax.Dense(setting.latents), stax.serial(stax.Dense(setting.latents), stax.Softplus)
        ),
    )
    decoder = stax.serial(stax.Dense(setting.hidden), stax.Relu, stax.Dense(setting.pixels))

    def model(x: Any) -> None:
        decode = numpyro.module("decoder", decoder, (len(x), setting.latents))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(setting.latents), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        encode = numpyro.module("encoder", encoder, (len(x), setting.pixels))
        loc, scale = encode(x)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    inference = SVI(model, guide, numpyro.optim.Adam(LR), Trace_ELBO())
    data, steps = jnp.asarray(x.numpy()), len(x) // setting.batch
    state = inference.init(jax.random.PRNGKey(0), data[: setting.batch] / 255)

    @jax.jit
    def run(state: Any, key: Any) -> Any:
        order = jax.random.permutation(key, len(x))

        def step(i: Any, carry: Any) -> Any:
            loss, state = carry
            index = jax.lax.dynamic_slice_in_dim(order, i * setting.batch, setting.batch)
            grey = data[index] / 255
            seen = jax.random.bernoulli(jax.random.fold_in(key, i), grey).astype(jnp.float32)
            state, value = inference.update(state, seen)
            return loss + value, state

        return jax.lax.fori_loop(0, steps, step, (0.0, state))

    held = {"state": state, "key": jax.random.PRNGKey(1)}

    def epoch() -> None:
        held["key"], key = jax.random.split(held["key"])
        loss, held["state"] = run(held["state"], key)
        loss.block_until_ready()

    return epoch


# pythae -------------------------------------------------------------------------------------------


def pythae_model(setting: Setting, net: ByHand | None = None) -> Any:
    """Pythae's VAE with these networks."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    net = net or ByHand(setting)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            BaseEncoder.__init__(self)
            self.body, self.head = net.encoder, net.head

        def forward(self, x: Tensor) -> Any:
            loc, log_var = self.head(self.body(x)).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            BaseDecoder.__init__(self)
            self.net = net.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.net(z).sigmoid())

    config = VAEConfig((setting.pixels,), setting.latents, reconstruction_loss="bce")
    return VAE(config, Encoder(), Decoder())


def pythae_trainer(setting: Setting, x: Tensor) -> Peer:
    """Pythae's trainer on data binarized once."""
    import logging
    import tempfile

    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.getLogger("pythae").setLevel(logging.ERROR)
    seen = torch.bernoulli(x / 255)
    config = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=setting.batch, learning_rate=LR,
        train_dataloader_num_workers=0, no_cuda=True,
    )  # fmt: skip
    trainer = BaseTrainer(
        pythae_model(setting), BaseDataset(seen, torch.zeros(len(seen))), training_config=config
    )
    trainer.prepare_training()
    return lambda: trainer.train_step(1)


STEPS: dict[str, Callable[[Setting, Tensor], Peer]] = {
    "torch by hand, compiled": by_hand,
    "torch by hand, eager": lambda setting, x: by_hand(setting, x, compile=False),
    "pyrovae": ours,
    "pyrovae, eager": lambda setting, x: ours(setting, x, compile=False),
    "torch by hand, compiled, bf16": lambda setting, x: by_hand(setting, x, bf16=True),
    "pyrovae, bf16": lambda setting, x: ours(setting, x, precision="bf16-mixed"),
    "Pyro SVI": pyro_svi,
    "NumPyro, jitted": numpyro_jitted,
}
EPOCHS: dict[str, Callable[[Setting, Tensor], Peer]] = {
    "pyrovae": ours,
    "NumPyro, jitted": numpyro_jitted,
    "Pyro SVI and its loader": pyro_documented,
    "pythae": pythae_trainer,
    "torch's VAE example": torch_example,
}
