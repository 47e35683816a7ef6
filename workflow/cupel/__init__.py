"""Cupel: five papers on removing backdoors and on robustness, reproduced in one pipeline.

The library knows nothing of Snakemake: every function here can be called from a notebook as well.

    experiment       what the papers ask for at a scale: cells and their settings; one planner for all families
    images           image classifiers: datasets, attacks, models, defences, stages
    robust           robust training: objectives, evaluations, stages
    text             language models: data, triggers, defences, scoring, stages
    vision_language  vision-language models: datasets, triggers, filters, models, stages
    training         the engine for classifiers, the loop for adapters, checkpoints
    evaluation       ACC, ASR, RA, their intervals, and the verdict on a claim
    reporting        tables, figures and pages that no paper owns
    paths, digest    where everything lies; what a job's code means
"""

__version__ = "0.1.0"
