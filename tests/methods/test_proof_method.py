"""PROOF against a plain network of one projection per task and one sequence per image; memory, scopes, costs, resuming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clip import build_backbone, noise_images, transform
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from trained import SHORT, Batches, check_resuming, state

from cl_kernels.profile import OperationCount
from cl_methods.components.cross_modal_fusion import CrossModalFusion
from cl_methods.components.exemplars import encode_source, herding
from cl_methods.datasets.task import Task
from cl_methods.methods import METHODS, Batch
from cl_methods.training.task import TaskTraining

SYNCHRONISING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero", "aten::equal"}
WIDTH = 16


def build(**settings: Any) -> Any:
    few = {"memory": 12, "batch_size": 6, "dropout": 0.0, "lr": 0.05}
    torch.manual_seed(5)
    return METHODS["proof"](build_backbone(), METHODS["proof"].Config(**{**SHORT, **few, **settings}))


def learnt(tasks: list[Task], **settings: Any) -> Any:
    """A method after all tasks, through the training loop itself."""
    method = build(**settings)
    for index in range(len(tasks)):
        TaskTraining(method, index, tasks).execute()
    method.before_evaluation()
    return method


def third(tasks: list[Task]) -> list[Task]:
    """The two tasks and one more, one of whose three classes the first task has as well."""
    images = noise_images(24, 50, 3, 100)
    return [*tasks, Task("task2", ("fox", "bee", "gnu"), ("a photo of {}",), images, images, images)]


def pictures(task: Task, count: int = 6) -> Tensor:
    return torch.stack([transform(task.test.image(index)) for index in range(count)])


def plain_fusion(fusion: CrossModalFusion, images: Tensor, classes: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs at every image (B, D), and at all classes' tokens for every image (B, 2C, D): one sequence after the other."""
    outputs = []
    for image in images:
        x = torch.cat([image[None], classes, context])
        q, k, v = (x @ layer.weight.T for layer in (fusion.query, fusion.key, fusion.value))
        attended = torch.softmax(q @ k.T / x.shape[1] ** 0.5, dim=1) @ v
        y = x + attended @ fusion.output.weight.T + fusion.output.bias
        outputs.append(F.layer_norm(y, (x.shape[1],), fusion.norm.weight, fusion.norm.bias))
    every = torch.stack(outputs)
    return every[:, 0], every[:, 1 : 1 + len(classes)]


class PlainProof(nn.Module):
    """The network as it is written in the paper, on frozen features, in float64; every projection has its own matrix."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.image, self.text = nn.ModuleList(), nn.ModuleList()
        self.fusion = CrossModalFusion(WIDTH, 0.0).double()
        self.fusion.load_state_dict(method.network.fusion.state_dict())
        self.prompts = nn.ParameterList()
        self.log_scale = nn.Parameter(method.network.log_scale.detach().double().clone())
        self.frozen: dict[str, tuple[Tensor, Tensor]] = {}

    def extend(self, method: Any, *, train_old_texts: bool) -> None:
        """A new projection and new prompts with the values that the method has drawn, everything earlier frozen."""
        network = method.network
        for kind, before in (("image", self.image), ("text", self.text)):
            summed, added = getattr(network, kind), nn.Linear(WIDTH, WIDTH).double()
            for part in ("weight", "bias"):
                earlier = sum(getattr(one, part).detach() for one in before)
                whole = (getattr(summed, part) + getattr(summed, f"frozen_{part}")).detach().double()
                getattr(added, part).data = whole - earlier
            before.requires_grad_(kind == "text" and train_old_texts)
            before.append(added)
        self.prompts.requires_grad_(False)
        self.prompts.append(nn.Parameter(network.prompts.detach().double().clone()))

    def project(self, kind: str, features: Tensor) -> Tensor:
        return F.normalize(sum(one(features) for one in getattr(self, kind)), dim=1)

    def loss(self, features: Tensor, texts: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
        images, texts = self.project("image", features), self.project("text", texts)
        tokens = torch.cat([texts, self.project("image", prototypes)])
        out, classes = plain_fusion(self.fusion, images, tokens, torch.cat(list(self.prompts)))
        fused_texts, fused_prototypes = classes.mean(dim=0).chunk(2)
        pairs = torch.arange(len(labels))
        contrast = self.log_scale.exp() * images @ texts[labels].T
        both = (F.cross_entropy(contrast, pairs) + F.cross_entropy(contrast.T, pairs)) / 2
        return F.cross_entropy(out @ fused_texts.T, labels) + F.cross_entropy(out @ fused_prototypes.T, labels) + both


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("train_old_texts", [False, True])
def test_merged_projections_train_as_separate_ones(
    optimizer: str, train_old_texts: bool, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of every step of three tasks, and all weights at the end, with momentum and weight decay."""
    tasks, plain, losses = third(tasks), None, []
    method = build(train_old_texts=train_old_texts, optimizer=optimizer, lr=0.01, weight_decay=0.05)
    for index, task in enumerate(tasks):
        method.before_task(index, task)
        method.network.double()
        for name in ("texts", "sums", "counts"):
            setattr(method.classes, name, getattr(method.classes, name).double())
        plain = plain or PlainProof(method)
        plain.extend(method, train_old_texts=train_old_texts)
        changing = [value for value in plain.parameters() if value.requires_grad]
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        momentum = {"momentum": 0.9} if optimizer == "sgd" else {"betas": (0.9, 0.999)}
        theirs = kind(changing, lr=0.01, weight_decay=0.05, **momentum)
        ours, source = method.optimizer(), method.training_images(task)
        for group in ours.param_groups:
            group["lr"] = 0.01 * group.get("lr_scale", 1.0)
        for step in range(3):
            rows = torch.arange(7 * step, 7 * step + 7) % len(source)
            images = torch.stack([transform(source.image(row)) for row in rows.tolist()])
            labels = source.labels[rows]
            features = method.backbone.encode_images(images, normalise=False).detach()
            with monkeypatch.context() as patch:
                patch.setattr(method.backbone, "encode_images", lambda images, normalise, kept=features: Double(kept))
                found = method.loss(Batch(images, labels, step))["loss"]
            expected = plain.loss(features.double(), method.classes.texts, method.classes.prototypes(), labels)
            losses.append((float(found.detach()), float(expected.detach())))
            for value, one in ((found, ours), (expected, theirs)):
                one.zero_grad()
                value.backward()
                one.step()
        method.after_task(index, task)
    for found, expected in losses:
        assert found == pytest.approx(expected, rel=1e-9)
    for kind in ("image", "text"):
        for part in ("weight", "bias"):
            summed = getattr(method.network, kind)
            whole = getattr(summed, part) + getattr(summed, f"frozen_{part}")
            torch.testing.assert_close(whole, sum(getattr(one, part) for one in getattr(plain, kind)))
    torch.testing.assert_close(method.network.context(), torch.cat(list(plain.prompts)))
    for (name, value), (_, other) in zip(
        method.network.fusion.named_parameters(), plain.fusion.named_parameters(), strict=True
    ):
        torch.testing.assert_close(value, other, msg=name)
    assert len({round(expected, 6) for _, expected in losses}) == 9


