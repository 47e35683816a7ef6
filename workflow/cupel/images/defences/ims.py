"""Invertible Masking using Selection (Dunnett et al., NeurIPS 2025), Algorithm 1; ims SPEC 2.

Every convolution gets two vectors over its output channels, a mask a and a selection s, both in [0, 1]. With the
sharpened sigmoid g(u) = 1/(1 + exp(−k(u − ½))) they define two networks at once (Eqs. 1 and 2):

    forward mask   m  = g(a)     + s·(1 − g(a))          keeps the clean task, loses the backdoor
    inverse mask   mi = g(1 − a) + s·(1 − g(1 − a))      loses the clean task, keeps the backdoor

s = 1 is a channel shared by both. m and mi scale the outputs of the convolutions, before BatchNorm. f is the victim,
f_m and f_mi are the masked networks, all in eval mode; P(u, v) is the inner product of two softmax outputs:

    Agree(u, v) = mean −log(P + 1e-8)          Disagree(u, v) = mean −log(1 − P + 1e-8)

    stage I        min_{a,s} Agree(f_m(x), f(x)) + Disagree(f_mi(x), f(x)) + λ·mean|1 − s|                  (Eq. 4)
    inner problem  min_δ     Agree(f_mi(x+δ), f(x+δ)) + Disagree(f(x+δ), f(x)),  |δ| ≤ bound, one δ a sample (Eq. 5)
    outer problem  min_{a,s} Agree(f_m(x), f(x)) + Agree(f_m(x+δ), f(x)) + Agree(f_mi(x+δ), f(x+δ))
                             + Disagree(f_mi(x), f(x)) + Disagree(f_mi(x+δ), f(x)) + λ·mean|1 − s|       (Eqs. 6, 7)

Stages II (λ = 0) and III (λ as in stage I) alternate the inner and the outer problem, one outer step a round. Labels
are never used. The released program also computes perturbations in stage I and a forward-masked pass in every inner
step, and uses neither (ims SPEC 10.7); they are left out, and f(x) is computed once.

AdamW moves a pixel by about lr_perturb a step whatever its gradient, so |δ| ends near lr_perturb·steps_perturb = 0.02
and norm_bound = 1 never binds (ims SPEC 2.4). `flip_rate` in the history says whether such δ change the victim's
predictions at all; while they do not, the outer problem has no backdoor to suppress (ims SPEC 10.8 and 10.11).

The inner problem, nine tenths of the work, runs in the budget's precision, as far as that can see δ: bf16 resolves pixels to
1/256, so the convolution that reads pixels stays in float32. The δ that were found, and all else, are computed in float32.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from cupel.compat import ensure_torchvision
from cupel.images.defences.base import Budget, defence
from cupel.images.defences.masks import Channels, layers, write
from cupel.images.defences.passes import watched
from cupel.images.models.attachments import attach
from cupel.rng import torch_rng
from cupel.training.engine import autocast, predict, to_pixels, upload


@dataclass(frozen=True)
class Settings:
    """Hyperparameters; the defaults stand in the signatures of `ims` and `ims_vit`."""

    temperature: float
    l1_weight: float
    norm_bound: float
    lr_mask: float
    lr_perturb: float
    steps_perturb: int
    rounds_initial: int
    rounds_minimise: int
    patience: int
    improvement: float
    batch_size: int


def sharpened(u: torch.Tensor, temperature: float) -> torch.Tensor:
    """g(u), a sigmoid around ½."""
    return torch.sigmoid(temperature * (u - 0.5))


def forward_mask(a: torch.Tensor, s: torch.Tensor, temperature: float) -> torch.Tensor:
    """m, Eq. 1."""
    kept = sharpened(a, temperature)
    return kept + s * (1 - kept)


def inverse_mask(a: torch.Tensor, s: torch.Tensor, temperature: float) -> torch.Tensor:
    """mi, Eq. 2."""
    return forward_mask(1 - a, s, temperature)


def overlap(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """P(u, v) [B] of logits [B, K]."""
    return (u.softmax(1) * v.softmax(1)).sum(1)


def agree(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Agree(u, v) of logits [B, K]; gradients flow into both."""
    return -(overlap(u, v) + 1e-8).log().mean()


