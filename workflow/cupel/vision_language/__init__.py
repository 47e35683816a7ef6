"""BYE: poisoned samples of vision-language fine-tuning data found by the entropy of attention (bye SPEC).

    datasets     what is known of a dataset, one file each, and its way into a prepared folder
    prepared     the form of a prepared folder: records and pictures
    triggers     what an attacker paints on a picture
    poison       poisoned training sets and triggered test sets
    models       LLaVA and InternVL, small LLaVAs built here, and the encoder
    training     LoRA fine-tuning
    inference    greedy answers
    entropy      attention entropy per layer
    filters      BYE and the filters it is compared with
    purification defences that change test pictures
    scoring      clean performance, attack success, detection
    stages       the chain from files to files; beside it attention, detection and purification
"""
