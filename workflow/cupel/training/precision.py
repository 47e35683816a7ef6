"""What the precision `auto` means on the machine at hand.

bf16 pays where a processor multiplies it in hardware. Elsewhere it is emulated: on a CPU with AVX2 alone, training in bf16
was nine times slower than in fp32 (benchmarks/README.md), so that a setting which is right for one laptop is wrong for
the next.
"""

import torch


def bf16_in_hardware(device: str | torch.device) -> bool:
    """Whether a device multiplies bfloat16 itself: GPUs since Ampere; CPUs with AMX, AVX512-BF16 or Arm's BF16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(present for name, present in capabilities.items() if name.endswith("bf16"))


def settled(settings: dict, device: str | torch.device) -> dict:
    """Settings in which every `precision: auto`, however deep, has become `bf16` or `fp32`; nothing else changes.

    A job settles its settings before it does anything, so that checkpoints, records and fingerprints name what was used.
    """
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            value = settled(value, device)
        elif (key, value) == ("precision", "auto"):
            value = "bf16" if bf16_in_hardware(device) else "fp32"
        found[key] = value
    return found
