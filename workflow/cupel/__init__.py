"""Cupel: five papers on removing backdoors and on robustness, reproduced in one pipeline.

The library knows nothing of Snakemake: every function here can be called from a notebook as well.

    datasets    prepared, memory-mapped arrays from checksummed sources, and the splits of the papers
    attacks     triggers and poison records, one file each
    models      classifiers that take pixels in [0, 1] and know their penultimate features
    training    the one training engine
    defences    purification methods, one file each
    evaluation  ACC, ASR, RA, their intervals, and the verdict on a claim
    reporting   tables, figures and pages
"""

__version__ = "0.1.0"
