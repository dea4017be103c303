"""The collapse doctor: reads what a self-distillation run logs and says in words what goes wrong and what to do.

Every rule looks at a few records in a row, so that a moment is not taken for a state. A finding is said once, when it
first holds, and listed in the report with the step. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Records = list[Mapping[str, Any]]
WINDOW = 3  # records in a row that must agree


@dataclass(frozen=True)
class Facts:
    """What the records do not say: prototypes K, rows (large crops of a step, all processes), small crops an image, how
    targets are made, whether KoLeo is on, and steps in which the state at the start is normal."""

    prototypes: int
    rows: int
    local_crops: int = 8
    sinkhorn: bool = False
    koleo: bool = True
    dino_weight: float = 1.0
    grace: int = 0


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, since `step`: `what` in words with figures, `fix` what to try."""

    rule: str
    step: int
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}\n  try: {self.fix}"


@dataclass
class Doctor:
    """Takes the records of a run one by one; `findings` so far."""

    facts: Facts
    findings: list[Finding] = field(default_factory=list)
    _seen: Records = field(default_factory=list)
    first: Mapping[str, Any] | None = None

    def note(self, record: Mapping[str, Any]) -> list[Finding]:
        """What has newly come true with this record of the training log."""
        if "target_entropy" not in record:
            return []
        self.first = self.first or record
        self._seen = [*self._seen, record][-WINDOW:]
        new = []
        if len(self._seen) == WINDOW:
            known = {one.rule for one in self.findings}
            for rule, ask in RULES.items():
                said = ask(self) if rule not in known else None
                if said is not None:
                    new.append(Finding(rule, int(record["step"]), *said))
        self.findings += new
        return new

    def replay(self, records: Iterable[Mapping[str, Any]]) -> list[Finding]:
        """All findings of a finished log."""
        for record in records:
            self.note(record)
        return self.findings

    def values(self, name: str) -> list[float]:
        """The last values of a logged figure, oldest first; NaN where it was not logged."""
        return [float(record.get(name, math.nan)) for record in self._seen]

    def all(self, name: str, holds: Callable[[float], bool]) -> bool:
        return all(holds(value) for value in self.values(name))

    @property
    def step(self) -> int:
        return int(self._seen[-1]["step"])


Said = tuple[str, str] | None


def _preference(d: Doctor) -> str:
    return f"targets have {d.values('target_entropy')[-1]:.1%} of the entropy of no preference"


def _uniform(d: Doctor) -> Said:
    """Loss at ln K and targets without preference: nothing is asked and nothing is learnt."""
    f, top = d.facts, math.log(d.facts.prototypes)
    terms = (2 + 2 * f.local_crops) / (2 + max(2 * f.local_crops, 1))
    losses = [
        (a + b) / max(f.dino_weight, 1e-12) / terms
        for a, b in zip(d.values("dino_local"), d.values("dino_global"), strict=True)
    ]
    stuck = all(abs(loss - top) < 0.05 * top for loss in losses) and d.all("target_entropy", lambda v: v > 0.98)
    if not stuck or d.step <= f.grace or (f.sinkhorn and f.rows < 16):
        return None
    what = f"the heads answer uniformly: the loss stands at {losses[-1]:.2f}, and ln K is {top:.2f}; {_preference(d)}"
    return what, "a lower teacher_temp (published 0.04 to 0.07), a higher lr for longer, fewer prototypes"


def _one_prototype(d: Doctor) -> Said:
    """Every image gets the same prototype."""
    if d.facts.rows < 8 or not d.all("prototypes_used", lambda v: v < 1.5) or d.step <= d.facts.grace:
        return None
    used = d.values("prototypes_used")[-1]
    what = f"one-hot collapse: all images get the same prototype ({used:.2f} of {d.facts.prototypes:,} in use)"
    return (
        what,
        "centering=sinkhorn_knopp, or center_momentum 0.9 with a higher teacher_temp; a lower lr, a larger batch",
    )


def _twins(d: Doctor) -> Said:
    """Rows at no distance from each other: KoLeo is at its guard value and has no gradient that could part them."""
    if not d.facts.koleo or not d.all("twins", lambda v: v > 0.05):
        return None
    share = d.values("twins")[-1]
    what = (
        f"KoLeo is infinite for {share:.0%} of the images of a batch (held at {-math.log(1e-8):.0f} by its guard): they are "
        "identical to the model"
    )
    fix = "remove duplicate or blank images (vitkit check finds them); if they differ, the features have collapsed: a lower lr"
    return what, fix


def _teacher_is_student(d: Doctor) -> Said:
    """A step takes the teacher further than the distance that is left: a momentum below a half."""
    steps, gaps = d.values("teacher_step"), d.values("teacher_gap")
    if not all(step > gap for step, gap in zip(steps, gaps, strict=True)):
        return None
    what = (
        f"the teacher is the student: after a step their heads differ by {gaps[-1]:.2%}, less than the step itself, so the "
        "model only agrees with itself"
    )
    return what, "teacher_momentum 0.992 or more"


def _teacher_stands_still(d: Doctor) -> Said:
    moves = d.all("teacher_step", lambda v: v < 1e-9) and d.all("teacher_gap", lambda v: v > 1e-6)
    if not moves or not d.all("lr", lambda v: v > 0) or d.values("teacher_gap")[-1] < d.values("teacher_gap")[0]:
        return None
    away = d.values("teacher_gap")[-1]
    what = f"the teacher never moves: it stays what it was at the start, and the student is {away:.1%} away"
    return what, "teacher_momentum below 1, e.g. 0.992"


def _too_few_for_sinkhorn(d: Doctor) -> Said:
    f = d.facts
    if not f.sinkhorn or f.rows >= 16 or not d.all("target_entropy", lambda v: v > 0.9):
        return None
    what = f"the batch is too small for Sinkhorn: {f.rows} rows share {f.prototypes:,} prototypes equally; {_preference(d)}"
    return what, "a larger batch_size or more processes (64 images or more), or centering=centering"


def _rank(d: Doctor) -> Said:
    """Few directions are left of many, or all images have moved together."""
    if d.facts.rows < 8 or d.first is None:
        return None
    rank, near = (float(d.first[name]) for name in ("rank", "nearest"))
    fix = "a lower lr (or backbone_lr), koleo_weight 0.1 or more, drop_path below 0.3, guard=true with an anchor"
    if rank > 1.5 and d.all("rank", lambda v: v < max(1.2, 0.15 * rank)):
        now = d.values("rank")[-1]
        return f"rank collapse: the features of a batch spread over {now:.1f} directions, {rank:.1f} at first", fix
    if d.all("nearest", lambda v: v < min(0.05, 0.3 * near)):
        now = d.values("nearest")[-1]
        return f"rank collapse: an image is only {now:.3f} from its nearest neighbour, {near:.3f} at first", fix
    return None


RULES: dict[str, Callable[[Doctor], Said]] = {
    "uniform heads": _uniform,
    "one-hot collapse": _one_prototype,
    "identical images": _twins,
    "teacher is the student": _teacher_is_student,
    "teacher never moves": _teacher_stands_still,
    "batch too small for Sinkhorn": _too_few_for_sinkhorn,
    "rank collapse": _rank,
}


def table(findings: Iterable[Finding]) -> dict[str, Any]:
    """The report's table."""
    rows = [[one.rule, one.step, one.what, one.fix] for one in findings]
    rows = rows or [["none", None, "nothing that looks like a collapse was logged", ""]]
    return {
        "title": "Collapse doctor",
        "columns": ["finding", "since step", "what was seen", "what to try"],
        "rows": rows,
        "note": "",
    }
