"""Penultimate features of clean and triggered images: what FST says is entangled at low poison rates."""

import numpy as np
import torch

from cupel.training.augment import to_pixels
from cupel.training.engine import upload


@torch.inference_mode()
def penultimate(model, images: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """Features float32 [N, d] of uint8 images [N, H, W, C], in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model.features(to_pixels(upload(images[k : k + batch_size], device))).float().cpu()
                      for k in range(0, len(images), batch_size)]).numpy()


def entanglement(clean: np.ndarray, labels: np.ndarray, triggered: np.ndarray, true: np.ndarray, target: int, *,
                 neighbours: int = 10) -> dict[str, float]:
    """Among whom triggered images lie: shares of their nearest clean images (cosine) that are of the target class, and
    of their own true class.

    Args:
        clean: float [N, d]; labels: int [N].
        triggered: float [M, d]; true: int [M], true labels.
    """
    unit = clean / np.linalg.norm(clean, axis=1, keepdims=True).clip(1e-12)
    near = np.argsort(-(triggered @ unit.T), axis=1)[:, :neighbours]
    found = labels[near]
    return {"target": float((found == target).mean()), "true": float((found == true[:, None]).mean())}


def project(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE map float [N, 2] after PCA to at most 30 dimensions."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    reduced = PCA(min(30, *features.shape), random_state=seed).fit_transform(features)
    return TSNE(init="pca", perplexity=min(30, len(features) // 4), max_iter=300, random_state=seed).fit_transform(reduced)
