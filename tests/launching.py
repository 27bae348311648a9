"""Start several processes that torch.distributed connects, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time


def launch(code, folder, *arguments, num_processes=2, timeout_s=240):
    """Run `code` in processes, as torchrun does; what each printed. One that fails or hangs fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    workers = []
    for rank in range(num_processes):
        with open(folder / f"{rank}.out", "w") as out, open(folder / f"{rank}.err", "w") as err:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-c", code, str(folder), *map(str, arguments)]
            workers.append(subprocess.Popen(command, env=os.environ | shared | own, stdout=out, stderr=err))
    end = time.monotonic() + timeout_s
    while any(worker.poll() is None for worker in workers):
        if time.monotonic() > end or any(worker.poll() for worker in workers):  # the others would wait for ever
            for worker in workers:
                worker.kill()
        time.sleep(0.1)
    errors = [(folder / f"{rank}.err").read_text()[-3000:] for rank in range(num_processes)]
    assert [worker.returncode for worker in workers] == [0] * num_processes, "\n".join(errors)
    return [(folder / f"{rank}.out").read_text() for rank in range(num_processes)]
