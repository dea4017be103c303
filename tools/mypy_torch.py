"""mypy plugin: what a module holds under a name that torch does not declare is `Any`, not `Tensor | Module`.

torch types `nn.Module.__getattr__` as a union, so `vit.patch_embed.proj.weight` is an error at every dot although it is right.
Declared attributes keep their types, and everything else is checked as usual.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Instance, Type, TypeOfAny, UnionType, get_proper_type

MODULE = "torch.nn.modules.module.Module"


class Torch(Plugin):
    """Answers for attributes of `nn.Module` and its subclasses that are found by `__getattr__` only."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _undeclared if fullname.startswith(MODULE + ".") else None


def _undeclared(context: AttributeContext) -> Type:
    found = get_proper_type(context.default_attr_type)
    if isinstance(found, UnionType):
        items = {item.type.fullname for item in map(get_proper_type, found.items) if isinstance(item, Instance)}
        if items == {"torch._tensor.Tensor", MODULE}:
            return AnyType(TypeOfAny.from_another_any, source_any=AnyType(TypeOfAny.explicit))
    return context.default_attr_type


def plugin(version: str) -> type[Plugin]:
    """Entry point of mypy."""
    return Torch
