"""How alike written and true texts are: ROUGE-L (rouge-score) and BLEU-4 (sacrebleu), with what intervals need.

CheXbert F1 and RadGraph F1, the clinical measures of radiology reports, need models that must be downloaded; they are not
computed here. ROUGE-L and BLEU count words in common: a report with the opposite finding may score high.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitkit.errors import DataError, MissingExtra


def rouge_l(said: Sequence[str], truths: Sequence[Sequence[str]]) -> np.ndarray:
    """F of the longest common subsequence of words (N,), against the best of each text's references; no stemming."""
    _same(said, truths)
    scorer = _rouge()
    return np.array(
        [max(scorer.score(t, s)["rougeL"].fmeasure for t in ts) for s, ts in zip(said, truths, strict=True)]
    )


def bleu_counts(said: Sequence[str], truths: Sequence[Sequence[str]]) -> np.ndarray:
    """What corpus BLEU adds up, (N, 10): matched and all 1- to 4-grams, length, and that of the reference nearest to it."""
    _same(said, truths)
    metric = _bleu()
    rows = []
    for text, references in zip(said, truths, strict=True):
        found = metric.sentence_score(text, list(references))
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.array(rows, float)


def bleu4(counts: np.ndarray) -> float:
    """Corpus BLEU-4 in [0, 1] of `bleu_counts` of any selection of texts; lower case, and as sacrebleu does by
    default 13a words and exponential smoothing of orders without a match."""
    total = np.asarray(counts, float).sum(0)
    metric = _bleu()
    found = metric.compute_bleu(
        correct=[int(v) for v in total[:4]],
        total=[int(v) for v in total[4:8]],
        sys_len=int(total[8]),
        ref_len=int(total[9]),
        smooth_method="exp",
    )
    return float(found.score) / 100


def most_frequent(texts: Sequence[Sequence[str]]) -> str:
    """The text that occurs most often; of equally frequent ones the one that has most in common with a hundred others."""
    counts = Counter(text for cell in texts for text in cell)
    most = max(counts.values())
    names = [text for text, count in counts.items() if count == most]
    if len(names) == 1:
        return names[0]
    every = max(1, len(names) // 100)
    some = names[::every][:100]
    means = [float(np.mean(rouge_l([name] * len(some), [[other] for other in some]))) for name in some]
    return some[int(np.argmax(means))]


def _same(said: Sequence[str], truths: Sequence[Sequence[str]]) -> None:
    if len(said) != len(truths) or not all(len(one) for one in truths):
        raise DataError(f"{len(said)} written texts for {len(truths)} images", fix="at least one true text an image")


def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtra("rouge-score", "text") from None
    return RougeScorer(["rougeL"], use_stemmer=False)


def _bleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise MissingExtra("sacrebleu", "text") from None
    return BLEU(lowercase=True, effective_order=True)  # sums of counts do not depend on it, and it says no warning
