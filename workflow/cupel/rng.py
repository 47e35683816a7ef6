"""Named random streams: a draw added to one stream never shifts another."""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np


def _entropy(seed: int, names: tuple) -> list[int]:
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return [int(seed), *np.frombuffer(digest, np.uint32).tolist()]


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """NumPy generator of the stream `names` under `seed` (a non-negative int)."""
    return np.random.default_rng(_entropy(seed, names))


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for libraries that want an integer, drawn from the same streams."""
    return int(rng(seed, *names).integers(2**63))


def torch_rng(seed: int, *names: str | int):
    """CPU `torch.Generator` of the stream. Drawing on the CPU keeps a run's stream the same on every device."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initial weights of networks built in here are drawn from `seed`, on the CPU; global generators are left as they were."""
    import torch

    # torch.manual_seed would also reseed the GPUs; the default generator is the CPU's alone
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
