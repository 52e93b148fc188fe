"""The rows of a profile: every layer of the adapted model beside the same layer of the frozen one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from cl_kernels.profile.costs import WHOLE, Cost, costs
from cl_kernels.profile.recorder import Operation, StepRecord

OUTSIDE = "(outside of modules)"
OPTIMIZER = "(optimizer)"


@dataclass(frozen=True)
class Layer:
    """One row.

    Attributes:
        name: of the module; :data:`OUTSIDE` for the loss and what else no module does, :data:`OPTIMIZER` for the update.
        depth: calls that it is nested in.
        cost: in the adapted model, with everything that runs inside its calls, mounted parts included.
        base: of the module of that name in the frozen model; None if there is none.
    """

    name: str
    depth: int
    cost: Cost
    base: Cost | None

    @property
    def mounted(self) -> bool:
        """Whether this is a part that trains and that the frozen model has nothing like."""
        return self.base is None and self.cost.trainable > 0

    def difference(self) -> dict[str, int | float | None]:
        """Adapted minus frozen."""
        return self.cost.minus(self.base if self.base is not None else Cost())


def layers(record: StepRecord, adapted: Mapping[str, Cost], base: Mapping[str, Cost]) -> list[Layer]:
    """Rows in the order of the calls, as deep as numbered blocks and what is mounted on them.

    Args:
        record: of the adapted model.
        adapted: its costs by module.
        base: those of the frozen model.
    """
    children = _call_tree(record.operations)
    found: list[Layer] = []

    def add(name: str, depth: int, inside_block: bool) -> None:
        new = name not in base
        wraps = new and _calls_known(name, children, base)
        shown = not wraps and (new or not inside_block)
        if shown:
            found.append(Layer(name, depth, adapted[name], base.get(name)))
        if shown and new:
            return  # what a mounted module consists of is in the full table
        for child in children.get(name, ()):
            add(child, depth + shown, inside_block or _is_block(name))

    for name in children.get(WHOLE, ()):
        add(name, 0, inside_block=False)
    return [*found, *_rest(record, base)]


def _is_block(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def _calls_known(name: str, children: Mapping[str, list[str]], base: Mapping[str, Cost]) -> bool:
    """Whether something of the frozen model runs inside ``name``, which then is a wrapper and nothing mounted."""
    return any(child in base or _calls_known(child, children, base) for child in children.get(name, ()))


def _call_tree(operations: list[Operation]) -> dict[str, list[str]]:
    """{caller: modules that it calls}, in the order of their first operation; each module under its first caller."""
    children: dict[str, list[str]] = {}
    placed: set[str] = set()
    for operation in operations:
        if operation.phase != "forward":
            continue
        for caller, name in zip((WHOLE, *operation.stack), operation.stack, strict=False):
            if name not in placed:
                placed.add(name)
                children.setdefault(caller, []).append(name)
    return children


def _rest(record: StepRecord, base: Mapping[str, Cost]) -> list[Layer]:
    """What no module does, as rows of their own."""
    found = []
    outside = [o for o in record.operations if not o.stack and o.phase != "optimizer"]
    update = [o for o in record.operations if o.phase == "optimizer"]
    for name, operations in ((OUTSIDE, outside), (OPTIMIZER, update)):
        if operations:
            saved = [entry for entry in record.saved if not entry[0]] if name == OUTSIDE else []
            part = StepRecord(operations, saved, record.timed)
            found.append(Layer(name, 0, costs([part], {})[WHOLE], base.get(name)))
    return found


def outside_costs(record: StepRecord) -> dict[str, Cost]:
    """The rows :data:`OUTSIDE` and :data:`OPTIMIZER` of the frozen model, to be subtracted like those of its modules."""
    return {layer.name: layer.cost for layer in _rest(record, {})}


def named_modules(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """{name: module} of everything inside ``module``, without itself."""
    return {prefix + name: child for name, child in module.named_modules() if name}
