"""The sentences of `vitkit compare A B --data D`: what was found, how sure it is, and what cannot be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitkit.run.comparing import p_words
from vitkit.run.helped_measure import DUPLICATE, VIEW, Found

if TYPE_CHECKING:
    from vitkit.run.helped_gain import Gain
    from vitkit.run.helped_models import Side

WORDS = {"linear": "linear probe", "knn": "kNN", VIEW: "found again in another view", DUPLICATE: "near-duplicate found"}
METRICS = {"mean_auc": "mean AUC", "auc": "AUC", "found again": "images"}
MINUS = "\N{MINUS SIGN}"


def outcome(found: Found) -> str:
    """ "better", "worse" (B than A), "same" features, or "unclear"."""
    if found.same:
        return "same"
    if not found.main.proven:
        return "unclear"
    return "better" if found.main.difference.value > 0 else "worse"


def verdict(sides: Sequence[Side], found: Found) -> list[str]:
    """The sentences about the user's own images, the one that decides first."""
    a, b = sides
    main, on = found.main, _on(found)
    if found.same:
        return [f"No difference: {a} and {b} give the same features on your images (p = 1; {on})."]
    if len(found.scored):
        return [*_labelled(a, b, main, on), *_second(found)]
    d = main.difference
    if main.proven:
        more = "more" if d.value > 0 else "less"
        said = (
            f"Without labels there is a hint, not a proof: {b} finds an image again in another view {more} often than {a}: "
            f"{_percent(d.b)} against {_percent(d.a)} ({span(main)}; {on})."
        )
    else:
        said = (
            f"No difference could be shown without labels: {b} finds {_percent(d.b)} of your images again in another view, "
            f"{a} {_percent(d.a)} ({span(main)}; {on})."
        )
    return [said, _rank(found), "Labels of a hundred images or more would decide."]


def forgetting(sides: Sequence[Side], kept: Found | None, margin: float) -> tuple[bool | None, str]:
    """(True, False, or None where it cannot be told or was not asked; the sentence)."""
    if kept is None:
        return None, ""
    main, name, d = kept.main, kept.images.name, kept.main.difference
    what = "points" if len(kept.scored) else "points of images found again in another view"
    if kept.same:
        return False, f"B forgot nothing: on {name} both give the same features."
    change = f"{signed(d.value)} {what} on {name}" + (f" ({span(main)})" if has(d) else "")
    if not has(d):
        return None, f"Whether B forgot something cannot be told: {change} ({d.note})."
    if d.low > 0 and main.proven:
        return False, f"B did not forget, it even improved: {change}."
    if main.proven and d.value < 0:
        little = f"; more than {margin:g} points can be ruled out" if 100 * d.low > -margin else ""
        return True, f"B forgot some of what {sides[0]} knew: {change}{little}."
    if 100 * d.low > -margin:
        return False, f"B did not forget: {change}; a loss of more than {margin:g} points can be ruled out."
    return (
        None,
        f"Whether B forgot something cannot be told: {change}; a loss up to {-100 * d.low:.1f} points is possible.",
    )


def _labelled(a: Side, b: Side, main: Gain, on: str) -> list[str]:
    """The sentence that decides, and where nothing was shown another one about what can be excluded."""
    d, what = main.difference, metric_words(main)
    points = f"{abs(100 * d.value):.1f} points of {what}"
    if main.proven:
        way = "better" if d.value > 0 else "worse"
        return [f"{b} is {way} than {a} on your images by {points} ({span(main)}; {on})."]
    if d.value == 0 and not has(d):
        return [f"No difference could be shown on your images: {b} and {a} score the same {what} ({d.note}; {on})."]
    way = "above" if d.value > 0 else "below"
    scores = f"{b} scores {points} {way} {a}" if d.value else f"{b} and {a} score the same {what}"
    said = [f"No difference could be shown on your images: {scores} ({span(main)}; {on})."]
    return [*said, _reach(100 * d.high, -100 * d.low)] if has(d) else said


def _reach(gain: float, loss: float) -> str:
    """What the interval excludes; one end may lie on the other side of zero."""
    if gain < 0.05:
        return f"A loss of more than {loss:.1f} points is unlikely, and so is any gain."
    if loss < 0.05:
        return f"A gain of more than {gain:.1f} points is unlikely, and so is any loss."
    return f"A gain of more than {gain:.1f} or a loss of more than {loss:.1f} points is unlikely."


def _second(found: Found) -> list[str]:
    """What kNN says beside the linear probe."""
    second = found.gain("knn")
    if second is None:
        return []
    main, d = found.main, second.difference
    shown = signed(d.value) + (f", {span(second)}" if has(d) else "")
    if second.proven and main.proven:
        same = (d.value > 0) == (main.difference.value > 0)
        return [f"kNN agrees ({shown})."] if same else [f"But kNN says the opposite ({shown}): look at both."]
    if second.proven:
        return [f"kNN alone does show one ({shown})."]
    return [f"kNN alone does not show it ({shown})."] if main.proven else [f"Nor by kNN ({shown})."]


def _rank(found: Found) -> str:
    assert found.viewed is not None
    a, b = found.viewed.rank
    rose, value = b > a, found.main.difference.value
    words = f"the effective rank of the features {'rises' if rose else 'falls'} from {a:.0f} to {b:.0f}"
    if not found.main.proven:
        return f"{words[0].upper()}{words[1:]}."
    agrees = rose == (value > 0)
    return f"{words[0].upper()}{words[1:]}, which {'agrees' if agrees else 'does NOT agree: take the hint with care'}."


def _on(found: Found) -> str:
    if len(found.scored):
        return f"linear probe, {len(found.scored):,} {found.split} images"
    return f"{len(found.images if found.viewed is None else found.viewed.images):,} images"


# ---------------------------------------------------------------- numbers in words


def metric_words(gain: Gain) -> str:
    return METRICS.get(gain.metric, gain.metric.replace("_", " "))


def has(difference: Any) -> bool:
    """Whether there is an interval."""
    return not math.isnan(difference.low)


def span(gain: Gain) -> str:
    """ "95 % 1.0 to 5.2, p = 0.004", in points."""
    d = gain.difference
    return f"95 % {point(d.low)} to {point(d.high)}, {p_words(gain.p)}" if has(d) else p_words(gain.p)


def point(value: float) -> str:
    return f"{100 * value + 0.0:.1f}".replace("-0.0", "0.0").replace("-", MINUS)


def signed(value: float) -> str:
    """ "+2.4", in points."""
    return f"{100 * value:+.1f}".replace("-", MINUS)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
