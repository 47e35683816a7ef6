"""Image classifiers: data sets, attacks, models, defences, and the stages from one to the next."""
