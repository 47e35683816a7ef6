"""ACC, ASR and RA of a network, and what the papers derive from them (fst SPEC 8, ims SPEC 8).

All rates are fractions. ASR and RA share a denominator: test images whose true class is not the target.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cupel.evaluation.intervals import wilson

#: a purified model that keeps less than this share of its victim's use is destroyed (ours; a third of all accuracy is no price
#: that any of the papers calls acceptable)
KEPT = 2 / 3
#: what tells that a purified model is of use, one metric for each family: accuracy, clean performance, and the inverse of the
#: perplexity, which is the mean probability of a held-out token. Robust training has no victim that a defence could destroy
USE = {"acc": 1, "cp": 1, "perplexity": -1}


@dataclass(frozen=True)
class Rate:
    """A rate with the counts behind it."""

    successes: int
    n: int

    @property
    def value(self) -> float:
        """The fraction; NaN without samples."""
        return self.successes / self.n if self.n else float("nan")

    def record(self, name: str) -> dict:
        """Flat entries `name`, `name_n`, `name_low`, `name_high` (Wilson, 95 %)."""
        low, high = wilson(self.successes, self.n)
        return {name: self.value, f"{name}_n": self.n, f"{name}_low": low, f"{name}_high": high}


def rates(clean_predictions: np.ndarray, clean_labels: np.ndarray, triggered_predictions: np.ndarray,
          wanted: np.ndarray, true: np.ndarray) -> dict[str, Rate]:
    """ACC, ASR, RA.

    Args:
        clean_predictions, clean_labels: int64 [N], clean test images.
        triggered_predictions: int64 [M], stamped test images (none of the target class).
        wanted: int64 [M], labels the attacker wants.
        true: int64 [M], true labels.
    """
    return {
        "acc": Rate(int((clean_predictions == clean_labels).sum()), len(clean_labels)),
        "asr": Rate(int((triggered_predictions == wanted).sum()), len(wanted)),
        "ra": Rate(int((triggered_predictions == true).sum()), len(true)),
    }


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often each true class (rows) was taken for which class (columns), int64 [K, K], of labels int64 [N] below K."""
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def effects(before: dict, after: dict, stream: np.random.Generator) -> dict[str, float]:
    """DER, ARR and RDR of a purified model, each with a 95 % interval; of a victim without a backdoor ARR alone.

    The interval is a parametric bootstrap over the finite test sets: every rate is drawn again as a binomial of its n.
    Before and after are drawn apart although they share the test images, so it is rather too wide than too narrow.

    Args:
        before, after: records (`Rate.record`) of the victim and of the purified model, with acc and its n, and for an
            attacked victim asr, ra and theirs.
        stream: of 2000 draws.

    Returns:
        `der`, `der_low`, `der_high`, `der_n` (of the smallest sample), and so on.
    """
    def drawn(record: dict, name: str) -> np.ndarray:
        n = record[f"{name}_n"]
        return stream.binomial(n, record[name], 2000) / n

    acc = drawn(before, "acc"), drawn(after, "acc")
    acc_before = np.maximum(acc[0], 1 / before["acc_n"])
    found, n = {"arr": arr(before["acc"], after["acc"])}, after["acc_n"]
    samples = {"arr": arr(acc_before, acc[1])}
    if "asr" in after:
        n = min(n, after["asr_n"])
        found |= {"der": float(der(before["acc"], after["acc"], before["asr"], after["asr"])),
                  "rdr": rdr(before["acc"], after["ra"])}
        samples |= {"der": der(*acc, drawn(before, "asr"), drawn(after, "asr")), "rdr": rdr(acc_before, drawn(after, "ra"))}
    for name, values in samples.items():
        low, high = np.quantile(values, [0.025, 0.975])
        found |= {f"{name}_low": float(low), f"{name}_high": float(high), f"{name}_n": n}
    return found


def destroyed(before: Mapping, after: Mapping) -> bool:
    """Whether a purified model keeps less than `KEPT` of its victim's use (`USE`); of flat records."""
    return any(after[name] ** sign < KEPT * before[name] ** sign for name, sign in USE.items()
               if name in before and name in after)


def der(acc_before: float, acc_after: float, asr_before: float, asr_after: float) -> float:
    """Defence effectiveness rating in [0, 1]; 0.5 is no effect (backdoorbench SPEC 6, with its documented signs)."""
    return (np.maximum(0.0, asr_before - asr_after) - np.maximum(0.0, acc_before - acc_after) + 1) / 2


def arr(acc_before: float, acc_after: float) -> float:
    """Accuracy reduction ratio, 1 − ACC_after / ACC_before (ims SPEC 8, Eq. 8); lower is better."""
    return 1 - acc_after / acc_before


def rdr(acc_before: float, ra_after: float) -> float:
    """Recovery difference ratio, 1 − RA_after / ACC_before (ims SPEC 8, Eq. 9); lower is better."""
    return 1 - ra_after / acc_before
