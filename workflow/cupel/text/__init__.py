"""Backdoored language models (CROW): data, triggers, models, training, defences, generation and scores.

Nothing is imported here: most modules need torch and transformers, the data side needs neither.
"""
