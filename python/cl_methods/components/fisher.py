"""How much a model's answers depend on each of its weights: the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods import ranks
from cl_methods.backbone import Backbone
from cl_methods.datasets.images import ImageSource, Subset
from cl_methods.datasets.loading import evaluation_batches


def fisher_diagonal(
    backbone: Backbone,
    parameters: Sequence[tuple[str, nn.Parameter]],
    source: ImageSource,
    texts: Tensor,
    *,
    samples: int,
    labels: str = "sampled",
) -> dict[str, Tensor]:
    """``F_i = 1/n Σ_x (∂ log p(y | x) / ∂θ_i)²`` with ``p = softmax(s f_θ(x) g_θ(c)ᵀ)``, one gradient for each image.

    Squaring the gradient of a batch would let the images cancel each other, so every image has its own backward pass; the texts
    go forward once for all of them. Draws from the global generators. Where several processes compute together, the images are
    dealt out to them and the squares added up.

    Args:
        backbone: the model, in any mode; it is left in evaluation mode.
        parameters: named parameters whose diagonal is wanted.
        source: images of the task; ``samples`` of them are drawn without replacement.
        texts: (C, L) trimmed token ids of the classes.
        samples: n, at most the number of images.
        labels: ``"sampled"``: y is drawn from p, which makes it the Fisher information; ``"true"``: y is the image's label (the
            empirical Fisher).

    Returns:
        A tensor of each parameter's shape, by name; zeros for parameters that the answers do not depend on.

    Raises:
        ValueError: ``labels`` is neither of the two, or there is no image.
        DataError: an image cannot be read.

    Source: Kirkpatrick et al., PNAS 2017; Kunstner et al., NeurIPS 2019, on why the labels are drawn.
    """
    if labels not in ("sampled", "true"):
        raise ValueError(f"labels: expected sampled or true, got {labels!r}")
    count = min(samples, len(source))
    if count < 1:
        raise ValueError(f"source: expected images to estimate the Fisher information from, got {count}")
    chosen = Subset(source, torch.randperm(len(source))[:count])
    values = [value for _, value in parameters]
    fisher = [torch.zeros_like(value) for value in values]
    backbone.model.eval()
    mine = ranks.dealt(count)
    with torch.enable_grad(), ranks.alone():
        classes = backbone.encode_texts(texts, trimmed=True)
        scale = backbone.logit_scale.detach()
        batches = evaluation_batches(
            chosen, backbone.eval_transform, batch_size=1, device=backbone.device, batches=mine
        )
        for number in range(count):
            if number not in mine:
                if labels == "sampled":  # what the image's process draws here
                    torch.multinomial(classes.new_ones(1, len(classes)), 1)
                continue
            image, label = next(batches)
            log_likelihood = F.log_softmax(scale * backbone.encode_images(image) @ classes.T, dim=-1)
            if labels == "sampled":
                label = torch.multinomial(log_likelihood.detach().exp(), 1).squeeze(1)
            gradients = torch.autograd.grad(
                F.nll_loss(log_likelihood, label), values, retain_graph=True, allow_unused=True
            )
            used = [(total, one) for total, one in zip(fisher, gradients, strict=True) if one is not None]
            totals, squares = [total for total, _ in used], [one for _, one in used]
            torch._foreach_addcmul_(totals, squares, squares, value=1 / count)
    ranks.sum_(fisher)
    return {name: total for (name, _), total in zip(parameters, fisher, strict=True)}
