"""Memory that temporaries give back is kept, and that of layers is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from lowra.allocator import keep_temporaries
torch.set_num_threads(1)

def faults(numbers):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(numbers)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

torch.ones(10)
keep_temporaries(2**23)
print(faults(2**20), faults(2**22))  # 4 MB, kept; 16 MB, the system's
keep_temporaries()
print(faults(2**22))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_temporaries_are_kept_and_layers_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    kept, given_back, kept_again = (int(number) for number in done.stdout.split())
    # Pages of 4 kB, or of 2 MB where the system gives such: at least eight of 16 MB are fetched each time, or none.
    assert given_back >= 50 * 8
    assert kept < given_back / 4 / 5
    assert kept_again < given_back / 5
