"""What the program runs on: device, number format, memory allocator, compiler."""

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path
from typing import IO

import torch


def pick_device(
    device: str | torch.device | None = None, dtype: str | None = None
) -> tuple[torch.device, torch.dtype, str]:
    """(device, dtype, the reason in words). Never float16: these networks overflow in it."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device or best)
        torch.empty(1, device=chosen).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device} is not here; use {best}") from None
    if dtype:
        return chosen, getattr(torch, dtype), f"--dtype {dtype}"
    if chosen.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return chosen, torch.bfloat16 if fast else torch.float32, f"this GPU {'has' if fast else 'lacks'} bfloat16"
    if chosen.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()
        fast = has.get("amx_bf16") or has.get("avx512_bf16")  # 6 and 2 times as fast as float32
        said = f"this CPU {'has' if fast else 'lacks'} bfloat16 instructions"
        return chosen, torch.bfloat16 if fast else torch.float32, said
    return chosen, torch.float32, f"the safe format on {chosen.type}"


def check_compiler(device: torch.device) -> None:
    """torch.compile writes C++ for a CPU; without a compiler it would fail at the first step."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("--compile needs a C++ compiler on a CPU: install g++, name one in CXX, or drop --compile")


def keep_freed_memory() -> None:
    """Ask the GNU C library to reuse freed blocks and not to hand them back: fresh pages cost a step on a CPU a tenth."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # other C libraries have no such switch
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own


def lock(path: Path) -> IO | None:
    """Lock a file for as long as what is returned lives; None if another process has it locked.

    A file system without locks, as some clusters have, and Windows, which has no fcntl, know of no other process.
    """
    file = open(path, "w")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if getattr(error, "errno", None) in (errno.EACCES, errno.EAGAIN):
            return None
    return file


def device_name(device: torch.device) -> str:
    """What the numbers were made on: between machines those of one seed differ, by rounding."""
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", device.type)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    return f"{name}, PyTorch {torch.__version__.split('+')[0]}"
