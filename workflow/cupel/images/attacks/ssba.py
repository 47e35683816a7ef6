"""SSBA (Li et al., 2021): an encoder hides a fingerprint in the image, and the hidden fingerprint is the trigger.

    x' = E(m, x),   E, D = argmin  BCE(D(E(m, x)), m) + w·MSE(E(m, x), x),   m uniform bits in training

The victim's trigger is E with one fixed fingerprint m for all images: a random bit string, without the error-correcting
code of the released one, because nobody has to read it back. E and D follow the plan of StegaStamp: a U-shaped
convolutional net that sees the fingerprint as more image channels, and a convolutional classifier of bits. As in the
released training, E gives the new image, not what is added to it (backdoorbench SPEC 4, ims SPEC 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.images.attacks._batch import arrays, stamp_pixels, stored
from cupel.images.attacks._preparation import share
from cupel.images.attacks.base import Attack, attack
from cupel.images.datasets import Dataset
from cupel.rng import derive, rng, seeded, torch_rng
from cupel.training.augment import to_pixels
from cupel.training.engine import upload
from cupel.training.progress import Progress

GRID = 16  # the fingerprint is laid out on a 16×16 grid per colour, then enlarged to the image
READ = 0.9  # share of bits from which on fidelity is asked for


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3×3 convolution and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU())


class Encoder(nn.Module):
    """U-shaped net from fingerprint [B, bits] and pixels [B, C, H, W] in [0, 1] to pixels of the same shape.

    Five levels with width·(1, 1, 2, 4, 8) channels. The last layer gives logits of the pixels and sees those of the
    input image, so that it can learn to copy it within a few steps.
    """

    def __init__(self, bits: int, channels: int, width: int):
        super().__init__()
        steps = list(pairwise((width, width, 2 * width, 4 * width, 8 * width)))
        self.spread = nn.Linear(bits, channels * GRID**2)
        self.enter = convolution(2 * channels, width)
        self.down = nn.ModuleList(convolution(fine, coarse, 2) for fine, coarse in steps)
        self.up = nn.ModuleList(convolution(coarse, fine) for fine, coarse in steps)
        self.merge = nn.ModuleList(convolution(2 * fine + (0 if level else 2 * channels), fine)
                                   for level, (fine, _) in enumerate(steps))
        self.leave = convolution(width, width)
        self.paint = nn.Conv2d(width + channels, channels, 1)

    def forward(self, fingerprint: Tensor, x: Tensor) -> Tensor:
        plan = F.relu(self.spread(fingerprint)).unflatten(1, (x.shape[1], GRID, GRID))
        seen = torch.cat([F.interpolate(plan, x.shape[-2:]), x], 1)
        maps = [self.enter(seen)]
        for down in self.down:
            maps.append(down(maps[-1]))
        deep = maps.pop()
        for level in reversed(range(len(maps))):
            risen = self.up[level](F.interpolate(deep, maps[level].shape[-2:]))
            deep = self.merge[level](torch.cat([maps[level], risen, *([] if level else [seen])], 1))
        return torch.sigmoid(self.paint(torch.cat([self.leave(deep), torch.logit(x, 1 / 255)], 1)))


class Decoder(nn.Module):
    """Convolutional net from pixels [B, C, size, size] to the logits of the fingerprint's bits [B, bits]."""

    def __init__(self, bits: int, channels: int, width: int, size: int):
        super().__init__()
        plan = ((channels, width, 2), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1),
                (2 * width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 4 * width, 2))
        side = -(-size // 32)
        self.convolutions = nn.Sequential(*(convolution(*layer) for layer in plan), nn.Flatten())
        self.dense = nn.Sequential(nn.Linear(4 * width * side**2, 16 * width), nn.ReLU(), nn.Linear(16 * width, bits))

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.convolutions(x))


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """Indices of batches, epoch after epoch, without end."""
    while True:
        for part in torch.randperm(count, generator=generator).split(size):
            yield part.numpy()


def grey_levels(x: Tensor) -> Tensor:
    """Pixels in [0, 1] as they are stored: whole grey levels 0..255, still float."""
    return x.mul(255).round().clamp(0, 255)


