"""The attention of a victim, read into files: entropies of its training set, maps of a few test pictures."""

import time

import numpy as np

from cupel import cells, job
from cupel.files import atomic, write_json
from cupel.rng import rng
from cupel.vision_language import prepared
from cupel.vision_language.inputs import Inputs
from cupel.vision_language.stages import dtype_of

SHOWN = 3  # test pictures with maps


def read_attention(spec: dict, inputs: Inputs, outputs: dict, device: str) -> None:
    """Entropies of all training samples, and heat maps of some test samples without and with the trigger.

    Args:
        spec: of the victim.
        inputs: `victim`, `before`, `poisoned`, `data`, `triggered`. Of a failed victim, and where
            attention cannot be read, the outputs are empty and say so.
        outputs: paths `entropies` (parquet, see `entropy.extract`), `maps` (npz: `pictures` uint8 [2, K, 3, H, W] as the
            vision tower takes them, `maps` float32 [2, K, L, rows, columns], the second of two triggered) and `record`.
        device: `cpu` or `cuda`.
    """
    import pandas as pd

    from cupel.vision_language import entropy, models

    started = time.perf_counter()
    try:
        cells.past(inputs.before, inputs.victim)
        model = models.load(inputs.victim, dtype=dtype_of(spec), device=device)
        table = entropy.extract(model, models.as_records(prepared.load(inputs.poisoned, "train")), outputs["entropies"])
        seconds = time.perf_counter() - started
        pairs = [models.as_records(prepared.load(folder, "test")) for folder in (inputs.data, inputs.triggered)]
        chosen = np.sort(rng(0, "maps", spec["dataset"]).permutation(len(pairs[0]))[:SHOWN])
        shown = [[records[k] for k in chosen] for records in pairs]
        maps = np.stack([entropy.heat_maps(model, records) for records in shown])
        pictures = np.stack([models.Pictures(model, [record["image"] for record in records])(range(len(records))).numpy()
                             for records in shown])
    except Exception as error:
        failed = {"failed": cells.failure(error)}
        with atomic(outputs["entropies"]) as temporary:
            pd.DataFrame({"id": []}).to_parquet(temporary)
        cells.write_tensors(outputs["maps"], {})
        write_json(outputs["record"], failed)
        return
    cells.write_tensors(outputs["maps"], {"pictures": pictures, "maps": maps.astype(np.float32)})
    write_json(outputs["record"], {
        "samples": len(table), "layers": maps.shape[2], "image_tokens": model.image_tokens, "seconds": seconds,
        "samples_per_second": len(table) / seconds, "questions": [record["question"] for record in shown[0]],
        "answers": [record.get("answer", "") for record in shown[0]], "device": device, **job.costs()})
