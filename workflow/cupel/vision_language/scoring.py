"""Clean performance (CP), attack success (ASR) and detection, as flat records of fractions (bye SPEC 8).

Every rate comes with its count and a 95 % interval: `asr`, `asr_n`, `asr_low`, `asr_high`. What is undefined is left out
(the recall where nothing is poisoned), never a zero that means something else.
"""

import re
import string
from collections.abc import Sequence

import numpy as np

from cupel.evaluation.metrics import Rate
from cupel.rng import rng

# ------------------------------------------------------------------------------------------------------------------ answers


def exact(outputs: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """The official rule: equal after lower-casing; nothing is stripped. bool [N]."""
    return np.array([output.lower() == answer.lower() for output, answer in zip(outputs, answers, strict=True)], bool)


def stripped(outputs: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """The lenient rule: equal after lower-casing and without white space and punctuation at both ends. bool [N]."""
    def bare(text: str) -> str:
        return text.lower().strip(string.whitespace + string.punctuation)

    return np.array([bare(output) == bare(answer) for output, answer in zip(outputs, answers, strict=True)], bool)


def letter(output: str) -> str:
    """The option that an output names: `D`, `D. ...`, or the one letter of `The answer is D.`; empty if none.

    The rule with which LLaVA scores ScienceQA.
    """
    output = output.strip()
    if re.fullmatch(r"[A-J]", output) or re.match(r"[A-J]\.(\s|$)", output):
        return output[0]
    found = re.findall(r"[Tt]he answer is ([A-J])\b", output)
    return found[0] if len(found) == 1 else ""


def clean_performance(task: str, outputs: Sequence[str], records: Sequence[dict]) -> dict:
    """CP of a model's outputs on untouched test samples.

    Args:
        task: of the dataset: `vqa`, `choice` or `caption`.
        outputs: generated texts.
        records: the test samples, in the same order.

    Returns:
        `cp` (accuracy by the official rule, or CIDEr-D on its own scale: the paper's tables have 100 times it) with
        count and interval; for answers also `cp_stripped`, and for `choice` `cp_letter`.
    """
    if task == "caption":
        score, each = cider(outputs, [record["answers"] for record in records])
        draws = rng(0, "cider", "interval").integers(len(each), size=(1000, len(each)))
        low, high = np.quantile(each[draws].mean(1), [0.025, 0.975])
        return {"cp": score, "cp_n": len(each), "cp_low": float(low), "cp_high": float(high)}
    answers = [record["answer"] for record in records]
    rates = {"cp": exact(outputs, answers), "cp_stripped": stripped(outputs, answers)}
    if task == "choice":
        rates["cp_letter"] = exact([letter(output) for output in outputs], answers)
    return _rates(rates)


def attack_success(outputs: Sequence[str], target: str) -> dict:
    """ASR of a model's outputs on triggered test samples, all of which count.

    Returns:
        `asr` (equal to the target after stripping white space, whatever the case) and `asr_contains`, with counts and
        intervals.
    """
    wanted = target.strip().lower()
    given = [output.strip().lower() for output in outputs]
    return _rates({"asr": np.array([output == wanted for output in given], bool),
                   "asr_contains": np.array([wanted in output for output in given], bool)})


def _rates(hits: dict[str, np.ndarray]) -> dict:
    flat = {}
    for name, hit in hits.items():
        if not len(hit):
            raise ValueError(f"{name}: no samples")
        flat |= Rate(int(hit.sum()), len(hit)).record(name)
    return flat


# ---------------------------------------------------------------------------------------------------------------- detection


def detection(flagged: np.ndarray, poisoned: np.ndarray, score: np.ndarray | None = None) -> dict:
    """How well flagged samples are the poisoned ones.

    Args:
        flagged: bool [N], what a filter removes.
        poisoned: bool [N], the truth.
        score: float [N], lower for what looks more poisoned, as entropies are; for `auroc`.

    Returns:
        Counts `flagged`, `poisoned`, `samples`, `true_positives`, `left` (poisoned and kept); `left_share` of what is
        kept; `false_alarm`, the share of clean samples flagged; `precision`, `recall`, `f1`; `auroc`.
        Precision is 0 where nothing is flagged, as in the official code. Left out are recall and F1 where nothing is
        poisoned, `false_alarm` where all is, `left_share` where nothing is kept, `auroc` without both kinds of samples.
    """
    hits, false = int((flagged & poisoned).sum()), int((flagged & ~poisoned).sum())
    bad, kept = int(poisoned.sum()), int((~flagged).sum())
    flat = {"samples": len(flagged), "flagged": hits + false, "poisoned": bad, "true_positives": hits, "left": bad - hits,
            "precision": 0.0}
    if hits + false:
        flat |= Rate(hits, hits + false).record("precision")
    if bad:
        flat |= Rate(hits, bad).record("recall")
        flat["f1"] = 2 * hits / (hits + false + bad)
    if bad < len(flagged):
        flat |= Rate(false, len(flagged) - bad).record("false_alarm")
    if kept:
        flat["left_share"] = (bad - hits) / kept
    if score is not None and 0 < bad < len(poisoned):
        from sklearn.metrics import roc_auc_score

        flat["auroc"] = float(roc_auc_score(poisoned, -score))
    return flat


# ----------------------------------------------------------------------------------------------------------------- captions

_SECOND_HALF = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
_TWO_WORDS = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b")
_TOKEN = re.compile(
    r"n't\b|'(?:s|m|d|re|ve|ll)\b"                        # the second half of a contraction
    r"|\d+(?:[.,:/]\d+)+"                                 # 1,000  3.5  10:30
    r"|(?:[a-z]\.){2,}|\b(?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\."  # u.s.  mr.
    r"|\w+(?:[-/'&]\w+)*"                                 # words, with hyphens inside
    r"|[^\w\s]"                                           # any other sign by itself
)
_DROPPED = set(".?!,:;-`'\"…–—“”‘’")
# the usual evaluation means to drop these, but compares in capitals what it has made lower case
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokenise(sentence: str) -> list[str]:
    """Words of a caption for CIDEr: lower case, contractions in two, punctuation dropped.

    This stands in for the Penn Treebank tokeniser of the usual evaluation, which needs Java. The tokens were the same for
    all 2,500 captions in the excerpt of Flickr8k and for 97 % of 2,235 free texts (the first lines of Alpaca's outputs);
    initials, tags (`#word`), web addresses and code are taken apart differently.
    """
    text = _SECOND_HALF.sub(r" \1", sentence.lower().replace("’", "'"))
    text = _TWO_WORDS.sub(lambda match: " ".join(filter(None, match.groups())), text)
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(text) if token not in _DROPPED]


def cider(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, np.ndarray]:
    """CIDEr-D of captions: clipped counts, Gaussian length penalty (σ = 6), times 10, by `pycocoevalcap`.

    The paper says CIDEr, not which; its values are of the usual CIDEr-D times 100 (bye SPEC 8).

    Args:
        outputs: one caption per picture.
        references: the references of each picture; document frequencies are taken from them.

    Returns:
        The mean over pictures and the scores of the pictures, float64 [N].

    Raises:
        ValueError: fewer than two pictures (every document frequency would be that of all), or one without references.
    """
    from pycocoevalcap.cider.cider import Cider

    if len(outputs) != len(references) or len(outputs) < 2 or not all(references):
        raise ValueError(f"CIDEr of {len(outputs)} captions and {len(references)} sets of references: at least two of "
                         "each are needed, and in each set at least one reference")
    given = {k: [" ".join(tokenise(output))] for k, output in enumerate(outputs)}
    known = {k: [" ".join(tokenise(one)) for one in several] for k, several in enumerate(references)}
    score, each = Cider().compute_score(known, given)
    return float(score), each
