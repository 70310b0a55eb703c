"""Memory of a GPU that is none: a file that two processes map, in the place of the server's `CudaMemory`.

With it the GPU pipeline runs where there is no GPU: torch's tensors are then on the CPU. It raises where the real
memory would be used in a way that is not allowed, and notes its calls where the stand-in does.
"""

import mmap
import os
import tempfile


class DeviceTwin:
    """See `CudaMemory`, whose methods it has."""

    @staticmethod
    def device(torch, gpu):
        return torch.device("cpu")

    def __init__(self, torch, gpu, size, handle=b""):
        self._torch, self._opened, self.handle = torch, bool(handle), b""
        if handle:
            self._path = handle.rstrip(b"\0").decode()
            # By whom it is open is told beside the file.
            with open(self._path + ".open", "w") as file:
                file.write(str(os.getpid()))
        else:
            descriptor, self._path = tempfile.mkstemp(prefix="rlcore-")
            os.ftruncate(descriptor, size)
            os.close(descriptor)
            self.handle = self._path.encode().ljust(64, b"\0")
        with open(self._path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), size)

    def tensor(self, offset, shape, kind):
        dtype, count = getattr(self._torch, kind), 1
        for length in shape:
            count *= length
        if not count:
            return self._torch.zeros(shape, dtype=dtype)
        return self._torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).reshape(shape)

    def synchronize(self):
        self._log("synchronize")

    def _log(self, name):
        if os.environ.get("ISAACGYM_STANDIN_CALLS"):
            with open(os.environ["ISAACGYM_STANDIN_CALLS"], "a") as file:
                file.write("%s %s\n" % (name, "opened" if self._opened else "allocated"))

    def close(self):
        if self._path is None:
            return
        self._log("close")
        path, self._path = self._path, None
        if self._opened:
            os.remove(path + ".open")
            return
        os.remove(path)
        if os.path.exists(path + ".open"):
            with open(path + ".open") as file:
                process = file.read()
            os.remove(path + ".open")
            if os.path.exists("/proc/" + process):
                raise RuntimeError("memory is given back while another process has it open")
