"""Neural Cleanse (Wang et al., IEEE S&P 2019), with unlearning as in BackdoorBench; ims SPEC 7, backdoorbench SPEC 7.

For each class t a trigger is sought that sends all images there and covers as little as possible:

    min over m_t, p_t of   CE( f( (1 − m_t) ⊙ x + m_t ⊙ p_t ), t ) + λ_t · ‖m_t‖₁,        m = tanh(u)/2 + 1/2, p alike

λ_t adapts: up while the trigger works, down while it does not (`Search`). A class whose mask is far smaller than the
others' is the target of a backdoor:   |‖m_t‖₁ − median| / (1.4826 · MAD) > 2   on the small side. The network is then
tuned on the clean images, a fifth of which carry the trigger found, with their true labels.

All classes are sought together: their problems share images and network but no variable, and Adam works entry by entry,
so the result is that of one search per class with the same batches.

Two things are not as in the released code. There p is normalised in its first three rows of pixels alone, a slip of
indexing, so that the rest of it cannot take all colours and masks come out larger (ims SPEC 10.17): here all of it is.
And its median of an even number of classes is the smaller of the middle two; here it is their mean, as in numpy.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.images.defences.base import defence
from cupel.images.defences.passes import batches, stage, train
from cupel.training.engine import cuts


def unit(u: Tensor) -> Tensor:
    """tanh(u) squeezed into (0, 1)."""
    return u.tanh() / (2 + 1e-7) + 0.5


class Search:
    """Costs and best triggers of all classes, updated once per pass.

    Args:
        classes: K.
        cost: λ at the start.
        up: factor by which λ grows; it shrinks by up^1.5.
        patience: passes in a row that must succeed (or fail) for λ to change.
        success: fraction of images that must reach the class.
        stop_patience: passes without a mask smaller than 0.99 of the best, after which a class is finished, if its λ
            has by then gone both up and down.

    Attributes:
        cost: float64 [K], λ.
        best: float64 [K], smallest successful mean norm, else infinity.
        mask, pattern: float [K, 1, H, W] and [K, C, H, W], as they were when `best` was reached; those of the first
            pass for a class that never succeeded.
        active: bool [K], classes not finished.
    """

    def __init__(self, classes: int, *, cost: float, up: float, patience: int, success: float, stop_patience: int):
        self.cost = np.full(classes, cost)
        self.best = np.full(classes, np.inf)
        self.best_before = np.full(classes, np.inf)
        self.rises, self.falls, self.stale = (np.zeros(classes, int) for _ in range(3))
        self.rose, self.fell = np.zeros(classes, bool), np.zeros(classes, bool)
        self.active = np.ones(classes, bool)
        self.mask = self.pattern = None
        self.up, self.patience, self.success, self.stop_patience = up, patience, success, stop_patience

    def state_dict(self) -> dict:
        return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        for key, value in state.items():
            setattr(self, key, value.cpu().numpy() if isinstance(getattr(self, key), np.ndarray) else value)

    def update(self, reached: np.ndarray, norm: np.ndarray, mask: Tensor, pattern: Tensor) -> None:
        """Take in one pass.

        Args:
            reached: float [K], fraction of images that reached the class, averaged over batches.
            norm: float [K], L1 norm of the mask, averaged over batches.
            mask, pattern: as they are after the pass.
        """
        works = reached >= self.success
        better = self.active & works & (norm < self.best)
        self.best[better] = norm[better]
        if self.mask is None:
            self.mask, self.pattern = mask.clone(), pattern.clone()
        chosen = torch.from_numpy(better).to(mask.device)
        self.mask[chosen], self.pattern[chosen] = mask[chosen], pattern[chosen]

        same = np.isfinite(self.best) & (self.best >= 0.99 * self.best_before)
        self.stale = np.where(same, self.stale + 1, np.where(np.isfinite(self.best), 0, self.stale))
        self.best_before = np.minimum(self.best_before, self.best)
        self.active &= ~(self.rose & self.fell & (self.stale >= self.stop_patience))

        self.rises = np.where(works, self.rises + 1, 0)
        self.falls = np.where(works, 0, self.falls + 1)
        rise, fall = self.rises >= self.patience, self.falls >= self.patience
        self.cost = np.where(rise, self.cost * self.up, np.where(fall, self.cost / self.up**1.5, self.cost))
        self.rises[rise], self.falls[fall] = 0, 0
        self.rose |= rise
        self.fell |= fall


def anomaly_index(norms: np.ndarray) -> np.ndarray:
    """|norm − median| / (1.4826 · MAD), float [K]. The median of an even number is the mean of the middle two."""
    away = np.abs(norms - np.median(norms))
    deviation = 1.4826 * np.median(away)
    return np.divide(away, deviation, out=np.where(away > 0, np.inf, 0.0), where=deviation > 0)


def search(model, budget, seed: int, *, epochs: int, lr: float, batch_size: int, together: int, **rule) -> Search:
    """Triggers of all classes for `model`, which stays as it is; `rule` goes to `Search`."""
    model.eval()
    device, (height, width, channels) = torch.device(budget.device), budget.images.shape[1:]
    u = torch.ones(budget.classes, 1, height, width, device=device, requires_grad=True)
    v = torch.ones(budget.classes, channels, height, width, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([u, v], lr, betas=(0.5, 0.9))
    found = Search(budget.classes, **rule)
    steps = len(cuts(len(budget), batch_size))
    reached, norms = sums = torch.zeros(2, budget.classes, device=device)
    work = budget.resume(u=u, v=v, optimizer=optimizer, found=found, sums=sums)
    for number in work.each(range(epochs), "search"):
        if not found.active.any():
            break
        costs = torch.from_numpy(found.cost).to(device, torch.float32)
        for x, _ in work.each(batches(budget, batch_size, seed, number), f"pass {number}"):
            optimizer.zero_grad(set_to_none=True)
            for chunk in torch.from_numpy(np.flatnonzero(found.active)).to(device).split(together):
                m, p = unit(u[chunk]), unit(v[chunk])
                stamped = (1 - m[:, None]) * x + (m * p)[:, None]
                logits = model(stamped.flatten(0, 1)).float()
                targets = chunk.repeat_interleave(len(x))
                norm = m.flatten(1).norm(p=1, dim=1)
                entropy = F.cross_entropy(logits, targets, reduction="none").view(len(chunk), -1).mean(1)
                (entropy + costs[chunk] * norm).sum().backward(inputs=[u, v])
                reached[chunk] += (logits.argmax(1) == targets).view(len(chunk), -1).float().mean(1)
                norms[chunk] += norm.detach()
            optimizer.step()
        found.update((reached / steps).double().cpu().numpy(), (norms / steps).double().cpu().numpy(),
                     unit(u).detach(), unit(v).detach())
        sums.zero_()
    return found


@defence("nc")
def nc(victim, budget, rng, *, search_epochs=80, mask_lr=0.1, cost=1e-3, cost_factor=2.0, patience=5, success=0.98,
       stop_patience=25, threshold=2.0, share=0.2, epochs=100, lr=0.01, batch_size=256, momentum=0.9,
       weight_decay=5e-4, together=10):
    """Find triggers, and unlearn those of flagged classes; without any, the victim comes back unchanged.

    Args:
        search_epochs, mask_lr: of the search, by Adam with betas 0.5 and 0.9.
        cost, cost_factor, patience, success, stop_patience: rule for λ and for stopping early, see `Search`.
        threshold: anomaly index from which a small mask is flagged.
        share: of the images that carry the trigger, once for each flagged class.
        epochs, lr, batch_size, momentum, weight_decay: of the unlearning; 200 epochs on Tiny-ImageNet.
        together: classes sought in one forward pass; only memory depends on it.

    Returns:
        The model, and a history that begins with one row per class: norm of its mask, anomaly index, flagged or not.
    """
    model = budget.copy_of(victim)
    found = search(model, budget, int(rng.integers(2**62)), epochs=search_epochs, lr=mask_lr, batch_size=batch_size,
                   together=together, cost=cost, up=cost_factor, patience=patience, success=success,
                   stop_patience=stop_patience)
    norms = found.mask.double().flatten(1).sum(1).cpu().numpy()
    index = anomaly_index(norms)
    flagged = (index > threshold) & (norms <= np.median(norms))
    history = [{"stage": "search", "class": k, "mask_norm": float(norms[k]), "anomaly_index": float(index[k]),
                "reached": bool(np.isfinite(found.best[k])), "flagged": bool(flagged[k])} for k in range(len(norms))]
    if not flagged.any():
        return model, [*history, {"stage": "unlearn", "note": "no class is flagged: the victim is unchanged"}]

    order = rng.permutation(len(budget))
    clean, carriers = np.split(order, [int(len(budget) * (1 - share))])
    images, labels = [budget.images[clean]], [budget.labels[clean]]
    for k in np.flatnonzero(flagged):
        mask, pattern = (t[k].permute(1, 2, 0).cpu().numpy() for t in (found.mask, found.pattern))
        stamped = (1 - mask) * budget.images[carriers] + mask * pattern * 255
        images.append(np.clip(stamped, 0, 255).astype(np.uint8))
        labels.append(budget.labels[carriers])
    mixed = replace(budget, images=np.concatenate(images), labels=np.concatenate(labels))
    recipe = budget.recipe(epochs, lr, batch_size=batch_size, momentum=momentum, weight_decay=weight_decay)
    return model, history + stage("unlearn", train(model, mixed, recipe, rng, title="nc"))
