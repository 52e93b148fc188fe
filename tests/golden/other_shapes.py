"""Reference values in other shapes, from the published formulas in float64: what another folder for ``CL_GOLDEN_DIR`` may hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F


def save(folder: Path, name: str, tensors: dict[str, Tensor], **metadata: Any) -> None:
    """Floating point in float32; metadata as JSON strings."""
    stored = {key: (value.float() if value.is_floating_point() else value) for key, value in tensors.items()}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    save_file(
        {key: value.detach().contiguous() for key, value in stored.items()}, folder / f"{name}.safetensors", texts
    )


def numbers(*shape: int, scale: float = 1.0) -> Tensor:
    """Random numbers that float32 holds exactly."""
    return (scale * torch.randn(*shape, dtype=torch.float64)).float().double()


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def ranpac(folder: Path, width: int = 60, sizes: tuple[int, ...] = (5, 3, 3)) -> None:
    """Ridge heads over three tasks; the ridge from its grid by the error on the last fifth of each task."""
    classes, projection = sum(sizes), numbers(17, width)
    centres, identity = numbers(classes, 17), torch.eye(width, dtype=torch.float64)
    test = (centres[torch.randint(classes, (9,))] + numbers(9, 17, scale=0.8)).float().double()
    gram, prototypes = torch.zeros_like(identity), torch.zeros(width, classes, dtype=torch.float64)
    tensors, first = {"w_rand": projection, "test": test}, 0
    for index, (size, count) in enumerate(zip(sizes, (90, 70, 55), strict=True)):
        labels = first + torch.cat([torch.arange(size), torch.randint(size, (count - size,))])[torch.randperm(count)]
        first += size
        features = (centres[labels] + numbers(count, 17, scale=0.8)).float().double()
        lifted, targets, fitted = (features @ projection).relu(), F.one_hot(labels, classes).double(), int(0.8 * count)
        errors = []
        for exponent in range(-8, 9):
            matrix = lifted[:fitted].T @ lifted[:fitted] + 10.0**exponent * identity
            head = torch.linalg.solve(matrix, lifted[:fitted].T @ targets[:fitted])
            errors.append(float((lifted[fitted:] @ head - targets[fitted:]).square().mean()))
        ridge = 10.0 ** (errors.index(min(errors)) - 8)
        gram, prototypes = gram + lifted.T @ lifted, prototypes + lifted.T @ targets
        weight = torch.linalg.solve(gram + ridge * identity, prototypes).T[:first]
        logits = (test @ projection).relu() @ weight.T
        found = {"features": features, "labels": labels, "G": gram, "Q": prototypes, "weight": weight, "logits": logits}
        found |= {"lambda": torch.tensor(ridge), "prediction": logits.argmax(dim=1)}
        tensors |= {f"task{index}.{name}": value for name, value in found.items()}
    save(folder, "ranpac", tensors, D=17, M=width, C=classes, head_scale=1.0)


def clipood(folder: Path, margin: float = 0.15, temperature: float = 40.0) -> None:
    """Margin softmax with its gradient, and Beta averages of two lengths."""
    raw, texts, labels = numbers(7, 23).requires_grad_(), unit(numbers(6, 23)).float().double(), torch.randint(6, (7,))
    logits = temperature * (unit(raw) - margin * texts[labels]) @ texts.T
    loss = -logits.log_softmax(dim=1)[torch.arange(7), labels].mean()
    (gradient,) = torch.autograd.grad(loss, raw)
    tensors = {
        "image_raw": raw,
        "text": texts,
        "labels": labels,
        "logits": logits,
        "loss": loss,
        "grad_image_raw": gradient,
    }
    tensors, averages = {f"mms.{name}": value for name, value in tensors.items()}, []
    for number, (beta, steps) in enumerate(((0.3, 4), (1.7, 13))):
        snapshots, x = numbers(steps + 1, 3, 5), (torch.arange(steps + 1, dtype=torch.float64) + 0.5) / (steps + 1)
        density = (x * (1 - x)) ** (beta - 1) * math.gamma(2 * beta) / math.gamma(beta) ** 2
        average = torch.einsum("k,kab->ab", density, snapshots) / density.sum()
        found = {"snapshots": snapshots, "weights": density, "average": average}
        tensors |= {f"bma{number}.{name}": value for name, value in found.items()}
        averages.append({"beta": beta, "T": steps})
    save(folder, "clipood", tensors, lam=margin, temperature=temperature, bma=averages)


def distillation(folder: Path) -> None:
    """Both directions, their sum and the relation among images, with gradients; odd sizes and temperatures."""
    tensors, cases = dict[str, Tensor](), []
    for case, (rows, texts, width, s, T) in enumerate(
        ((9, 50, 20, 30.0, 3.0), (21, 4, 7, 8.0, 0.5), (3, 2, 3, 4.0, 2.0))
    ):
        raw, teacher, anchors = (
            numbers(rows, width).requires_grad_(),
            *(unit(numbers(count, width)).float().double() for count in (rows, texts)),
        )

        def divergence(target: Tensor, logits: Tensor, T: float = T) -> Tensor:
            return T * T * -((target / T).softmax(dim=1) * (logits / T).log_softmax(dim=1)).sum(dim=1).mean()

        def among(features: Tensor, s: float = s) -> Tensor:
            return (s * features @ features.T).masked_fill(torch.eye(len(features), dtype=torch.bool), -1e4)

        student = unit(raw)
        logits, target = s * student @ anchors.T, s * teacher @ anchors.T
        losses = {"image_loss": divergence(target, logits), "text_loss": divergence(target.T, logits.T)}
        losses |= {"both": losses["image_loss"] + losses["text_loss"]}
        losses |= {"relation_loss": divergence(among(teacher), among(student))}
        found = {"student_raw": raw, "student": student, "teacher": teacher, "teacher_text": anchors, **losses}
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, (student, raw), retain_graph=True)
            found |= dict(zip((f"{name}.grad_student", f"{name}.grad_student_raw"), gradients, strict=True))
        tensors |= {f"{case}.{name}": value for name, value in found.items()}
        cases.append({"case": case, "N": rows, "M": texts, "d": width, "s": s, "T": T})
    save(folder, "zscl_kd", tensors, cases=cases)


def proof(folder: Path, width: int = 20, tasks: int = 4, classes: int = 7, images: int = 3, prompts: int = 2) -> None:
    """Summed projections and one attention sequence per image, with the gradients of everything that has parameters."""
    scale = width**-0.5
    matrices = {f"fusion.{name}": (width, width) for name in ("w_q", "w_k", "w_v", "fc.weight")}
    shapes = {**matrices, "fusion.fc.bias": (width,), "fusion.ln.bias": (width,), "fusion.ln.weight": (width,)}
    for task in range(tasks):
        for kind in ("image", "text"):
            shapes |= {f"proj_{kind}.{task}.weight": (width, width), f"proj_{kind}.{task}.bias": (width,)}
        shapes[f"context.{task}"] = (prompts, width)
    p = {name: numbers(*shape, scale=scale).requires_grad_() for name, shape in shapes.items()}
    inputs = {"image": numbers(images, width), "text": numbers(classes, width), "prototypes": numbers(classes, width)}

    def projected(kind: str, rows: Tensor) -> Tensor:
        maps = [rows @ p[f"proj_{kind}.{task}.weight"].T + p[f"proj_{kind}.{task}.bias"] for task in range(tasks)]
        return unit(torch.stack(maps).sum(dim=0))

    shown, texts = projected("image", inputs["image"]), projected("text", inputs["text"])
    others = [texts, projected("image", inputs["prototypes"]), *(p[f"context.{task}"] for task in range(tasks))]
    outputs = []
    for row in range(images):
        x = torch.cat([shown[row : row + 1], *others])
        query, key, value = (x @ p[f"fusion.{name}"].T for name in ("w_q", "w_k", "w_v"))
        mixed = (scale * query @ key.T).softmax(dim=1) @ value
        x = x + mixed @ p["fusion.fc.weight"].T + p["fusion.fc.bias"]
        outputs.append(F.layer_norm(x, (width,), p["fusion.ln.weight"], p["fusion.ln.bias"], 1e-5))
    whole = torch.stack(outputs)
    found = {"image": whole[:, 0], "text": whole[:, 1 : 1 + classes].mean(dim=0)}
    found["proto"] = whole[:, 1 + classes : 1 + 2 * classes].mean(dim=0)
    ups = {name: numbers(*value.shape) for name, value in found.items()}
    total = torch.stack([(value * ups[name]).sum() for name, value in found.items()]).sum()
    gradients = torch.autograd.grad(total, list(p.values()))
    tensors = {**p, **inputs, "projected_image": shown, "projected_text": texts}
    tensors |= {f"grad.{name}": gradient for name, gradient in zip(p, gradients, strict=True)}
    tensors |= {f"out_{name}": value for name, value in found.items()} | {f"up_{name}": up for name, up in ups.items()}
    sizes = {"D": width, "tasks": tasks, "C": classes, "B": images, "prompts_per_task": prompts}
    save(folder, "proof_fusion", tensors, **sizes, temperature=math.sqrt(width), layer_norm_eps=1e-5)
