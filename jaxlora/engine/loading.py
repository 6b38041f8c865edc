"""Weights on their way to the devices, while programs are compiled."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxlora.config import ModelConfig
from jaxlora.engine_args import EngineArgs
from jaxlora.models.checkpoints import Checkpoint
from jaxlora.models.llama import Llama
from jaxlora.models.weights import dummy_weights, load_weights, num_weights
from jaxlora.parallel import Devices


class WeightLoading:
    """Loads a checkpoint's weights in a thread of their own, which then waits for what else must
    be over before the device is used, by ``wait()``. Leaving the context early, by an exception,
    ends that at the next tensor."""

    def __init__(
        self,
        args: EngineArgs,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: np.dtype[Any],
        devices: Devices,
        *,
        use_tqdm: bool,
        wait: Callable[[], object],
    ) -> None:
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, "jaxlora-weights")
        self.seconds = 0.0
        """That it took."""
        self.weights: Future[tuple[nnx.GraphDef[Llama], nnx.State[Any, Any]]]
        """The model's graph and state."""
        self.weights = self._pool.submit(
            self._load, args, config, checkpoint, dtype, devices, use_tqdm, wait
        )

    def __enter__(self) -> WeightLoading:
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._pool.shutdown()

    def _load(
        self,
        args: EngineArgs,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: np.dtype[Any],
        devices: Devices,
        use_tqdm: bool,
        wait: Callable[[], object],
    ) -> tuple[nnx.GraphDef[Llama], nnx.State[Any, Any]]:
        began = time.perf_counter()
        if args.load_format == "dummy":
            weights = dummy_weights(config, dtype, devices, args.seed)
        else:
            bar = tqdm(
                total=num_weights(config),
                desc="Loading weights",
                unit="w",
                unit_scale=True,
                disable=not use_tqdm,
            )
            tensors = itertools.takewhile(
                lambda _: not self._stopped.is_set(), checkpoint.tensors()
            )
            with bar:
                weights = load_weights(config, tensors, dtype, devices, bar.update)
        # XLA times kernels once this has ended, and needs the device for itself.
        jax.block_until_ready(weights[1])
        self.seconds = time.perf_counter() - began
        wait()
        return weights
