"""Proper Network Interpretability Helps Adversarial Robustness in Classification (Boopathy et al., ICML 2020).

`models` networks whose head is linear in the last feature map; `maps` what is interpreted; `discrepancy` how far two maps
lie apart, and the bound that holds for any attack; `objectives` training; `attacks`, `aai`, `isa` evaluation; `released`
the authors' weights. SPEC of the paper: proper_interpretability; its numbering is used throughout the package.
"""
