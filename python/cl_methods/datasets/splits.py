"""Splits and few-shot draws that depend on nothing but sorted lists and seeds."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from cl_methods.seeding import derive_seed

ZSCL_SEED, ZSCL_FRACTION = 42, 0.8


def zscl_split(count: int) -> tuple[Tensor, Tensor]:
    """Positions for training and for testing of a dataset that comes without a split.

    ZSCL's rule, 80 % and 20 % by ``torch.utils.data.random_split`` with a generator seeded 42, over a sorted list of files; the
    public code leaves SUN397 in the order of the file system, so its split of that dataset differs from machine to machine.

    Args:
        count: N, the number of images.

    Returns:
        (⌊0.8 N⌋,) and (N − ⌊0.8 N⌋,) int64, in the order drawn.

    Source: Zheng et al., "Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models", 2023,
    public code.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(ZSCL_SEED))
    training = int(ZSCL_FRACTION * count)
    return order[:training], order[training:]


def set_aside(labels: Tensor, fraction: float, *key: int | str) -> tuple[Tensor, Tensor]:
    """Split off a share of every class.

    Args:
        labels: (N,) int64.
        fraction: of each class; rounded, and at least one image stays.
        key: seed, dataset and purpose: with the class, all that the draw depends on.

    Returns:
        Positions (M,) that stay and (N − M,) that are set aside, int64, each sorted.
    """
    aside = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(1)
        count = min(round(fraction * len(members)), len(members) - 1)
        generator = torch.Generator().manual_seed(derive_seed(*key, label))
        aside.append(members[torch.randperm(len(members), generator=generator)[:count]])
    taken = torch.cat(aside).sort().values if aside else torch.empty(0, dtype=torch.int64)
    stays = torch.ones(len(labels), dtype=torch.bool)
    stays[taken] = False
    return stays.nonzero().squeeze(1), taken


def first_shots(labels: Tensor, shots: int, *key: int | str) -> Tensor:
    """The first ``shots`` images of every class met in one shuffled pass: how MoE-Adapters draws its 5-shot tasks.

    Args:
        labels: (N,) int64.
        shots: images per class; a class with fewer gives all it has.
        key: seed and dataset, all that the shuffling depends on.

    Returns:
        Positions in the order met, int64.

    Source: Yu et al., "Boosting Continual Learning of Vision-Language Models via Mixture-of-Experts Adapters", 2024, public code.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(*key)))
    met: dict[int, int] = {}
    chosen = []
    for position in order.tolist():
        label = int(labels[position])
        if met.get(label, 0) < shots:
            met[label] = met.get(label, 0) + 1
            chosen.append(position)
    return torch.tensor(chosen, dtype=torch.int64)


def coop_shots(labels: Tensor, shots: int, generator: random.Random) -> Tensor:
    """``shots`` images of every class, class by class in order of appearance: CoOp's draw, with Python's generator.

    Called for training and then for validation images with one ``random.Random(seed)``, it draws what CoOp draws with that seed.

    Args:
        labels: (N,) int64, in the order of the split file.
        shots: images per class; a class with fewer gives all it has.
        generator: is advanced.

    Returns:
        Positions, int64.

    Source: Zhou et al., "Learning to Prompt for Vision-Language Models", 2022, public code.
    """
    members: dict[int, list[int]] = {}
    for position, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(position)
    chosen: list[int] = []
    for each in members.values():
        chosen += generator.sample(each, shots) if len(each) >= shots else each
    return torch.tensor(chosen, dtype=torch.int64)
