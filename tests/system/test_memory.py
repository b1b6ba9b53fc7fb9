"""How much memory a device has."""

import os

import torch

from triton_lstm.system import memory


def test_of_the_machine_or_less(tmp_path, monkeypatch):
    cpu, whole = torch.device("cpu"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "missing", limit))
    assert memory.memory_of(cpu) == whole
    for text, expected in (("max\n", whole), ("123456789\n", 123456789), (f"{1 << 63}\n", whole)):
        limit.write_text(text)
        assert memory.memory_of(cpu) == expected


def test_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index, 1000 + device.index))
    assert memory.memory_of(torch.device("cuda", 1)) == 1001