def disagree(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Disagree(u, v) of logits [B, K]; gradients flow into both."""
    return -(1 - overlap(u, v) + 1e-8).log().mean()


def followers(network: nn.Module) -> dict[str, str]:
    """Names of convolutions whose output is read by one BatchNorm and by nothing else, with its name.

    Seen in one pass over a blank image: what a graph of autograd holds is what was read, whatever the code looks like.
    """
    outputs, inputs = {}, {}
    norms = {name: module for name, module in network.named_modules()
             if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats}
    size, first = network.spec["image_size"], next(network.parameters())
    x = first.new_zeros(1, network.spec["in_channels"], size, size).requires_grad_()
    with (watched(layers(network, nn.Conv2d, "ims"), lambda name, tensor: outputs.update({name: tensor.grad_fn})),
          watched(norms, lambda name, tensor: inputs.update({tensor.grad_fn: name}), inputs=True)):
        todo = [network(x).grad_fn]
    uses, seen = Counter(), set(todo)
    while todo:
        for node, _ in todo.pop().next_functions:
            uses[node] += 1
            if node is not None and node not in seen:
                seen.add(node)
                todo.append(node)
    return {name: inputs[node] for name, node in outputs.items()
            if node in inputs and uses[node] == 1 and node.name().startswith("Convolution")}


def exact(convolution: nn.Conv2d) -> None:
    """Let a convolution compute in float32 under autocast too; its output has the type of autocast."""
    plain = convolution.forward

    def forward(x):
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return plain(x)
        with torch.autocast(kind, enabled=False):
            return plain(x.float()).to(torch.get_autocast_dtype(kind))

    convolution.forward = forward


class ConvolutionMasks:
    """Masks on the output channels of all Conv2d layers: stem, shortcuts, depthwise and squeeze-excitation included.

    Passes with gradients run through `lean`, the victim without the BatchNorms that follow a convolution. In eval mode these
    are a factor, which `lean` has in its weights, and a `shift` [C_l, 1, 1], which comes after the mask.

    Two ways to the same masked network. `fixed` multiplies weights once, after which a pass costs less than the victim's: for
    the inner problem, 40 of a round's 44 passes with gradients. `__call__` multiplies the outputs: for gradients with respect
    to the mask, where weights would need the weight gradient of every convolution, which is slow for depthwise ones.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.convolutions = layers(network, nn.Conv2d, "ims")
        self.channels = Channels(tuple(self.convolutions), tuple(c.out_channels for c in self.convolutions.values()))
        pairs = followers(network)
        self.lean = copy.deepcopy(network, {id(p): p for p in network.parameters()}).requires_grad_(False)
        self.lean_convolutions = layers(self.lean, nn.Conv2d, "ims")
        self.shift, self.readers = {}, []
        for name, convolution in self.lean_convolutions.items():
            if convolution.in_channels == network.spec["in_channels"]:
                exact(convolution)
                self.readers += [f"{name}.weight", f"{name}.bias"]
            self.shift[name] = convolution.weight.new_zeros(convolution.out_channels, 1, 1)
            if name in pairs:
                norm = network.get_submodule(pairs[name])
                factor = (norm.weight * (norm.running_var + norm.eps).rsqrt()).detach()
                self.shift[name] = (norm.bias - norm.running_mean * factor).detach().view(-1, 1, 1)
                convolution.weight = nn.Parameter(convolution.weight * factor.view(-1, 1, 1, 1), requires_grad=False)
                if convolution.bias is not None:
                    convolution.bias = nn.Parameter(convolution.bias * factor, requires_grad=False)
                self.lean.set_submodule(pairs[name], nn.Identity())

    def folded(self, scale: torch.Tensor, convolutions: dict[str, nn.Conv2d] | None = None) -> dict[str, torch.Tensor]:
        """Weights and biases times `scale` [N], by name in the state_dict; of the victim's convolutions, or those of `lean`."""
        tensors, convolutions = {}, convolutions or self.convolutions
        for name, part in self.channels.split(scale).items():
            convolution = convolutions[name]
            tensors[f"{name}.weight"] = convolution.weight * part.view(-1, 1, 1, 1)
            if convolution.bias is not None:
                tensors[f"{name}.bias"] = convolution.bias * part
        return tensors

    @torch.no_grad()
    def fixed(self, scale: torch.Tensor, precision: str = "fp32") -> Callable[[torch.Tensor], torch.Tensor]:
        """The network with all channels scaled by `scale` [N], without gradients for it: pixels to logits, of one type."""
        tensors = self.folded(scale, self.lean_convolutions)
        for name, shift in self.shift.items():
            tensors[f"{name}.bias"] = tensors.get(f"{name}.bias", 0) + shift.flatten()
        if precision == "bf16":    # once, where autocast would do it in every pass
            tensors = {name: t if name in self.readers else t.bfloat16() for name, t in tensors.items()}

        def logits(x):
            with autocast(precision, x.device):
                return functional_call(self.lean, tensors, (x,)).to(x.dtype)

        return logits

    def __call__(self, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of pixels x [B, C, H, W] with all channels scaled by `scale` [N]."""
        parts = self.channels.split(scale)

        def scaled(name, output):
            return torch.addcmul(self.shift[name], output, parts[name].view(-1, 1, 1))

        with watched(self.lean_convolutions, scaled):
            return self.lean(x)

    def finish(self, scale: torch.Tensor) -> None:
        """Leave the network with `scale` multiplied into its weights and biases."""
        write(self.network, self.folded(scale))


class EncoderMasks:
    """Masks on the outputs [B, T, E] of torchvision's encoder blocks, the same for all samples and tokens (ims SPEC 2.7).

    A mask cannot be multiplied into the block's weights: it also scales the residual stream, which the block only adds
    to, and the next block's LayerNorm mixes the scaled features. So it stays, as an attachment of kind `scale`.
    """

    def __init__(self, network: nn.Module):
        ensure_torchvision()
        from torchvision.models.vision_transformer import EncoderBlock

        self.blocks = {name: module for name, module in network.named_modules() if isinstance(module, EncoderBlock)}
        if not self.blocks:
            raise ValueError("ims_vit masks the encoder blocks of a vision transformer (vit_b_16), and this network "
                             "has none; ims masks convolutions")
        self.network = network
        self.channels = Channels(tuple(self.blocks), tuple(b.ln_1.normalized_shape[0] for b in self.blocks.values()))
        self.first = len(network.attachments)
        for (name, block), features in zip(self.blocks.items(), self.channels.sizes, strict=True):
            attach(network, "scale", name, (features,))
            # two graphs of 256 images through ViT-B/16 at 224 pixels do not fit into one GPU
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def folded(self, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """The factors of the attachments, by name in the state_dict."""
        return {f"attachments.{number}.factor": part
                for number, part in enumerate(self.channels.split(scale).values(), self.first)}

    def fixed(self, scale: torch.Tensor, precision: str = "fp32") -> Callable[[torch.Tensor], torch.Tensor]:
        """As that of `ConvolutionMasks`, but in float32 always: the first block's input is not known to be exact enough."""
        return partial(self, scale.detach())

    def __call__(self, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of pixels x [B, C, H, W] with all features scaled by `scale` [N]."""
        return functional_call(self.network, self.folded(scale), (x,))

    def finish(self, scale: torch.Tensor) -> None:
        """Leave the network with `scale`."""
        write(self.network, self.folded(scale))
        for block in self.blocks.values():
            del block.forward


def perturb(reference, inverse, x: torch.Tensor, clean: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The inner problem: one δ per sample, from zero, in pixel space; x + δ is not clipped.

    Args:
        reference, inverse: f and f_mi, pixels to logits.
        x: pixels [B, C, H, W].
        clean: f(x) [B, K].
        settings: of these `norm_bound`, elementwise, of δ; and `lr_perturb` and `steps_perturb` of AdamW (weight decay 0.01).

    Returns:
        δ [B, C, H, W], and the two terms of the objective before the last step, [2].
    """
    delta = torch.zeros_like(x, requires_grad=True)
    optimizer = torch.optim.AdamW([delta], settings.lr_perturb, weight_decay=0.01)
    terms = torch.zeros(2, device=x.device)
    for _ in range(settings.steps_perturb):
        optimizer.zero_grad(set_to_none=True)
        z = x + delta
        answer = reference(z)
        parts = agree(inverse(z), answer), disagree(answer, clean)
        sum(parts).backward()
        optimizer.step()
        with torch.no_grad():
            delta.clamp_(-settings.norm_bound, settings.norm_bound)
        terms = torch.stack(parts).detach()
    return delta.detach(), terms


class Refinement:
    """a and s, and steps on them."""

    def __init__(self, masked: ConvolutionMasks | EncoderMasks, settings: Settings, device: torch.device | str):
        self.masked, self.settings = masked, settings
        self.a, self.s = (torch.ones(masked.channels.total, device=device, requires_grad=True) for _ in range(2))

    def masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """m and mi [N]."""
        return tuple(mask(self.a, self.s, self.settings.temperature) for mask in (forward_mask, inverse_mask))

    def state_dict(self) -> dict:
        return {"a": self.a.detach(), "s": self.s.detach(), "optimizer": self.optimizer.state_dict(), "best": self.best,
                "waited": self.waited}

    def load_state_dict(self, state: dict) -> None:
        with torch.no_grad():
            self.a.copy_(state["a"])
            self.s.copy_(state["s"])
        self.new_stage()
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.waited = state["best"], state["waited"]

    def new_stage(self) -> None:
        """A fresh optimiser; a and s carry over."""
        self.optimizer = torch.optim.AdamW([self.a, self.s], self.settings.lr_mask, weight_decay=0.01)
        self.best, self.waited = math.inf, 0

    def step(self, forward_terms: list, inverse_terms: list, weight: float) -> dict[str, float]:
        """One AdamW step, then back into [0, 1].

        Each pass goes backward on its own as far as the mask, so that the graph of one pass at a time is kept.

        Args:
            forward_terms, inverse_terms: (x, [(name, logits → loss), ...]) for f_m and for f_mi.
            weight: λ.

        Returns:
            Every term of the loss by name, before the step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        found, masks = {}, self.masks()
        leaves = [mask.detach().requires_grad_() for mask in masks]
        for leaf, passes in zip(leaves, (forward_terms, inverse_terms), strict=True):
            for x, losses in passes:
                logits = self.masked(leaf, x)
                parts = {name: loss(logits) for name, loss in losses}
                sum(parts.values()).backward()
                found |= {name: part.detach() for name, part in parts.items()}
        sparsity = weight * (1 - self.s).abs().mean()
        torch.autograd.backward([*masks, sparsity], [*(leaf.grad for leaf in leaves), None])
        self.optimizer.step()
        with torch.no_grad():
            self.a.clamp_(0, 1)
            self.s.clamp_(0, 1)
        found["sparsity"] = sparsity.detach()
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))

    def finished(self, loss: float) -> bool:
        """Early stop: more than `patience` rounds in a row without `loss < improvement·best`."""
        if loss < self.settings.improvement * self.best:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return self.waited > self.settings.patience

    def shares(self) -> dict[str, float]:
        """Shares of selected (s < ½) and of pruned (m < ½) channels."""
        return {"selected": float((self.s < 0.5).float().mean()),
                "pruned": float((self.masks()[0] < 0.5).float().mean())}


def _purify(kind, victim, budget: Budget, rng, settings: Settings):
    network = budget.copy_of(victim).to(memory_format=torch.channels_last).eval()
    trainable = [p for p in network.parameters() if p.requires_grad]
    clean = torch.from_numpy(predict(network, budget.images, device=budget.device)).to(budget.device)
    masked = kind(network)
    network.requires_grad_(False)
    state = Refinement(masked, settings, budget.device)
    images = upload(budget.images, budget.device)
    generator = torch_rng(int(rng.integers(2**62)), "order")
    stages = (("I", settings.rounds_initial, settings.l1_weight), ("II", settings.rounds_minimise, 0.0),
              ("III", settings.rounds_minimise, settings.l1_weight))
    whole = torch.ones_like(state.a)
    reference, quick = masked.fixed(whole), masked.fixed(whole, budget.precision)
    history, ends = [], {}
    work = budget.resume(masks=state, order=generator, history=history, ends=ends)
    for stage, rounds, weight in stages:
        for number in work.each(range(1, rounds + 1), stage, lambda: f"pruned {100 * history[-1]['pruned']:.0f} %"):
            if number == 1:
                state.new_stage()
            index = torch.randperm(len(images), generator=generator)[: settings.batch_size].to(images.device)
            x, y = to_pixels(images[index]), clean[index]
            row = {"stage": stage, "round": number}
            on_clean = (x, [("agree_clean", partial(agree, v=y))])
            inverse_clean = (x, [("disagree_clean", partial(disagree, v=y))])
            if stage == "I":
                losses = state.step([on_clean], [inverse_clean], weight)
            else:
                delta, inner = perturb(quick, masked.fixed(state.masks()[1], budget.precision), x, y, settings)
                z = x + delta
                with torch.no_grad():
                    answer = reference(z)
                on_perturbed = (z, [("agree_perturbed", partial(agree, v=y))])
                inverse_perturbed = (z, [("agree_inverse", partial(agree, v=answer)),
                                         ("disagree_perturbed", partial(disagree, v=y))])
                losses = state.step([on_clean, on_perturbed], [inverse_perturbed, inverse_clean], weight)
                row |= {"inner_agree": float(inner[0]), "inner_disagree": float(inner[1]),
                        "flip_rate": float((answer.argmax(1) != y.argmax(1)).float().mean()),
                        "max_delta": float(delta.abs().max())}
            row |= {"loss": sum(losses.values()), **losses, **state.shares()}
            history.append(row)
            if state.finished(row["loss"]):
                work.end(stage)
                break
        ends.setdefault(stage, state.masks()[0].detach())
    *between, final = ends.values()
    for number, mask in enumerate(between, 1):
        budget.snapshot(f"stage_{number}", masked.folded(mask))
    masked.finish(final)
    for parameter in trainable:
        parameter.requires_grad_(True)
    layers_of = [masked.channels.split(t.detach().cpu()) for t in (state.a, state.s, final)]
    return network, history, {name: tuple(part[name] for part in layers_of) for name in masked.channels.names}


@defence("ims")
def ims(victim, budget, rng, *, temperature=20.0, l1_weight=10.0, norm_bound=1.0, lr_mask=0.02, lr_perturb=0.001,
        steps_perturb=20, rounds_initial=100, rounds_minimise=200, patience=25, improvement=0.98, batch_size=256):
    """IMS on the convolutions, as released: the last masks m, soft, multiplied into weights and biases; no tuning.

    Args:
        temperature: k of g.
        l1_weight: λ of stages I and III.
        norm_bound: bound of |δ| in pixels of [0, 1].
        lr_mask: of AdamW on a and s (weight decay 0.01).
        lr_perturb, steps_perturb: of AdamW on δ (weight decay 0.01); their product is the size δ really reaches.
        rounds_initial, rounds_minimise: most rounds of stage I, and of II and III each.
        patience, improvement: a stage ends after more than `patience` rounds in a row whose loss is not below
            `improvement` times the best so far; the last masks are kept, not the best.
        batch_size: of a round, drawn without replacement; all samples where there are fewer.

    The history has one row a round: stage, round, loss and its terms (before the step), shares of selected (s < ½) and
    pruned (m < ½) channels (after it), and from stage II on the two inner terms, `max_delta` (largest |δ|) and
    `flip_rate` (share of samples whose predicted class under f is changed by δ). What is kept of a run are `a:`, `s:` and
    `m:` with the name of every convolution, each float32 [C_l].

    Raises:
        ValueError: the network has no convolutions.
    """
    settings = Settings(temperature, l1_weight, norm_bound, lr_mask, lr_perturb, steps_perturb, rounds_initial,
                        rounds_minimise, patience, improvement, batch_size)
    network, history, masks = _purify(ConvolutionMasks, victim, budget, rng, settings)
    for name, (a, s, m) in masks.items():
        budget.keep(**{f"a:{name}": a.numpy(), f"s:{name}": s.numpy(), f"m:{name}": m.numpy()})
    return network, history


@defence("ims_vit")
def ims_vit(victim, budget, rng, *, temperature=20.0, l1_weight=0.0, norm_bound=1.0, lr_mask=0.02, lr_perturb=0.001,
            steps_perturb=20, rounds_initial=100, rounds_minimise=200, patience=25, improvement=0.98, batch_size=256):
    """IMS on the encoder blocks of a vision transformer: as `ims`, but λ is 0 throughout (ims SPEC 2.7).

    The returned network has the victim's weights and, behind each block, an attachment of kind `scale` whose frozen
    factor is the mask (`cupel.images.models.attachments`); `cupel.images.models.save` and `load` keep them.

    Raises:
        ValueError: the network is no torchvision vision transformer.
    """
    settings = Settings(temperature, l1_weight, norm_bound, lr_mask, lr_perturb, steps_perturb, rounds_initial,
                        rounds_minimise, patience, improvement, batch_size)
    return _purify(EncoderMasks, victim, budget, rng, settings)[:2]
