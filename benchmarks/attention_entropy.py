"""Attention entropy by the hook against full maps (`output_attentions=True`): samples per second and peak memory.

    python benchmarks/attention_entropy.py [--grid 24] [--layers 8] [--heads 16] [--width 512] [--samples 16] [--batch-size 4]

A LLaVA with random weights reads the same samples in three ways, each in a process of its own, in alternating rounds:

    hook      cupel.vision_language.entropy: SDPA, one row per layer, nothing after the last layer's
    maps      eager attention, all maps of a batch, same batch size
    official  one sample at a time through `generate` of one token with all maps, as the released code does

Time is CPU time on the CPU (so other programs on the machine matter little) and wall time on a GPU. Peak memory is what a
round needs above the loaded model: resident memory on the CPU, allocated memory on a GPU. The three must give the same
entropies. Ratios are the result; absolute figures depend on the machine. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
import torch


def entropies_of_maps(maps, ids, image_token: int) -> np.ndarray:
    """[B, L] of full maps, as the released code computes them."""
    found = []
    for layer in maps:
        row = layer[:, :, -1, :].mean(1).float()
        p = torch.stack([row[k][ids[k] == image_token] for k in range(len(row))])
        p = p / p.sum(1, keepdim=True)
        found.append(-(p * torch.log(p + 1e-8)).sum(1).cpu())
    return torch.stack(found, 1).numpy()


class Peak:
    """Largest memory within a block, in MB, above that at its start."""

    def __init__(self, device: str):
        self.device, self.running = device, True

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.002)

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            import psutil

            self.process = psutil.Process()
            self.start = self.most = self.process.memory_info().rss
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        return self

    def __exit__(self, *error):
        if self.device == "cuda":
            self.most = torch.cuda.max_memory_allocated()
        else:
            self.running = False
            self.thread.join()
        self.mb = (self.most - self.start) / 2**20


def child(way: str, options: argparse.Namespace) -> None:
    """Read lines, run one round for each, answer with JSON."""
    from cupel.vision_language import entropy, models
    from cupel.vision_language.filters import matrix

    torch.set_num_threads(options.threads)
    words = [f"word{k}" for k in range(200)]
    model = models.tiny_llava(words, image_size=14 * options.grid, patch_size=14, vision_width=options.width // 2,
                              vision_layers=max(options.layers // 2, 1), vision_heads=options.heads, width=options.width,
                              layers=options.layers, heads=options.heads, seed=0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model.network.to(options.device, dtype)
    draw = np.random.default_rng(0)
    records = [{"id": str(k), "question": " ".join(draw.choice(words, 40)),
                "image": draw.integers(0, 256, (14 * options.grid, 14 * options.grid, 3), dtype=np.uint8)}
               for k in range(options.samples)]
    encoder = models.Encoder(model, records)
    token = model.network.config.image_token_id
    size = 1 if way == "official" else options.batch_size
    if way != "hook":
        model.network.set_attn_implementation("eager")

    @torch.inference_mode()
    def run() -> np.ndarray:
        if way == "hook":
            return matrix(entropy.extract(model, records, batch_size=size))
        rows = []
        for first in range(0, len(records), size):
            batch = encoder.batch(range(first, min(first + size, len(records))))
            if way == "maps":
                maps = model.network(**batch, output_attentions=True, use_cache=False).attentions
            else:
                del batch["position_ids"]
                maps = model.network.generate(**batch, max_new_tokens=1, do_sample=False, output_attentions=True,
                                              return_dict_in_generate=True).attentions[0]
            rows.append(entropies_of_maps(maps, batch["input_ids"], token))
        return np.concatenate(rows)

    records, every = records[: options.batch_size], records
    run()  # warm
    records = every
    print(json.dumps({"parameters": model.network.num_parameters(), "length": int(encoder.lengths[0])}), flush=True)
    for _ in sys.stdin:
        clock = time.perf_counter if options.device == "cuda" else time.process_time
        start = clock()
        with Peak(options.device) as peak:
            found = run()
        print(json.dumps({"seconds": clock() - start, "mb": peak.mb, "entropies": found.tolist()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=int, default=24, help="image tokens per side")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--child", choices=("hook", "maps", "official"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return
    ways = ("hook", "maps", "official")
    running = {way: subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--child", way], text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for way in ways}
    about = [json.loads(running[way].stdout.readline()) for way in ways]
    print(f"{about[0]['parameters'] / 1e6:.1f} M parameters, {options.layers} layers, {options.heads} heads, "
          f"{about[0]['length']} tokens, {options.samples} samples, batch {options.batch_size}, {options.device}, "
          f"{options.threads} threads, torch {torch.__version__}, median of {options.rounds} alternating rounds")
    results: dict = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            running[way].stdin.write("go\n")
            running[way].stdin.flush()
            results[way].append(json.loads(running[way].stdout.readline()))
    for process in running.values():
        process.stdin.close()
        process.wait()
    seconds = {way: statistics.median(row["seconds"] for row in results[way]) for way in ways}
    memory = {way: max(row["mb"] for row in results[way]) for way in ways}
    for way in ways:
        print(f"{way}: {options.samples / seconds[way]:.2f} samples/s, peak {memory[way]:.0f} MB above the model")
    for way in ways[1:]:
        apart = np.abs(np.array(results["hook"][0]["entropies"]) - np.array(results[way][0]["entropies"])).max()
        print(f"hook against {way}: {seconds[way] / seconds['hook']:.2f} x samples/s, {memory['hook'] / memory[way]:.3f} of "
              f"the memory, entropies apart by at most {apart:.1e}")
    print(json.dumps({**vars(options), "torch": torch.__version__, "seconds": seconds, "mb": memory}))


if __name__ == "__main__":
    main()
