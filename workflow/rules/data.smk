rule prepare_dataset:
    output:
        images_train=f"{DATA}/{{dataset}}/train_images.npy",
        labels_train=f"{DATA}/{{dataset}}/train_labels.npy",
        images_test=f"{DATA}/{{dataset}}/test_images.npy",
        labels_test=f"{DATA}/{{dataset}}/test_labels.npy",
        manifest=f"{DATA}/{{dataset}}/manifest.json",
    log:
        "logs/data/{dataset}.log",
    benchmark:
        f"{config['results']}/benchmark/data/{{dataset}}.tsv"
    retries: 1
    resources:
        mem_mb=memory_of(2000),
        runtime=60,
    params:
        sources=config["data"]["sources"],
        mirror=config["data"]["mirror"],
        cache=config["data"]["cache"],
    script:
        "../scripts/prepare_dataset.py"
