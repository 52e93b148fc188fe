"""What a patch changed, and how to take it back."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable
from typing import Any, Self


class Patched:
    """Base of the classes that patched instances get: the class they had comes right after it.

    A copy of a patched instance is patched; what is pickled is an instance of the class it had, so files hold nothing of ours.
    """

    _cl_kernels_original: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, _: Any) -> Any:
        # pickle refuses the usual copyreg.__newobj__ with another class than the instance's.
        return copyreg._reconstructor, (self._cl_kernels_original, object, None), self._state()  # type: ignore[attr-defined]

    def _state(self) -> dict[str, Any]:
        """The attributes that a file gets."""
        return self.__dict__


class Patch:
    """The record of one patch. As a context manager it undoes itself at the end; printed, it reports.

    Attributes:
        replaced: what was replaced, by name.
        left: what was looked at and left as it was, by name, and why.

    Args:
        title: what was patched, for the report.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.replaced: list[str] = []
        self.left: dict[str, str] = {}
        self.active = True
        self._undo: list[tuple[str, Callable[[], bool], Callable[[], None]]] = []

    def change_class(self, name: str, instance: Any, behaviour: type, **attributes: Any) -> None:
        """Give ``instance`` a class derived from ``behaviour`` and its own class, under the name of the latter.

        Methods reach DataParallel's replicas and deep copies with the instance that they belong to; a function stored on the
        instance would go on serving the original's weights there.
        """
        original = type(instance)
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        attributes = {**names, "_cl_kernels_original": original, **attributes}
        derived = type(original.__name__, (behaviour, original), attributes)

        def restore() -> None:
            if hasattr(instance, "_before_undo"):
                instance._before_undo()
            instance.__class__ = original

        instance.__class__ = derived
        self._undo.append((name, lambda: type(instance) is derived, restore))
        self.replaced.append(name)

    def change_attribute(self, name: str, owner: Any, attribute: str, value: Any) -> None:
        """Set ``owner.attribute``, which exists in the owner's own namespace, to ``value``."""
        original = vars(owner)[attribute]
        setattr(owner, attribute, value)
        self._undo.append(
            (name, lambda: vars(owner).get(attribute) is value, lambda: setattr(owner, attribute, original))
        )
        self.replaced.append(name)

    def adopt(self, name: str, other: Patch) -> None:
        """Take over the changes of ``other`` as one replacement."""
        self._undo += other._undo
        self.replaced.append(name)

    def take_back(self, reason: str) -> None:
        """Undo the latest change alone, and report what it was made to as left for this reason."""
        name, _, restore = self._undo.pop()
        restore()
        self.replaced.remove(name)
        self.left[name] = reason

    def require(self, what: str) -> Self:
        """This patch, if it replaced anything.

        Raises:
            ValueError: it replaced nothing; the message says what was looked for and why each candidate was left.
        """
        if self.replaced:
            return self
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.left.items())
        raise ValueError(f"{self.title}: found nothing to replace, expected {what}{reasons and ';' + reasons}")

    def undo(self) -> None:
        """Put everything back as it was before; a second call does nothing.

        Raises:
            RuntimeError: something was patched again since: undo the later patch first. Nothing is changed then.
        """
        if not self.active:
            return
        for name, untouched, _ in self._undo:
            if not untouched():
                raise RuntimeError(
                    f"{self.title}: {name} was changed again since this patch; undo the later change first"
                )
        for _, _, restore in reversed(self._undo):
            restore()
        self.active = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{self.title}: {len(self.replaced)} replaced{'' if self.active else ', undone'}"]
        lines += [f"  replaced  {name}" for name in self.replaced]
        lines += [f"  left      {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)

    __repr__ = __str__
