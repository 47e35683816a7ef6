"""Proper Network Interpretability Helps Adversarial Robustness in Classification (Boopathy et al., ICML 2020).

`models`: networks whose head is linear in the last feature map. `maps`: interpretation. `discrepancy`: how far two maps
lie apart, and the bound that holds for any attack. `objectives`: training. `attacks`, `aai`, `isa`, `unforeseen`:
evaluation. `released`: the authors' weights. Facts: proper_interpretability SPEC.
"""
