"""Where everything lies: every path pattern of a run, once.

A result is a cell and its path is its name. The family stands in every path, so that no path can be made by rules of two.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_VICTIM = "{dataset}/{model}/{recipe}/{attack}@{rate}/seed{seed}"
_NETWORK = "{dataset}/{model}/{recipe}/{defence}/seed{seed}"

#: family -> stage -> pattern under results/<scale>/<family>
STAGES: Mapping[str, Mapping[str, str]] = {
    "images": {
        "trigger": "triggers/{dataset}/{model}/{recipe}/{attack}/seed{seed}",
        "victim": f"victims/{_VICTIM}",
        "purified": f"purified/{_VICTIM}/{{defence}}@{{budget}}",
    },
    "robust": {
        "trained": f"trained/{_NETWORK}",
        "attacked": f"attacked/{_NETWORK}/{{evaluation}}",
    },
    "text": {
        "victim": f"victims/{_VICTIM}",
        "purified": f"purified/{_VICTIM}/{{defence}}@{{budget}}",
    },
    "vision_language": {
        "base": "bases/{dataset}/{model}/seed{seed}",
        "poisoned": "poisoned/{dataset}/{attack}@{rate}/seed{seed}",
        "triggered": "triggered/{dataset}/{attack}/seed{seed}",
        "victim": f"victims/{_VICTIM}",
        "filtered": f"filtered/{_VICTIM}",
        "purified": f"purified/{_VICTIM}/{{defence}}",
    },
}


@dataclass(frozen=True)
class Paths:
    """The paths of one run.

    Args:
        results: root of all results.
        scale: name.
        data: root of prepared data: `<data>/<family>/<dataset>`, `<data>/language_models/<model>`.
    """

    results: str
    scale: str
    data: str

    @property
    def root(self) -> str:
        """Results of this scale."""
        return f"{self.results}/{self.scale}"

    def stage(self, family: str, stage: str) -> str:
        """Pattern of a stage's folder, with wildcards in braces."""
        return f"{self.root}/{family}/{STAGES[family][stage]}"

    def cell(self, cell: Mapping[str, str]) -> str:
        """Folder of a cell, a dict with family, stage and what the pattern names."""
        return self.stage(cell["family"], cell["stage"]).format(**cell)

    def paper(self, paper: str = "{paper}") -> str:
        """Folder of a paper's tables, figures and claims."""
        return f"{self.root}/papers/{paper}"

    def log(self, pattern: str, name: str) -> str:
        """Log of a job whose outputs lie in `pattern`."""
        return f"logs/{pattern.removeprefix(self.results + '/')}/{name}.log"

    def benchmark(self, pattern: str, name: str) -> str:
        """Seconds and memory of a job whose outputs lie in `pattern`."""
        return f"{self.results}/benchmark/{pattern.removeprefix(self.results + '/')}/{name}.tsv"
