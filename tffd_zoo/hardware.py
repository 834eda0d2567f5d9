"""What a device is and can do, as every record tells it whose figures depend on it."""

from __future__ import annotations

import platform

import torch

from .threads import cores_per_process

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # the last is Arm's


def describe_hardware(device: torch.device) -> str:
    """Return what computes on `device`: a GPU's name, or a CPU's make, cores and instructions.

    The cores are those that this process may run on. The width of vectors alone would not do: with AVX512 and without
    AMX, bf16 steps of a ResNet-32 take twice as long on one and the same CPU.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type}, {platform.machine()}"
    instructions = [torch.backends.cpu.get_cpu_capability()]
    instructions += ["bf16"] if native_bf16(device) else []
    instructions += ["AMX"] if multiplies_tiles(device) else []
    make = torch.cpu.get_capabilities().get("cpu_name") or "CPU"
    return f"{make} ({platform.machine()}), {cores_per_process()} cores, {' + '.join(instructions)}"


def native_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in BF16_INSTRUCTIONS)
    return False


def multiplies_tiles(device: torch.device) -> bool:
    """Whether `device` is a CPU that multiplies whole tiles of bf16: Intel's AMX."""
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_tile"))
