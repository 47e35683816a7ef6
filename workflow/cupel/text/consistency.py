"""CROW's objective: the language-model loss plus the inconsistency of consecutive layers (crow SPEC 2; eq. 3-6).

    L_total = L_LM(clean) + α · L_cons(H_adv⁰),    H_adv⁰ = H⁰ + ε · sign(∇_{H⁰} L_cons(H⁰))

H⁰ are the input embeddings, H¹..H^N the outputs of the N decoder blocks, L_cons the mean over pairs of neighbouring
states and over tokens of 1 − cos(H^{l+1}, H^l). H^N is taken before the final norm: the paper defines it as the output of
the last block. The `hidden_states` of transformers hold the normed state instead (the norm's weights change cosines);
the released code leaves that last one out, so no variant ever uses it.

Batches are right-padded and no attention mask is ever passed. Attention is causal, so padding changes no real token, and
the states at padding positions are those the released code averages. One clean pass therefore serves L_LM and the
gradient for the perturbation: a step is two forward and three backward passes instead of three and three. In half
precision the adapters stay float32 and run under autocast; states are compared in float32, because 1 − cos of
neighbouring layers is smaller than what bf16 resolves next to 1.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.choices import check_choices
from cupel.text.layers import blocks, captured, causal_lm
from cupel.training.engine import autocast


@dataclass(frozen=True)
class Consistency:
    """The second term of the objective.

    Attributes:
        alpha: its weight; the paper has 5.5, 11 for targeted refusal, and 0.1 for the KL distance (crow SPEC 7, 2.4).
        epsilon: size of the perturbation per coordinate; 0.1.
        unit: of epsilon: `absolute`; or `rms`, the root mean square of the model's embeddings, which differs between models
            (crow SPEC 11.3). The objective takes it absolute: `crow` converts it.
        perturbation: `real` (eq. 5); `zero`, which is what the released trainer computes and also the paper's Pure
            Consistency: values and gradients are the same (crow SPEC 10.1); `random_sign`, ±ε without a gradient.
        pairs: `paper` (1,2)..(N−1,N), N−1 pairs; `code` (1,2)..(N−2,N−1), N−2 pairs; `embeddings` (0,1)..(N−1,N).
        distance: `cosine`, or `kl` of softmaxed states (Table 7).
        padding: `masked`, the mean is over tokens; `included`, as the code, over padding positions too.
        term: `layers`; or `embedding`, the embedding-only ablation of Table 11, read as 1 − cos between perturbed and
            clean embeddings. It has no gradient to anything but the embeddings, which LoRA leaves frozen, so that the
            training is plain fine-tuning.
    """

    alpha: float = 5.5
    epsilon: float = 0.1
    perturbation: Literal["real", "zero", "random_sign"] = "real"
    pairs: Literal["paper", "code", "embeddings"] = "paper"
    distance: Literal["cosine", "kl"] = "cosine"
    padding: Literal["masked", "included"] = "masked"
    term: Literal["layers", "embedding"] = "layers"
    unit: Literal["absolute", "rms"] = "absolute"

    def __post_init__(self):
        check_choices(self)


def pair_indices(pairs: str, count: int) -> list[tuple[int, int]]:
    """Pairs (l, l+1) of states that are compared in a model of `count` blocks.

    Raises:
        ValueError: too few blocks for a single pair.
    """
    ends = {"paper": (1, count), "code": (1, count - 1), "embeddings": (0, count)}
    found = [(k, k + 1) for k in range(*ends[pairs])]
    if not found:
        raise ValueError(f"pairs {pairs!r} of a model with {count} blocks are none: it needs more blocks")
    return found


def _prepared(state: Tensor, distance: str) -> Tensor:
    """What two states are compared by: unit vectors, or log-probabilities over the coordinates."""
    if distance == "cosine":
        return F.normalize(state.float(), dim=-1, eps=1e-8)
    p = state.float().softmax(-1).clamp_min(1e-6)
    return (p / p.sum(-1, keepdim=True)).log()


def inconsistency(states: list[Tensor], pairs: list[tuple[int, int]], distance: str = "cosine") -> Tensor:
    """Mean over `pairs` of the distance between two states of a token, float32 [B, T].

    Args:
        states: H⁰..H^N, each [B, T, d].
        pairs: as from :func:`pair_indices`.
        distance: `cosine`, 1 − cos with norms clamped at 1e-8; `kl`, KL(P^{l+1} ‖ P^l) in nats, P the softmax over the d
            coordinates, clamped at 1e-6 and renormalised (crow SPEC 2.4).
    """
    ready = {k: _prepared(states[k], distance) for k in {k for pair in pairs for k in pair}}
    total = 0.0
    for lower, upper in pairs:
        a, b = ready[lower], ready[upper]
        total = total + (1 - (a * b).sum(-1) if distance == "cosine" else (b.exp() * (b - a)).sum(-1))
    return total / len(pairs)


def weigh(batch: dict[str, Tensor], padding: str = "masked", group: Tensor | None = None,
          multiple: int = 8) -> dict[str, Tensor]:
    """Add the weights that make both losses plain weighted sums over positions.

    The loss of an update is the mean over its groups (the batches of the paper's accumulation) of a mean over the tokens
    of the group. With the weights of a whole update at hand, its rows can be computed in passes of any size.

    Args:
        batch: `input_ids`, `attention_mask`, `labels` (−100: not trained on), int64 [B, T], right-padded.
        padding: see :class:`Consistency`.
        group: int64 [B], which group a row belongs to; None: one group.
        multiple: a group is padded to its longest row, rounded up to this (only `included` counts that padding).

    Returns:
        The batch with `lm_weight` and `cons_weight`, float32 [B, T]; `lm_weight` is at the position of the predicted
        token. A group without any label has no weight in L_LM.
    """
    mask, labels = batch["attention_mask"].bool(), batch["labels"]
    group = torch.zeros(len(mask), dtype=torch.int64) if group is None else group
    labelled = labels != -100
    labelled[:, 0] = False  # nothing predicts the first token
    lm, cons = torch.zeros(mask.shape), torch.zeros(mask.shape)
    groups = group.unique()
    for number in groups:
        rows = group == number
        counted = mask[rows]
        if padding == "included":
            width = -(-int(counted.sum(1).max()) // multiple) * multiple
            counted = (torch.arange(mask.shape[1]) < width).expand(counted.shape)
        lm[rows] = labelled[rows] / labelled[rows].sum().clamp_min(1)
        cons[rows] = counted / counted.sum().clamp_min(1)
    return {**batch, "lm_weight": lm / len(groups), "cons_weight": cons / len(groups)}


def _cast(model: nn.Module) -> contextlib.AbstractContextManager:
    """Products in the precision of the model's weights."""
    embedding = causal_lm(model).get_input_embeddings().weight
    return autocast("fp32" if embedding.dtype == torch.float32 else "bf16", embedding.device)


def _lm(model: nn.Module, batch: dict[str, Tensor], **inputs: Tensor) -> Tensor:
    """L_LM. The head, the most expensive layer of a small model, runs only on tokens before one with a label."""
    inner, labelled = causal_lm(model), batch["lm_weight"] > 0
    with _cast(model):
        states = inner.get_decoder()(**inputs, use_cache=False).last_hidden_state
        logits = inner.get_output_embeddings()(states[:, :-1][labelled[:, 1:]])
    loss = F.cross_entropy(logits.float(), batch["labels"][labelled], reduction="none")
    return (loss * batch["lm_weight"][labelled]).sum()


def direction(found: Tensor, embeddings: Tensor, counted: Tensor) -> Tensor:
    """sign(∇_{H⁰} L_cons), [B, T, d] of ±1 (0 where the gradient is exactly 0), without a graph; the clean graph is kept.

    Of the inconsistency of the clean pass [B, T], H⁰ as given to the model, requiring gradients, [B, T, d], and the positions
    in the mean, bool [B, T]. The gradient is that of the sum over positions: the signs are the same as those of the mean,
    and it does not underflow to zeros in low precision.
    """
    return torch.autograd.grad((found * counted).sum(), embeddings, retain_graph=True)[0].sign()


def parts(model: nn.Module, batch: dict[str, Tensor], settings: Consistency | None = None,
          noise: Tensor | None = None) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The objective in parts, each with a graph of its own that may be freed before the next part is computed.

    Args:
        model: causal language model, plain or with adapters.
        batch: as from :func:`weigh`, on the model's device.
        settings: of the consistency term; None: the language-model loss alone.
        noise: [B, T, d] of ±1, for `random_sign`.

    Yields:
        (loss, values): the objective is the sum of the losses. The values, detached scalars: `loss_lm`, `loss_cons` (of
        the perturbed embeddings, without α) and, where it was computed on the way, `loss_cons_clean`.
    """
    if settings is None:
        loss = _lm(model, batch, input_ids=batch["input_ids"])
        yield loss, {"loss_lm": loss.detach()}
        return
    pairs, weight = pair_indices(settings.pairs, len(blocks(model))), batch["cons_weight"]
    embed = causal_lm(model).get_input_embeddings()
    embeddings = embed(batch["input_ids"])
    point = embeddings if embeddings.requires_grad else embeddings.detach().requires_grad_(settings.perturbation == "real")

    def consistency(states: list[Tensor]) -> Tensor:
        return (inconsistency(states, pairs, settings.distance) * weight).sum()

    with captured(model) as states:
        lm = _lm(model, batch, inputs_embeds=point)
    values = {"loss_lm": lm.detach()}
    if settings.perturbation == "real":
        found = inconsistency(states, pairs, settings.distance)
        values["loss_cons_clean"] = (found * weight).sum().detach()
        move = direction(found, point, weight > 0)
        del found
    else:
        move = torch.zeros_like(embeddings) if settings.perturbation == "zero" else noise.to(embeddings.dtype)
    if settings.term == "embedding":
        adversarial = embeddings + settings.epsilon * move
        penalty = ((1 - F.cosine_similarity(adversarial.float(), embeddings.float(), dim=-1, eps=1e-8)) * weight).sum()
    elif settings.perturbation == "zero":
        penalty = consistency(states)  # the perturbed pass would be this very pass
    else:
        states.clear()
        yield lm, values
        del lm, point, embeddings
        values = {}
        with captured(model) as states, _cast(model):
            causal_lm(model).get_decoder()(use_cache=False, inputs_embeds=embed(batch["input_ids"]) + settings.epsilon * move)
        lm, penalty = 0.0, consistency(states)
    yield lm + settings.alpha * penalty, {**values, "loss_cons": penalty.detach()}
