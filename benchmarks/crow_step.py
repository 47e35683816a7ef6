"""Cost of a CROW update in plain LoRA updates on the same batch, in one run.

    python benchmarks/crow_step.py [--model FOLDER] [--length 128] [--precision bf16] [--threads 2] [--device cpu]

Without `--model` the network has SmolLM2-135M's shape (or a smaller one, by `--blocks`) and random weights, which cost the
same. Rounds alternate, medians are reported. Beside the ratio of times stands that of the floating point operations in matrix
products, which torch counts: no program of the same passes can be below it. Absolute figures depend on the machine. The last
line is JSON.
"""

import argparse
import json
import statistics
import time

import torch
from torch.profiler import profile

from cupel.compat import ensure_torchvision
from cupel.rng import torch_rng
from cupel.text import training
from cupel.text.consistency import Consistency, weigh
from cupel.text.models import PRECISIONS, load_model

ensure_torchvision()

from peft.helpers import disable_input_dtype_casting  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
VARIANTS = {
    "plain LoRA": None,
    "CROW": Consistency(),
    "CROW, code pairs, padding included": Consistency(pairs="code", padding="included"),
    "CROW, KL": Consistency(distance="kl"),
    "random signs": Consistency(perturbation="random_sign"),
    "zero perturbation (pure consistency)": Consistency(perturbation="zero"),
}


def network(blocks: int, precision: str) -> LlamaForCausalLM:
    """SmolLM2-135M's shape, with another number of blocks."""
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=blocks,
                         num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    return LlamaForCausalLM(config).to(PRECISIONS[precision])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = load_model(options.model, options.precision) if options.model else \
        network(options.blocks, options.precision)
    settings = training.TrainingSettings(precision=options.precision)
    training.quicken(base.to(options.device), options.length)
    model = training.add_lora(base, settings, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, base.config.vocab_size, (options.rows, options.length), generator=torch_rng(0, "tokens"))
    labels = ids.clone()
    labels[:, : options.length // 2] = -100  # the prompt
    batch = weigh({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    noise = training.signs([options.length] * options.rows, base.config.hidden_size, 0, 0)

    def update(consistency: Consistency | None) -> float:
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        random = noise if consistency and consistency.perturbation == "random_sign" else None
        sums = training.accumulate(model, [(batch, random)], consistency)
        optimizer.step()
        sums["loss_lm"].item()  # waits for the device
        return time.perf_counter() - begun

    print(f"{options.model or f'{options.blocks} blocks of SmolLM2-135M'}, {options.rows} x {options.length} tokens, "
          f"{options.precision}, {options.device}, {options.threads} threads, torch {torch.__version__}, "
          f"median of {options.rounds} alternating rounds")
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    operations = {}
    with disable_input_dtype_casting(model):
        for name, consistency in VARIANTS.items():    # these warm up as well
            with profile(with_flops=True) as counter:
                update(consistency)
            operations[name] = sum(row.flops for row in counter.key_averages() if row.key in PRODUCTS)
        for _ in range(options.rounds):
            for name, consistency in VARIANTS.items():
                seconds[name].append(update(consistency))
    plain, few = statistics.median(seconds["plain LoRA"]), operations["plain LoRA"]
    for name, spent in seconds.items():
        print(f"{name}: {statistics.median(spent):.3f} s, {statistics.median(spent) / plain:.2f} plain updates; "
              f"{operations[name] / 1e12:.2f} TFLOP, {operations[name] / few:.2f}")
    if options.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(json.dumps({**vars(options), "torch": torch.__version__, "seconds": seconds, "flop": operations}))


if __name__ == "__main__":
    main()
