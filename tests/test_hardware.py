"""What a record says of the machine: enough to tell apart two that compute at different speeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tffd_zoo import hardware
from tffd_zoo.hardware import describe_hardware, native_bf16

CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The capabilities that torch reports of a CPU with four cores and AVX512; a test adds to them."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(hardware, "cores_per_process", lambda: 4)
    return found


def test_a_cpu_is_told_by_its_make_cores_and_instructions(cpu: dict[str, Any]) -> None:
    cpu.update(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=True, amx_tile=True)
    assert describe_hardware(CPU) == "Intel Xeon (x86_64), 4 cores, AVX512 + bf16 + AMX"


def test_cpus_of_equally_wide_vectors_differ_by_what_they_do_in_bf16(cpu: dict[str, Any]) -> None:
    cpu.update(cpu_name="Some Make", avx512_bf16=False)
    assert describe_hardware(CPU) == "Some Make (x86_64), 4 cores, AVX512"
    cpu.update(avx512_bf16=True)
    assert describe_hardware(CPU) == "Some Make (x86_64), 4 cores, AVX512 + bf16"


def test_a_cpu_that_does_not_tell_its_make_is_a_cpu(cpu: dict[str, Any]) -> None:
    assert describe_hardware(CPU) == "CPU (x86_64), 4 cores, AVX512"


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "bf16"])
def test_any_instructions_for_bf16_make_it_native(cpu: dict[str, Any], instructions: str) -> None:
    assert not native_bf16(CPU)
    cpu[instructions] = True
    assert native_bf16(CPU)


def test_a_gpu_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device.index}")
    assert describe_hardware(torch.device("cuda", 3)) == "GPU number 3"


def test_other_devices_are_told_by_their_kind(cpu: dict[str, Any]) -> None:
    assert describe_hardware(torch.device("mps")) == "mps, x86_64"
    assert not native_bf16(torch.device("mps"))
