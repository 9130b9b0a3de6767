"""An ONNX network from a wheel, run on the threads torch has been given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safelight.models import networks


class Net:
    """A session; `net(batch)` gives its first output.

    Args:
        path: The `.onnx` file.
        extra: The extra of Safelight that installs the runtime.

    Raises:
        MissingExtra: The runtime is not installed.
    """

    def __init__(self, path: Path, extra: str) -> None:
        runtime = networks.package("onnxruntime", extra)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        here = [name for name in wanted if name in runtime.get_available_providers()]
        self.session: Any = runtime.InferenceSession(str(path), options, providers=here)
        self.input = self.session.get_inputs()[0].name

    def __call__(self, batch: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.session.run(None, {self.input: batch})[0]))
