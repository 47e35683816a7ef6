# Prepared data: raw files from their sources, checked, as arrays, records or a model's folder


rule prepare_images:
    """An image data set as arrays: raw files fetched, checked by their hashes."""
    output:
        images_train=f"{DATA}/images/{{dataset}}/train_images.npy",
        labels_train=f"{DATA}/images/{{dataset}}/train_labels.npy",
        images_test=f"{DATA}/images/{{dataset}}/test_images.npy",
        labels_test=f"{DATA}/images/{{dataset}}/test_labels.npy",
        manifest=f"{DATA}/images/{{dataset}}/manifest.json",
    log:
        "logs/data/images/{dataset}.log",
    benchmark:
        f"{config['results']}/benchmark/data/images/{{dataset}}.tsv"
    retries: 1
    localrule: True
    resources:
        mem_mb=memory_of(2000),
        runtime=60,
    script:
        "../scripts/prepare_images.py"


rule prepare_text:
    """A data set of texts as records."""
    output:
        records=f"{DATA}/text/{{dataset}}/records.jsonl",
        manifest=f"{DATA}/text/{{dataset}}/manifest.json",
    log:
        "logs/data/text/{dataset}.log",
    benchmark:
        f"{config['results']}/benchmark/data/text/{{dataset}}.tsv"
    retries: 1
    localrule: True
    resources:
        mem_mb=memory_of(1000),
        runtime=30,
    script:
        "../scripts/prepare_text.py"


rule prepare_language_model:
    """A language model as a folder of the hub's form."""
    output:
        manifest=f"{DATA}/language_models/{{model}}/manifest.json",
    log:
        "logs/data/language_models/{model}.log",
    benchmark:
        f"{config['results']}/benchmark/data/language_models/{{model}}.tsv"
    retries: 1
    localrule: True
    resources:
        mem_mb=memory_of(4000),
        runtime=240,
    params:
        model=of_path(TEXT.source),
    script:
        "../scripts/prepare_language_model.py"


rule prepare_vision_language:
    """A data set of pictures with questions or captions."""
    output:
        manifest=f"{DATA}/vision_language/{{dataset}}/manifest.json",
    log:
        "logs/data/vision_language/{dataset}.log",
    benchmark:
        f"{config['results']}/benchmark/data/vision_language/{{dataset}}.tsv"
    retries: 1
    localrule: True
    resources:
        mem_mb=memory_of(4000),
        runtime=120,
    params:
        spec=of_path(VISION_LANGUAGE.source),
    script:
        "../scripts/prepare_vision_language.py"
