"""Tables and figures of Feature Shift Tuning: what every paper on image classifiers shows."""

from cupel.reporting.images import draw

__all__ = ["draw"]
