"""Metrics of written answers and summaries, under seqio's signature of a metric: (targets, predictions) to percentages."""

import math
import statistics
from collections.abc import Callable, Sequence

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")

Metric = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """The percentage of predictions that are the target, but for white space around them."""
    same = [target.strip() == prediction.strip() for target, prediction in zip(targets, predictions, strict=True)]
    return {"accuracy": 100.0 * statistics.fmean(same)}


def f1_of(positive: str) -> Metric:
    """The F1 of one answer: the harmonic mean of precision and recall, 0 where nothing is found."""

    def f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        wanted = [target.strip() == positive for target in targets]
        found = [prediction.strip() == positive for prediction in predictions]
        both = sum(w and f for w, f in zip(wanted, found, strict=True))
        return {"f1": 100.0 * 2 * both / max(sum(wanted) + sum(found), 1)}

    return f1


def matthews_of(positive: str) -> Metric:
    """Matthews' correlation of one answer against all else, as CoLA is reported; 0 where it is not defined."""

    def matthews(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        wanted = [target.strip() == positive for target in targets]
        found = [prediction.strip() == positive for prediction in predictions]
        if len(set(wanted)) < 2 or len(set(found)) < 2:
            return {"matthews": 0.0}
        return {"matthews": 100.0 * statistics.correlation(wanted, found)}

    return matthews


def correlations(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Pearson's and Spearman's correlation of numbers, as STS-B is reported; 0 where all are equal.

    What is no number counts as -1, which no score is, after T5 (arXiv:1910.10683).
    """
    # Not above: importing it takes a second, and registering the tasks needs none of it.
    from scipy import stats

    wanted, found = ([_number(text) for text in texts] for texts in (targets, predictions))
    if len(set(wanted)) < 2 or len(set(found)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    coefficients = {"pearson": stats.pearsonr(wanted, found), "spearman": stats.spearmanr(wanted, found)}
    return {name: 100.0 * float(result.statistic) for name, result in coefficients.items()}


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return -1.0
    return number if math.isfinite(number) else -1.0


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """The mean F-measures of ROUGE (Lin 2004) with Porter's stemmer: 1, 2, L, and L of summaries whose lines are sentences.

    Raises:
      ImportError: the package `rouge-score` is not installed (the extra `eval`).
    """
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ImportError(f"ROUGE needs rouge-score ({error}); install t5x_ssm[eval].") from None
    scorer = rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(target, prediction) for target, prediction in zip(targets, predictions, strict=True)]
    return {name: 100.0 * statistics.fmean(score[name].fmeasure for score in scores) for name in ROUGE}
