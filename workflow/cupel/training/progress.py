"""How far a long loop has come."""

import sys
import time

from tqdm import tqdm


class Progress:
    """One line per run on a terminal, a line now and then in a log."""

    def __init__(self, title: str, total: int, done: int = 0, every: float = 15.0, unit: str = "images"):
        self.terminal, self.unit = sys.stderr.isatty(), unit
        self.bar = tqdm(total=total, initial=done, desc=title, unit=f" {unit}", unit_scale=True, disable=not self.terminal,
                        leave=False)
        self.title, self.total, self.done, self.first, self.every = title, total, done, done, every
        self.begun = self.said = time.monotonic()

    def __call__(self, count: int, text: str = "") -> None:
        self.done += count
        self.bar.update(count)
        if self.terminal and text:
            self.bar.set_postfix_str(text, refresh=False)
        now = time.monotonic()
        if not self.terminal and text and (now - self.said >= self.every or self.done >= self.total):
            rate = (self.done - self.first) / max(now - self.begun, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            print(f"{self.title}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, {left:.0f} s left, {text}",
                  file=sys.stderr, flush=True)
            self.said = now

    def close(self) -> None:
        """End the line."""
        self.bar.close()
