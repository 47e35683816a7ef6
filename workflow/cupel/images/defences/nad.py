"""Neural Attention Distillation (Li et al., ICLR 2021); ims SPEC 7, fst SPEC 7.

    teacher: the victim, fine-tuned;    student: the victim, trained with   CE + Σ_l β_l · MSE(A(F_l), A(F_l^teacher))
    A(F) = a / ‖a‖₂  with  a = Σ_c |F_c|^p,      a map [h, w] for each image

F_l are the outputs of `victim.stages`: the last three stages of the residual networks, the last feature map of the
others. The released code takes its third level on PreActResNet18 behind the global pooling, where the map has one pixel
and A is constantly 1, so the term vanishes; here the third level is a real map. `betas=(500, 1000, 0)` gives the
released objective.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.images.defences.base import defence
from cupel.images.defences.passes import stage, train, watched


def attention(features: Tensor, p: float) -> Tensor:
    """Normalised attention maps, float [B, h, w], of features [B, c, h, w]."""
    maps = features.abs().pow(p).sum(1)
    return maps / (maps.flatten(1).norm(dim=1)[:, None, None] + 1e-6)


def distance(student: dict, teacher: dict, betas: dict, p: float) -> Tensor:
    """Σ_l β_l · MSE of attention maps; the three dicts have the same keys."""
    return sum(beta * F.mse_loss(attention(student[name].float(), p), attention(teacher[name].float(), p))
               for name, beta in betas.items())


@defence("nad")
def nad(victim, budget, rng, *, betas=(500.0, 1000.0, 1000.0), p=2.0, teacher_epochs=10, epochs=10, lr=0.01,
        batch_size=256, momentum=0.9, weight_decay=5e-4):
    """Attention distillation.

    Args:
        betas: weights of the levels, from early to late; a network with fewer stages takes the last ones.
        p: exponent of the attention.
        teacher_epochs, epochs: of the teacher's tuning (cosine with the released period of 100) and of the
            distillation (constant learning rate).
        lr, batch_size, momentum, weight_decay: of both.
    """
    settings = {"batch_size": batch_size, "momentum": momentum, "weight_decay": weight_decay}
    teacher = budget.copy_of(victim)
    budget.resume(teacher=teacher)
    history = stage("teacher", train(teacher, budget, budget.recipe(teacher_epochs, lr, t_max=100, **settings), rng,
                                     title="nad teacher"))
    model = budget.copy_of(victim)
    levels = dict(zip(reversed(model.stages), reversed(betas), strict=False))

    def objective(student, x, y):
        wanted, found = {}, {}
        with watched({name: teacher.get_submodule(name) for name in levels}, wanted.__setitem__), torch.no_grad():
            teacher(x)
        with watched({name: student.get_submodule(name) for name in levels}, found.__setitem__):
            logits = student(x)
        return F.cross_entropy(logits, y) + distance(found, wanted, levels, p), logits

    recipe = budget.recipe(epochs, lr, schedule="constant", **settings)
    return model, history + stage("distil", train(model, budget, recipe, rng, objective=objective, title="nad"))