def encode(encoder: Encoder, fingerprint: np.ndarray, images: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Images uint8 [N, H, W, C] with the fingerprint [bits] hidden in them, same form."""
    bits = torch.as_tensor(fingerprint, dtype=torch.float32, device=device)
    at_once = max(1, 2**18 // (images.shape[1] * images.shape[2]))  # bounds memory, whatever the image size
    return stamp_pixels(images, lambda x: encoder(bits.expand(len(x), -1), x), at_once, device)


@attack("ssba")
@dataclass(frozen=True)
class SSBA(Attack):
    """Sample-specific backdoor attack.

    The weight w of the image's fidelity is 0 until the decoder reads 90 % of a batch's bits, then for `wait` steps
    more, and rises linearly to `fidelity` over `ramp` steps. Waiting for the bits is what the released training does;
    with a fixed start the encoder may learn to copy the image and never to hide anything.

    `tensors` from `prepare`: `encoder.<name>` float32, its weights; `fingerprint` uint8 [bits]; `bit_accuracy`, the
    share of bits that the decoder reads from 500 training images with random fingerprints, after rounding to uint8;
    `psnr` in dB of the same images with the victim's fingerprint.

    Attributes:
        bits: length of the fingerprint; 100 as published, 1 for the released files named `b1`.
        width: channels of the first level.
        epochs, batch_size, lr: of the training, with Adam. All epochs together, times `smaller`, give the steps.
        fidelity, wait, ramp: of w. A run shorter than twice wait + ramp gives a quarter of its steps to both together.

    Raises:
        ValueError: in `prepare`, if the training is too short for the bits or for the ramp.
    """

    bits: int = 100
    width: int = 32
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-4
    fidelity: float = 10.0
    wait: int = 1000
    ramp: int = 3000

    needs: ClassVar[str] = "data"

    def train(self, dataset: Dataset, seed: int, device: str, smaller: float) -> tuple[Encoder, Decoder]:
        """Encoder and decoder, trained together."""
        size, channels = dataset.image_size, dataset.images.shape[-1]
        with seeded(derive(seed, "ssba", "initial")):
            encoder = Encoder(self.bits, channels, self.width).to(device)
            decoder = Decoder(self.bits, channels, self.width, size).to(device)
        steps = share(self.epochs * -(-len(dataset) // self.batch_size), smaller)
        pace = 1.0 if steps >= 2 * (self.wait + self.ramp) else steps / (4 * (self.wait + self.ramp))
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], self.lr)
        draws = torch_rng(seed, "ssba", "fingerprints")
        order = batches(len(dataset), self.batch_size, torch_rng(seed, "ssba", "order"))
        read, weight, best = None, 0.0, 0.0
        progress = Progress("ssba", steps, unit="steps")
        for step, index in zip(range(steps), order, strict=False):
            x = to_pixels(upload(dataset.images[index], device))
            bits = torch.randint(2, (len(x), self.bits), generator=draws).to(device, torch.float32)
            if read is not None:
                weight = self.fidelity * min(1.0, max(0.0, (step - read - pace * self.wait) / max(1, pace * self.ramp)))
            hidden = encoder(bits, x)
            # The decoder reads what is stored; gradients pass as if nothing were clipped or rounded.
            logits = decoder(hidden + (grey_levels(hidden) / 255 - hidden).detach())
            loss = F.binary_cross_entropy_with_logits(logits, bits) + weight * F.mse_loss(hidden, x)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if read is None:
                best = max(best, ((logits > 0) == (bits > 0)).float().mean().item())
                read = step if best > READ else None
            progress(1, f"weight of the image {weight:.1f}")
        progress.close()
        if weight < self.fidelity:
            state = (f"read at most {best:.0%} of the bits" if read is None else
                     f"read the bits from step {read} on, too late for the image to be restored")
            raise ValueError(f"SSBA: {steps} steps are too few for {self.bits} bits: the decoder {state}; raise "
                             "smaller, epochs or lr, or lower bits")
        return encoder.eval(), decoder.eval()

    def prepare(self, dataset: Dataset, model, target: int, seed: int, *, device: str = "cpu",
                smaller: float = 1.0) -> dict[str, np.ndarray]:
        encoder, decoder = self.train(dataset, seed, device, smaller)
        fingerprint = rng(seed, "ssba", "fingerprint").integers(0, 2, self.bits, dtype=np.uint8)
        draw = rng(seed, "ssba", "check")
        images = np.asarray(dataset.images[np.sort(draw.choice(len(dataset), min(500, len(dataset)), replace=False))])
        error = np.square(encode(encoder, fingerprint, images, device).astype(np.float64) - images).mean()
        message = torch.from_numpy(draw.integers(0, 2, (len(images), self.bits))).to(device)
        with torch.inference_mode():
            hidden = grey_levels(encoder(message.float(), to_pixels(upload(images, device)))) / 255
            accuracy = ((decoder(hidden) > 0) == (message > 0)).double().mean().item()
        return {**arrays("encoder", encoder), "fingerprint": fingerprint, "bit_accuracy": np.float64(accuracy),
                "psnr": np.float64(10 * np.log10(255**2 / error) if error else np.inf)}

    def stamp(self, images: np.ndarray) -> np.ndarray:
        encoder = stored(self, "encoder", lambda: Encoder(self.bits, images.shape[-1], self.width))
        return encode(encoder, self.made("fingerprint"), images)
