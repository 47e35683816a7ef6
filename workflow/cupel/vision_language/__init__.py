"""BYE: poisoned samples of multimodal fine-tuning data found by the entropy of attention (bye SPEC).

    data        prepared records and pictures; beside it one file per dataset: easy_vqa, scienceqa, iconqa, flickr, rsvqa
    triggers    what an attacker paints on a picture
    poison      poisoned training sets and triggered test sets
    scoring     clean performance, attack success, detection
    models      LLaVA and InternVL, and a small LLaVA built here
    training    LoRA fine-tuning
    inference   greedy answers
    entropy     attention entropy per layer
    filter      sensitive layers, mixture, what is removed
    baselines   the defences BYE is compared with
"""
