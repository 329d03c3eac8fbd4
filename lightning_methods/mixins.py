"""Mixins: the method travels with the model class.

A mixin stands before LightningModule, and its settings in a class or instance attribute::

    class LitNet(IKLDistillationMixin, LightningModule):
        ikl = {"teacher": "timm:resnet34", "student_logits": "module.head"}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from lightning_methods.attach import Method
from lightning_methods.attach._lightning import MisconfigurationException
from lightning_methods.callbacks import IKLDistillation


class MethodMixin:
    """Returns a method's callback from `configure_callbacks`, the same one at every call.

    Attributes:
        method: The callback's class.
        settings: Name of the attribute that holds the callback's arguments.

    Raises:
        MisconfigurationException: If the mixin stands behind LightningModule in the list of bases (its
            `configure_callbacks` would never be called), if the settings are missing, or if the Trainer has a
            callback of that type too (Lightning would drop it in silence).
    """

    method: ClassVar[type[Method]]
    settings: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = [base for base in cls.__mro__ if base.__name__ == "LightningModule" or base is MethodMixin]
        if len(order) > 1 and order[0] is not MethodMixin:
            mixin = next(base for base in cls.__mro__ if issubclass(base, MethodMixin) and base is not cls)
            raise MisconfigurationException(
                f"{cls.__name__}: write `class {cls.__name__}({mixin.__name__}, LightningModule)`; behind "
                f"LightningModule the mixin is never asked for its callback."
            )

    def configure_callbacks(self) -> list[Any]:
        """Called by Lightning at the start of every run."""
        given: Any = super().configure_callbacks()  # type: ignore[misc]
        callback = self._method_callback()
        trainer = getattr(self, "_trainer", None)
        for other in getattr(trainer, "callbacks", ()):
            if other is not callback and isinstance(callback, type(other)) and type(other).__module__ != "builtins":
                raise MisconfigurationException(
                    f"{type(self).__name__} brings {callback!r} through its mixin, and the Trainer has {other!r}; "
                    f"Lightning would drop the Trainer's. Use one of the two."
                )
        return [*(given if isinstance(given, (list, tuple)) else [given]), callback]

    def _method_callback(self) -> Any:
        # Outside of the module: a deep copy of the module must not copy the callback and its teacher.
        own = _CALLBACKS.setdefault(self, {})
        if self.settings not in own:
            settings = getattr(self, self.settings, None)
            if not isinstance(settings, Mapping):
                raise MisconfigurationException(
                    f"{type(self).__name__}.{self.settings} should be a dict of {self.method.__name__}'s arguments, "
                    f"but is {settings!r}."
                )
            own[self.settings] = self.method(**settings)
        return own[self.settings]


_CALLBACKS: WeakKeyDictionary[MethodMixin, dict[str, Any]] = WeakKeyDictionary()


class IKLDistillationMixin(MethodMixin):
    """Carries `lightning_methods.callbacks.IKLDistillation`; settings in `ikl`."""

    method = IKLDistillation
    settings = "ikl"
