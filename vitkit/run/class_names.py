"""What a model's classes are called, and which one a person means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitkit.errors import ConfigError, nearest


@dataclass(frozen=True)
class ClassNames:
    """`names` in the order of the head; `others` are further spellings of them, lower case, and the index of each."""

    names: list[str]
    others: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, vit: Any, say: Callable[[str], object]) -> ClassNames:
        """Names of the passport; ImageNet-1k's where weights that are not a run have its 1000 classes; else numbers."""
        passport = vit.passport
        count = getattr(vit, "num_classes", 0)
        if passport.classes and len(passport.classes) == count:
            names = list(passport.classes)
            return cls(names, {name.lower(): i for i, name in enumerate(names)})
        numbers = {str(i): i for i in range(count)}
        if count == 1000 and passport.base.get("kind") in ("timm", "file"):
            say("the weights do not name their 1000 classes: ImageNet-1k's names are used")
            return _imagenet(numbers)
        return cls(list(numbers), numbers)

    def index(self, word: str) -> int | None:
        """The class that `word` names, if there is one; a name spelled exactly goes before other spellings."""
        if word in self.names:
            return self.names.index(word)
        return self.others.get(word.strip().lower().replace("_", " "), self.others.get(word.strip().lower()))

    def find(self, words: Sequence[str]) -> list[int]:
        """Indices of the classes named; ConfigError with the nearest names where there is none."""
        found = []
        for word in words:
            index = self.index(word)
            if index is None:
                if not self.names:
                    raise ConfigError("this model has no classes", fix="leave classes out, or adapt it first")
                close = nearest(word.lower(), self.others)
                hint = f"did you mean {' or '.join(dict.fromkeys(self.names[self.others[one]] for one in close))}? "
                some = ", ".join(self.names[:12]) + (", ..." if len(self.names) > 12 else "")
                raise ConfigError(f"there is no class '{word}'", fix=f"{hint if close else ''}classes: {some}")
            found.append(index)
        return list(dict.fromkeys(found))


def _imagenet(numbers: dict[str, int]) -> ClassNames:
    """Names and synonyms from timm; the first synonym is shown."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    lines = [info.index_to_description(i) for i in range(1000)]
    others = dict(numbers)
    for i, line in enumerate(lines):
        for word in (line, *line.split(", "), info.index_to_label_name(i)):
            others.setdefault(word.lower(), i)
    return ClassNames([line.split(", ")[0] for line in lines], others)