class Double:
    """A float64 tensor that stays one where the method asks for ``float()``."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.double()

    def float(self) -> Tensor:
        return self.value


def test_projections_are_summed_exactly(tasks: list[Task]) -> None:
    """What is frozen after a task is to the bit what trained in it, and the memory does not grow."""
    method = learnt(tasks[:1])
    network = method.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    method.before_task(1, tasks[1])
    assert torch.equal(network.image.frozen_weight, before["image.weight"])
    assert torch.equal(network.text.frozen_bias, before["text.bias"])
    assert not torch.equal(network.image.weight, before["image.weight"])
    assert torch.equal(network.frozen_prompts, before["prompts"])
    assert {name for name, value in network.state_dict().items() if value.shape != before[name].shape} == {
        "frozen_prompts"
    }


def test_training_images_are_the_task_s_and_the_memory_s(tasks: list[Task]) -> None:
    tasks = third(tasks)
    method = learnt(tasks[:2])
    method.before_task(2, tasks[2])
    source, names = method.training_images(tasks[2]), ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
    assert list(method.classes.templates) == names
    assert len(source) == 12 + len(tasks[2].train)
    position = 0
    for task, rows in zip(tasks, [*method.memory.indices, torch.arange(24)], strict=True):
        for row in rows.tolist():
            assert torch.equal(source.image(position), task.train.image(row))
            assert names[int(source.labels[position])] == task.class_names[int(task.train.labels[row])]
            position += 1
    first, own = encode_source(method.backbone, tasks[0].train), encode_source(method.backbone, tasks[2].train)
    bees = torch.cat([first[tasks[0].train.labels == 1], own[tasks[2].train.labels == 1]])
    torch.testing.assert_close(method.classes.prototypes()[1], bees.mean(dim=0))


def test_exemplars_are_herded_and_bounded(tasks: list[Task]) -> None:
    features, labels = encode_source(build_backbone(), tasks[0].train), tasks[0].train.labels
    for bound, kept in ((None, 4), (2, 2), (9, 4)):
        rows = learnt(tasks[:1], memory_per_class=bound).memory.indices[0]
        for label in range(3):
            members = (labels == label).nonzero().squeeze(1)
            assert torch.equal(rows[labels[rows] == label], members[herding(features[members], kept)])
    with pytest.raises(ValueError, match="memory: expected at least one image for each of the 3 classes"):
        learnt(tasks[:1], memory=2)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_scores(scope: str, normalise: bool, tasks: list[Task]) -> None:
    """Against one sequence per image, template ensembles and all; ``sample`` does not look at the other images."""
    method = learnt(tasks, scope=scope, normalise_test_images=normalise)
    network, backbone, images = method.network, method.backbone, pictures(tasks[0])
    raw = backbone.encode_images(images, normalise=False)
    projected = network.image(raw)
    projected = F.normalize(projected, dim=1) if normalise else projected
    texts = []
    for task in tasks:
        for name in task.class_names:
            prompts = backbone.tokenize([template.format(name) for template in task.templates])
            found = F.normalize(network.text(backbone.encode_texts(prompts, normalise=False)), dim=1).mean(dim=0)
            texts.append(F.normalize(found, dim=0))
    tokens = torch.cat([torch.stack(texts), F.normalize(network.image(method.classes.prototypes()), dim=1)])
    out, every = plain_fusion(network.fusion, projected, tokens, network.context())
    if scope == "batch":
        every = every.mean(dim=0).expand_as(every)
    pairs = torch.einsum("bd,bcd->bc", out, every)
    expected = projected @ torch.stack(texts).T + pairs[:, :5] + pairs[:, 5:]
    scores = method.head_scores(raw)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    alone = torch.cat([method.head_scores(one[None]) for one in raw])
    assert torch.allclose(alone, scores, rtol=1e-5, atol=1e-5) == (scope == "sample")


def test_unlearnt_classes_are_zero_shot_and_learnt_ones_share(tasks: list[Task]) -> None:
    method, images = learnt(tasks[:1]), pictures(tasks[0])
    zero_shot = METHODS["zero_shot"](build_backbone(), METHODS["zero_shot"].Config())
    assert torch.equal(method.logits(images, tasks[1]), zero_shot.logits(images, tasks[1]))
    scores, plain = method.logits(images, tasks[0]), zero_shot.logits(images, tasks[0])
    raw = method.backbone.encode_images(images, normalise=False)
    assert torch.equal(scores.argsort(dim=1), method.head_scores(raw).argsort(dim=1))
    torch.testing.assert_close(scores.logsumexp(dim=1), plain.logsumexp(dim=1))
    both = third(tasks)[2]  # one class learnt, two not
    mixed = method.logits(images, both)
    torch.testing.assert_close(mixed[:, 1], scores[:, 1])
    torch.testing.assert_close(mixed[:, [0, 2]], zero_shot.logits(images, both)[:, [0, 2]])


def random_tokens(images: int, classes: int, prompts: int) -> tuple[CrossModalFusion, list[Tensor]]:
    torch.manual_seed(images)
    fusion = CrossModalFusion(WIDTH, 0.3)
    return fusion, [F.normalize(torch.randn(count, WIDTH), dim=1) for count in (images, classes, classes, prompts)]


@pytest.mark.parametrize(("images", "classes", "prompts"), [(1, 1, 0), (7, 5, 3), (3, 11, 1)])
def test_shared_attention_equals_one_sequence_per_image(images: int, classes: int, prompts: int) -> None:
    fusion, tokens = random_tokens(images, classes, prompts)
    fusion.double().eval()
    tokens = [3 * value.double().requires_grad_() for value in tokens]
    out, every = plain_fusion(fusion, tokens[0], torch.cat(tokens[1:3]), tokens[3])
    upstream = [torch.randn_like(value) for value in (out, every[0])]
    expected = [out, every.mean(dim=0)]
    fused = fusion(*tokens)
    found = [fused.images, torch.cat([fused.texts, fused.prototypes])]
    dense = [out, fusion.dense_classes(fusion.image_tokens(tokens[0]), fusion.shared(*tokens[1:]))]
    leaves = [*tokens[: 4 if prompts else 3], *fusion.parameters()]
    gradients = []
    for values in (expected, found, dense):
        for value, other in zip(values, expected, strict=True):
            torch.testing.assert_close(value, other)
        total = sum((value * up).sum() for value, up in zip(values, upstream, strict=True))
        gradients.append(torch.autograd.grad(total, leaves, retain_graph=True))
    for ours in gradients[1:]:
        for value, other in zip(ours, gradients[0], strict=True):
            torch.testing.assert_close(value, other)


def test_dropout_scatters_around_evaluation() -> None:
    """Weights and outputs are dropped one by one: many draws differ, and their mean is near what evaluation gives."""
    fusion, tokens = random_tokens(4, 3, 2)
    still, fusion.dropout = fusion.eval()(*tokens), 0.03
    fusion.train()
    with torch.no_grad():
        draws = [fusion(*tokens) for _ in range(400)]
    for kind in ("images", "texts", "prototypes"):
        every = torch.stack([getattr(one, kind) for one in draws])
        assert every.std(dim=0).min() > 1e-3
        assert (every.mean(dim=0) - getattr(still, kind)).abs().max() < 0.1


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.numel())
        return out


def test_nothing_grows_with_images_times_classes_times_features() -> None:
    """Without dropout the largest tensor is the attention among classes or (2C, B); with it, one row of it per image."""
    images, classes, prompts = 32, 40, 3
    fusion, tokens = random_tokens(images, classes, prompts)
    fusion.train()
    length, sizes = 2 * classes + prompts, {}
    for dropout in (0.0, 0.3):
        fusion.dropout = dropout
        leaves = [value.clone().requires_grad_() for value in tokens]
        with Largest() as largest:
            fused = fusion(*leaves)
            (fused.images.sum() + fused.texts.square().sum() + fused.prototypes.square().sum()).backward()
        sizes[dropout] = largest.numel
    assert sizes[0.0] == max(2 * classes * length, 2 * classes * images)
    assert sizes[0.3] == images * 2 * classes * (length + 1)


def test_a_step_encodes_no_text_never_waits_and_costs_the_same_in_every_task(tasks: list[Task]) -> None:
    method, counts = build(), []
    for index, task in enumerate(third(tasks)):
        method.before_task(index, task)
        source = method.training_images(task)
        batch = Batch(torch.stack([transform(source.image(row)) for row in range(6)]), source.labels[:6], 0)
        optimizer = method.optimizer()
        optimizer.zero_grad()
        with OperationCount() as forward:
            loss = method.loss(batch)["loss"]
        with OperationCount() as backward:
            loss.backward()
        assert SYNCHRONISING.isdisjoint(forward.by_name | backward.by_name)
        assert "aten::embedding" not in forward.by_name
        counts.append((forward.operations, backward.operations))
        method.after_task(index, task)
    with OperationCount() as tower, torch.no_grad():
        method.backbone.encode_images(batch.images, normalise=False)
    assert len(set(counts)) == 1, counts
    assert counts[0][0] - tower.operations <= 110, counts
    assert counts[0][1] <= 220, counts


def test_clip_is_never_changed_and_not_stored(tasks: list[Task]) -> None:
    before = build_backbone().model.state_dict()
    method = learnt(tasks)
    assert all(torch.equal(value, before[name]) for name, value in method.backbone.model.state_dict().items())
    stored = state(method)
    assert not stored.keys() & before.keys()
    assert sum(value.numel() for name, value in stored.items() if name.startswith("memory.")) == 12
    parameters = sum(value.numel() for _, value in method.trainable())
    assert parameters == 2 * (WIDTH + 1) * WIDTH + (4 * WIDTH + 1) * WIDTH + 2 * WIDTH + 3 * WIDTH + 1


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}, {"train_old_texts": True}, {"optimizer": "adamw"}])
def test_resuming_in_the_middle_of_a_task(settings: dict[str, Any], tasks: list[Task], batches: Batches) -> None:
    check_resuming(lambda: build(**settings), tasks, batches)


def test_runs_repeat_and_states_round_trip(tasks: list[Task]) -> None:
    one, two = (state(learnt(tasks, dropout=0.1)) for _ in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    other = build(dropout=0.1)
    other.load_state_dict(one)
    assert all(torch.equal(value, one[name]) for name, value in state(other).items())
    other.recall(tasks)
    other.before_evaluation()
    images = pictures(tasks[1])
    assert torch.equal(other.logits(images, tasks[1]), learnt(tasks, dropout=0.1).logits(images, tasks[1]))
    assert build().state_dict() == {}
    with pytest.raises(RuntimeError, match="state: 'visual' is no tensor of proof"):
        other.load_state_dict({"visual": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="expected names, texts, sums and counts of classes, found texts"):
        other.load_state_dict({"classes.texts": torch.zeros(1, 1)})
    with pytest.raises(RuntimeError, match="call load_state_dict and recall first"):
        build().before_task(1, tasks[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: expected one of sgd, adamw, got 'adam'"),
        ({"scope": "all"}, "scope: expected one of sample, batch, got 'all'"),
        ({"memory": 0}, "memory: expected a number >= 1, got 0"),
        ({"memory_per_class": 0}, "memory_per_class: expected a number >= 1, got 0"),
        ({"prompts": 0}, "prompts: expected a number >= 1, got 0"),
        ({"momentum": 1.0}, "momentum: expected 0 <= value < 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: expected 0 <= value < 1, got -0.1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_published_settings() -> None:
    config = METHODS["proof"].default_config("cil")
    assert (config.lr, config.weight_decay, config.momentum, config.batch_size) == (1e-3, 0.05, 0.9, 64)
    assert (config.prompts, config.dropout, config.memory, config.epochs) == (3, 0.1, 2000, 5)
    with pytest.raises(RuntimeError, match="proof: call before_task first"):
        build().trainable()
