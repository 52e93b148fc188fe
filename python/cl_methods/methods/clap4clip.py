"""CLAP4CLIP: class texts as random variables over a frozen CLIP, one small adapter per task, attention to the images at hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cl_methods.backbone import Backbone, prompt
from cl_methods.components.exemplars import ExemplarMemory, Selection, herded
from cl_methods.components.seen_images import SeenImages
from cl_methods.components.uncertainty import by_uncertainty, uncertainty
from cl_methods.datasets.images import ImageSource
from cl_methods.datasets.loading import evaluation_batches
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Facts, Stage
from cl_methods.methods.clap_config import ClapConfig
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.keeping_images import KeepsImages
from cl_methods.methods.variational_adapters import VariationalHead
from cl_methods.methods.variational_loss import variational_loss

_FINE_TUNING = "fine_tuning"
_ROWS = 8192  # texts that the attention layer looks at together where every image has texts of its own; bounds memory


class CLAP4CLIP(KeepsImages):
    """``z_c ~ N(μ_i(h_c), σ_i(h_c)²)`` around ``h_c = t_c + VGA(t, X)_c``; images score ``s f(x)·(h_c + z_c)``, i the task of c.

    First stage, on the task and the memory: attention (VGA) and the task's adapter. Second stage, on the memory, the same number
    of images for every class: the adapters of all tasks. Both minimise
    :func:`~cl_methods.methods.variational_loss.variational_loss`.

    A learnt task's classes are scored by its adapter, chosen by the label space; those of a task that was not learnt by their
    texts, as CLIP does. Where both compete, under the label spaces ``seen`` (before the last task) and ``all``, the former are far
    larger; ``one_scale`` shares out among the learnt classes what zero-shot CLIP gives to them together, as RanPAC does here.
    With ``scope="batch"`` predictions depend on the images that happen to be scored together.

    Source: Jha et al., "CLAP4CLIP: Continual Learning with Probabilistic Finetuning for Vision-Language Models", NeurIPS 2024.

    Attributes:
        head: everything that is learnt; None before the first task.
        task_names: the tasks of the head's adapters.
        memory: images of these tasks.
    """

    name: ClassVar[str] = "clap4clip"
    facts: ClassVar[Facts] = Facts(
        source="Jha et al., NeurIPS 2024",
        trains="attention from class texts to images, two linear maps per task",
        carries="images of earlier tasks, class texts",
        test_time="the rest of the batch if scope is batch",
    )
    Config: ClassVar[type[TrainConfig]] = ClapConfig
    frozen_images: ClassVar[bool] = True
    draws_scores: ClassVar[bool] = True
    config: ClapConfig

    def __init__(self, backbone: Backbone, config: ClapConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        backbone.model.requires_grad_(False)
        self.head: VariationalHead | None = None
        self.task_names: list[str] = []
        self.memory = ExemplarMemory(config.memory)
        self._task: Task | None = None
        self._scale = backbone.logit_scale.detach().float()

    @torch.no_grad()
    def before_task(self, index: int, task: Task) -> None:
        """Encode the task's prompts, all templates of them, and add its adapter.

        Raises:
            ValueError: the memory is too small for the classes.
            RuntimeError: a state was loaded without :meth:`recall`.
        """
        self.memory.check(index, task)
        super().before_task(index, task)
        self.backbone.model.eval()
        prompts = [prompt(template, name) for name in task.class_names for template in task.templates]
        features = self.backbone.frozen_text_features(self.backbone.tokenize(prompts)).float()
        if self.head is None:
            self.head = self._new_head(features.shape[1])
        self.head.add_task(features.view(len(task.class_names), len(task.templates), -1))
        self.task_names.append(task.name)
        self._task = task

    def _new_head(self, width: int) -> VariationalHead:
        return VariationalHead(width, self.config, self.backbone.device)

    def stages(self, task: Task) -> tuple[Stage, ...]:
        """``train`` on the task and the memory; ``fine_tuning`` on the memory alone, unless it has no iterations."""
        config = self.config
        if not config.fine_tuning_iterations:
            return super().stages(task)
        rate = config.fine_tuning_lr_factor * self.learning_rate(task)
        return (*super().stages(task), Stage(_FINE_TUNING, config.fine_tuning_iterations, rate, 0, config.batch_size))

    def before_stage(self, stage: Stage) -> None:
        """Fill the memory before it is trained on."""
        super().before_stage(stage)
        if stage.name == _FINE_TUNING:
            self._remember()

    def training_images(self, task: Task) -> ImageSource:
        """Images of ``task`` and of the memory, or of the memory, labelled among the classes of all tasks so far."""
        if self._fine_tuning:
            return SeenImages(self.memory.tasks, self.memory.indices)
        return SeenImages([*self.memory.tasks, task], [*self.memory.indices, torch.arange(len(task.train))])

    @property
    def _fine_tuning(self) -> bool:
        return self.stage is not None and self.stage.name == _FINE_TUNING

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Attention and the newest adapter; in the second stage the adapters of all tasks. The shared one, if any, in both.

        Raises:
            RuntimeError: ``before_task`` has not been called.
        """
        head = self._begun()
        frozen = ("attention.",) if self._fine_tuning else tuple(f"adapters.{n}." for n in range(len(head.texts) - 1))
        return [(name, value) for name, value in head.named_parameters() if not name.startswith(frozen)]

    def _begun(self) -> VariationalHead:
        if self.head is None:
            raise RuntimeError("clap4clip: call before_task before the first step")
        return self.head

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD or AdamW."""
        config = self.config
        if config.optimizer == "adamw":
            return super().optimizer()
        parameters = [value for _, value in self.trainable()]
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss", "cross_entropy", "kl", "past_task"}``; ``batch.labels`` count the classes of all tasks.

        Raises:
            RuntimeError: ``before_task`` has not been called.
        """
        head = self._begun()
        with torch.no_grad():
            features = self.backbone.encode_images(batch.images).float()
        return variational_loss(head, features, batch.labels, self._scale, every_task=self._fine_tuning)

    def after_task(self, index: int, task: Task) -> None:
        """Keep images of the task, if the second stage has not done so."""
        super().after_task(index, task)
        if len(self.memory.tasks) == index:
            self._remember()
        self._task = None

    def _remember(self) -> None:
        assert self._task is not None
        bound, select = self.config.memory_per_class, self.selection(self._task)
        self.memory.add(self._task, lambda rows, share: select(rows, min(share, bound) if bound else share))

    @torch.no_grad()
    def selection(self, task: Task) -> Selection:
        """How images of ``task`` are chosen for the memory; an uncertainty is that of draws over the classes of the task."""
        kind, config = self.config.selection, self.config
        if kind == "random":
            return lambda rows, count: rows[torch.randperm(len(rows))[:count]]
        if kind == "herding":
            return herded(self.backbone, task)
        self.backbone.model.eval()
        batches = evaluation_batches(
            task.train, self.backbone.eval_transform, batch_size=config.batch_size, device=self.backbone.device
        )
        values = [uncertainty(self.sampled_logits(images, task, config.samples), kind) for images, _ in batches]
        return by_uncertainty(torch.cat(values), config.keep)

    def feature_scores(self, features: Tensor, tasks: Sequence[Task]) -> list[Tensor]:
        """(B, C_t) mean scores of ``features`` (B, d) over draws, or over all possible ones; by texts if not learnt."""
        exact, learnt = features.float(), [task.name for task in tasks if task.name in self.task_names]
        asked = self.task_names if self.config.one_scale and learnt else learnt
        means = {name: self._mean_scores(exact, self.task_names.index(name)) for name in asked}
        found = []
        for task in tasks:
            if task.name not in means:
                found += super().feature_scores(features, [task])
            else:
                found.append(self._on_one_scale(exact, task.name, means) if self.config.one_scale else means[task.name])
        return found

    def _on_one_scale(self, features: Tensor, name: str, means: dict[str, Tensor]) -> Tensor:
        """Scores (B, n) of one learnt task, sharing out what zero-shot CLIP gives to all of them."""
        own, others = means[name], [scores for other, scores in means.items() if other != name]
        learnt = torch.cat([own, *others], dim=1).logsumexp(dim=1, keepdim=True)
        return own - learnt + (self._scale * features @ self._begun().text.T).logsumexp(dim=1, keepdim=True)

    @torch.no_grad()
    def sampled_logits(self, images: Tensor, task: Task, samples: int) -> Tensor:
        """Scores of ``images`` (B, 3, R, R) for each of several draws of a learnt task's class texts: (F, B, C).

        The draws are the same in every call, so that scores of an image do not depend on what was scored before.

        Args:
            images: evaluation transform.
            task: a task that has been learnt.
            samples: F; in the hierarchical form times ``global_samples``.

        Raises:
            ValueError: the task has not been learnt, so there is nothing to draw from.
        """
        if task.name not in self.task_names:
            raise ValueError(
                f"task: expected one of the learnt ones, {', '.join(self.task_names) or 'none'}, got {task.name}"
            )
        features = self.backbone.encode_images(images).float()
        return self._scores(features, self.task_names.index(task.name), samples)

    def feature_draws(self, features: Tensor, tasks: Sequence[Task]) -> list[Tensor]:
        """(F, B, C_t) scores of ``features`` (B, d) for each of ``samples`` draws of learnt tasks' class texts."""
        exact = features.float()
        return [self._scores(exact, self.task_names.index(task.name), self.config.samples) for task in tasks]

    def _mean_scores(self, features: Tensor, place: int) -> Tensor:
        return self._scores(features, place, self.config.evaluation_samples).mean(dim=0)

    def _scores(self, features: Tensor, place: int, samples: int) -> Tensor:
        """(F, B, n) of so many draws of the classes of one task, or (1, B, n) of the mean for no draws."""
        head, alone = self._begun(), self.config.scope == "sample"
        shape, noise = (head.texts[place].shape[1], head.width), []
        if samples:
            generator = torch.Generator().manual_seed(0)
            groups = [self.config.global_samples] if self.config.hierarchical else []
            shapes = [(samples, *groups, *shape), *((group, *shape) for group in groups)]
            noise = [torch.randn(one, generator=generator).to(features.device) for one in shapes]
        parts = features.split(max(1, _ROWS // shape[0])) if alone else [features]
        scores = [head.score(part, place, alone=alone, noise=tuple(noise) or None) for part in parts]
        return self._scale * torch.cat(scores, dim=1)

    def forget_classifiers(self) -> None:
        """Nothing to forget: the towers are frozen, so class embeddings stay what they are."""

    def state_dict(self) -> dict[str, Tensor]:
        """What trains, under ``texts.`` the class texts of each task, the tasks' names, and under ``memory.`` indices of images.

        Empty before the first task; the CLIP weights are never changed and not included.
        """
        if self.head is None:
            return {}
        state = dict(self.head.state_dict())
        state.update({f"texts.{place}": texts for place, texts in enumerate(self.head.texts)})
        state.update({f"memory.{place}": rows for place, rows in self.memory.state_dict().items()})
        state["task_names"] = torch.tensor(list(json.dumps(self.task_names).encode()), dtype=torch.uint8)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; between tasks :meth:`recall` must follow.

        Raises:
            RuntimeError: the state is not one of this method with these settings.
        """
        rest = dict(state)
        names = rest.pop("task_names", None)
        texts, memory = (
            {name[len(part) :]: rest.pop(name) for name in list(rest) if name.startswith(part)}
            for part in ("texts.", "memory.")
        )
        if (names is None) != (not texts) or (names is None and rest):
            raise RuntimeError(
                f"state: expected the tensors of clap4clip, found {', '.join(sorted(state)) or 'nothing'}"
            )
        self.task_names = [] if names is None else json.loads(bytes(names.tolist()))
        self.head = self._new_head(texts["0"].shape[2]) if texts else None
        if self.head is not None:
            for place in range(len(self.task_names)):
                self.head.append(texts[str(place)])
            self.head.load_state_dict(rest)
        self.memory.load_state_dict(memory)
        if self._task is not None and len(self.memory.indices) == len(self.memory.tasks) + 1:
            self.memory.tasks = [*self.memory.tasks, self._task]  # the second stage has begun
