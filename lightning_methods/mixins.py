"""Mixins: the method travels with the model class.

A mixin stands before LightningModule, and its settings in a class or instance attribute::

    class LitNet(IKLDistillationMixin, LightningModule):
        ikl = {"teacher": "timm:resnet34", "student_logits": "module.head"}
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from lightning_methods.attach import Method
from lightning_methods.attach._lightning import MisconfigurationException
from lightning_methods.callbacks import (
    UMIL,
    AdaClustFormer,
    AlignBeforeFuse,
    EqSim,
    IKLDistillation,
    ProReg,
    StillMix,
    TrajectoryWordAlignment,
    VideoAugment,
)


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
        if own := vars(cls).get("configure_callbacks"):
            cls.configure_callbacks = _joined(own)  # type: ignore[assignment, method-assign]

    def configure_callbacks(self) -> list[Any]:
        """Called by Lightning at the start of every run."""
        return self._with_methods(super().configure_callbacks())  # type: ignore[misc]

    def _with_methods(self, given: Any) -> list[Any]:
        callbacks = list(given) if isinstance(given, (list, tuple)) else [given]
        for callback in self._method_callbacks():
            self._refuse_clash(callback)
            if callback not in callbacks:
                callbacks.append(callback)
        return callbacks

    def _method_callbacks(self) -> Iterator[Any]:
        # Looked up on each mixin, not on self: a class may have several, and attributes of these names.
        own = _CALLBACKS.setdefault(self, {})
        for mixin in type(self).__mro__:
            if not issubclass(mixin, MethodMixin) or _is_module(mixin) or "method" not in vars(mixin):
                continue
            if mixin not in own:
                own[mixin] = mixin.method(**self._settings_of(mixin))
            yield own[mixin]

    def _settings_of(self, mixin: type[MethodMixin]) -> Mapping[str, Any]:
        settings = getattr(self, mixin.settings, None)
        if not isinstance(settings, Mapping):
            raise MisconfigurationException(
                f"{type(self).__name__}.{mixin.settings} should be a dict of {mixin.method.__name__}'s arguments, "
                f"but is {settings!r}."
            )
        return settings

    def _refuse_clash(self, callback: Any) -> None:
        # What is left from fitting another module with this Trainer is Lightning's to replace.
        carried = [one for own in _CALLBACKS.values() for one in own.values()]
        for other in getattr(getattr(self, "_trainer", None), "callbacks", ()):
            if isinstance(callback, type(other)) and other not in carried:
                raise MisconfigurationException(
                    f"{type(self).__name__} brings {callback!r} through its mixin, and the Trainer has {other!r}; "
                    f"Lightning would drop the Trainer's. Use one of the two."
                )


def _is_module(cls: type) -> bool:
    return any(base.__name__ == "LightningModule" for base in cls.__mro__)


def _joined(configure: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """A class's own `configure_callbacks`, whose result the mixins join even if it does not ask `super()`."""

    @functools.wraps(configure)
    def configure_callbacks(self: Any) -> list[Any]:
        return self._with_methods(configure(self))  # type: ignore[no-any-return]

    return configure_callbacks


#: Outside of the modules: a deep copy of a module must not copy its callbacks and their teachers.
_CALLBACKS: WeakKeyDictionary[MethodMixin, dict[type[MethodMixin], Any]] = WeakKeyDictionary()


class EqSimMixin(MethodMixin):
    """Carries `lightning_methods.callbacks.EqSim`; settings in `eqsim`."""

    method = EqSim
    settings = "eqsim"


class IKLDistillationMixin(MethodMixin):
    """Carries `lightning_methods.callbacks.IKLDistillation`; settings in `ikl`."""

    method = IKLDistillation
    settings = "ikl"


class AdaClustFormerMixin(MethodMixin):
    """Carries `lightning_methods.callbacks.AdaClustFormer`; settings in `acf`."""

    method = AdaClustFormer
    settings = "acf"


class TrajectoryWordAlignmentMixin(MethodMixin):
    """Carries `lightning_methods.callbacks.TrajectoryWordAlignment`; settings in `twbert`."""

    method = TrajectoryWordAlignment
    settings = "twbert"


class AlignBeforeFuseMixin(MethodMixin):
    """Carries `lightning_methods.callbacks.AlignBeforeFuse`; settings in `twbert_align`."""

    method = AlignBeforeFuse
    settings = "twbert_align"


class UMILMixin(MethodMixin):
    """Carries `lightning_methods.callbacks.UMIL`; settings in `umil`."""

    method = UMIL
    settings = "umil"


class ProRegMixin(MethodMixin):
    """Carries `lightning_methods.callbacks.ProReg`; settings in `proreg`."""

    method = ProReg
    settings = "proreg"


class StillMixMixin(MethodMixin):
    """Carries `lightning_methods.callbacks.StillMix`; settings in `stillmix`."""

    method = StillMix
    settings = "stillmix"


class VideoAugmentMixin(MethodMixin):
    """Carries `lightning_methods.callbacks.VideoAugment`; settings in `stillmix_augment`."""

    method = VideoAugment
    settings = "stillmix_augment"
