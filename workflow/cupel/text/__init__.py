"""Backdoored language models (CROW).

    data        texts: known data sets, poisoned sets, prompts and samples
    triggers    what is inserted into instructions; plugins add their own
    models      where models come from (`known`), loading; `layers` are the parts of a decoder
    training    adapters of victims and defences; `consistency` is CROW's objective
    defences    one file each; plugins add their own
    evaluation  what a model is measured by: generation, scoring (`careful`), inconsistency, humaneval
    labelled    how often the rules of scoring are wrong, on answers labelled by hand
    stages      from files to files

Nothing is imported here: most modules need torch and transformers, the data side needs neither.
"""
