"""How a disposable process gives up what it will not need, before it touches bytes that anybody may have made.

Called by ``gate.py`` in its own process, once everything it needs is imported. Afterwards the process can compute, read
what it was handed and write its verdict, and nothing else: no file, no connection, no process, no thread. What cannot
be given up is an error; there is no weaker form.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import signal
import struct
import time
from pathlib import Path
from typing import Final

# Numbers of the system calls that stay, by machine; every other one fails with EPERM. Memory, signals, time, locks,
# chance, what is already open, and the way out. From the kernel's asm/unistd_64.h and asm-generic/unistd.h.
_SYSTEM_CALLS: Final = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "getpid": (39, 172),
    "exit": (60, 93),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "exit_group": (231, 94),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
}
# Machine: column above, the audit architecture that numbers are only valid for, number of seccomp(2).
_MACHINES: Final = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SECCOMP_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL_WITH_EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000

_NICENESS: Final = 10
_FILES_MAX: Final = 8


class NoSandboxError(Exception):
    """This machine or kernel cannot confine a process as is required."""


def confine(parent: int, memory_bytes: int, cpu_s: int) -> None:
    """Confine this process for good: limits, no files, no network, no other process; it dies with its parent.

    Args:
        parent: process id of the parent.
        memory_bytes: address space it may take beyond what it has now.
        cpu_s: seconds of processor time it may take beyond what it has taken; then SIGXCPU ends it.

    Raises:
        NoSandboxError: a step failed; nothing from outside may be read.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise NoSandboxError("the parent died before this process was bound to it")
    _call(libc.prctl, _PR_SET_DUMPABLE, 0, 0, 0, 0)
    os.nice(_NICENESS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    address_bytes = pages * resource.getpagesize() + memory_bytes
    cpu_total_s = math.ceil(time.process_time()) + cpu_s
    for limit, soft, hard in (
        (resource.RLIMIT_AS, address_bytes, address_bytes),
        (resource.RLIMIT_CPU, cpu_total_s, cpu_total_s + 1),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NOFILE, _FILES_MAX, _FILES_MAX),
    ):
        resource.setrlimit(limit, (soft, hard))
    _leave_few_system_calls(libc)


def _leave_few_system_calls(libc: ctypes.CDLL) -> None:
    if platform.machine() not in _MACHINES:
        raise NoSandboxError(f"no list of system calls for {platform.machine()}")
    column, architecture, seccomp = _MACHINES[platform.machine()]
    numbers = [by_machine[column] for by_machine in _SYSTEM_CALLS.values()]
    # Classic BPF over (number at 0, architecture at 4): kill for a foreign architecture, whose numbers mean other
    # calls; a jump to the last instruction for each number that stays.
    program = [(_LOAD, 0, 0, 4), (_JUMP_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_JUMP_IF_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(_RETURN, 0, 0, _FAIL_WITH_EPERM), (_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    head = struct.pack("@HP", len(program), ctypes.addressof(code))
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call(libc.syscall, seccomp, _SECCOMP_SET_MODE_FILTER, _ALL_THREADS, ctypes.c_char_p(head))


def _call(function: ctypes._NamedFuncPointer, *arguments: int | ctypes.c_char_p) -> None:
    # The C functions are variadic: a plain int would be passed as 32 bits, with rubbish above them.
    longs = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    if function(*longs) != 0:
        raise NoSandboxError(f"{function.__name__}{arguments[:1]}: {os.strerror(ctypes.get_errno())}")
