"""Freed memory stays with the process, unless the user has said otherwise."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from groundup.base.memory import keep_freed_memory

is_kept = keep_freed_memory()
for _ in range(10):  # until the heap has its shape
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)  # 64 MiB, 16,384 pages
print(is_kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**variables: str) -> tuple[bool, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    out = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    is_kept, faults = out.stdout.split()
    return is_kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_freed_is_used_again() -> None:
    is_kept, faults = run()
    assert is_kept
    assert faults < 1000
    is_kept, faults = run(MALLOC_ARENA_MAX="4")
    assert not is_kept, "the user's own settings stay"
