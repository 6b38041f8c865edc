"""What an adapter's folder holds, what it would change, and whether it would be served."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlora.adapters.content import largest_of
from jaxlora.adapters.folder import AdapterFolder
from jaxlora.adapters.peft import IsBaseCopy, TokenOf, load_adapter
from jaxlora.adapters.peft_config import PeftConfig, Placement
from jaxlora.adapters.peft_layout import (
    Limits,
    check_dtypes,
    check_headers,
    check_placements,
    check_switches,
    check_tie,
    extras_of,
    with_lora,
)
from jaxlora.adapters.peft_tensors import EMBEDDING, HEAD, Module, find_modules
from jaxlora.adapters.tensors import Header, read_headers
from jaxlora.checks import shown, some
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterRefusedError
from jaxlora.models.checkpoints import Checkpoint
from jaxlora.models.weights import vocabulary_tensors

_NO_LIMIT = 1 << 31


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """One module with LoRA."""

    path: str
    """As in the model, ``model.layers.0.self_attn.q_proj``."""
    rank: int
    scale: float | None
    """None if the configuration is refused."""
    norm: float | None
    """Frobenius norm of the change ``scale * B A``, before DoRA's gain; None without a scale."""
    changes: bool
    """False if it certainly changes nothing: A, B or the scale is zero, and so is the bias."""
    most: float
    """The largest magnitude in A, or in B times the scale."""
    is_finite: bool
    """False if one of its tensors has NaN or Inf."""

    def row(self, width: int) -> str:
        """The module as a line of a table."""
        scale = "?" if self.scale is None else f"{self.scale:g}"
        norm = "?" if self.norm is None else f"{self.norm:.4g}"
        zero = "" if self.changes else "  (changes nothing)"
        return f"{self.path:<{width}}  {self.rank:<4}  {scale:<8}  {norm}{zero}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What :func:`inspect_adapter` found."""

    path: Path
    modules: tuple[ModuleReport, ...]
    """Empty if a tensor's name is refused."""
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    extras: tuple[str, ...]
    """What EngineArgs.lora_extras must name."""
    has_matrices: bool
    """Whether it has rows or all of an embedding or an output head of its own."""
    refusals: tuple[str, ...]
    """Why it cannot be served; empty if nothing was found against it."""
    with_model: bool
    """Whether shapes were compared with a model."""
    ties: bool
    """Whether it has ensure_weight_tying, whose effect depends on the model."""

    @property
    def rank(self) -> int:
        """Largest rank, which max_lora_rank must not be below."""
        return max((module.rank for module in self.modules), default=0)

    @property
    def changes_logits(self) -> bool:
        """False if the base model and the adapter certainly answer alike."""
        return any(module.changes for module in self.modules) or self.has_matrices

    def __str__(self) -> str:
        lines = [f"{label:<12}{value}" for label, value in self._summary() if value]
        if self.modules:
            width = max(len(module.path) for module in self.modules)
            lines += ["", f"{'module':<{width}}  rank  scale     norm of change"]
            lines += [module.row(width) for module in self.modules] + [""]
        if self.refusals:
            lines += [f"refused     {reason}" for reason in self.refusals]
        elif self.with_model:
            lines.append("served      by an engine started with what it needs")
        else:
            ties = " and what ensure_weight_tying comes to" if self.ties else ""
            lines.append(
                f"served      as far as its files tell; give the model to check shapes{ties}"
            )
        return "\n".join(lines)

    def _summary(self) -> list[tuple[str, str]]:
        size = [
            ("adapter", str(self.path)),
            ("parameters", f"{self.num_parameters:,}"),
            ("bytes", f"{self.num_bytes:,} ({', '.join(self.dtypes)})"),
        ]
        # Without modules nothing is known of what it would do.
        return size + self._purpose() if self.modules else size

    def _purpose(self) -> list[tuple[str, str]]:
        modules = self.modules
        scales = sorted({module.scale for module in modules if module.scale is not None})
        names = dict.fromkeys(module.path.rpartition(".")[2] for module in modules)
        layers = {module.path.split(".")[2] for module in modules if ".layers." in module.path}
        extras = f", lora_extras={list(self.extras)}" if self.extras else ""
        most = max(module.most for module in modules)
        small = " and ".join(d for d in ("float16", "bfloat16") if most > largest_of(d))
        reach = f" (A, or B times the scale, reaches {most:.3g})"
        dtype = f", a dtype other than {small}{reach}" if small else ""
        return [
            ("targets", f"{', '.join(names)}: {len(modules)} modules, {len(layers)} layers"),
            ("rank", ", ".join(map(str, sorted({module.rank for module in modules})))),
            ("scale", ", ".join(f"{scale:g}" for scale in scales)),
            ("needs", f"enable_lora=True, max_lora_rank={self.rank} or more{extras}{dtype}"),
            ("effect", self._effect()),
        ]

    def _effect(self) -> str:
        silent = sum(not module.changes for module in self.modules)
        if not self.changes_logits:
            return "none: B, A or the scale is zero in every module, so it answers as the base does"
        if silent:
            return f"changes the logits, but {silent} modules change nothing: B, A or scale is zero"
        return "changes the logits"


def inspect_adapter(
    path: Path, base: Checkpoint | None = None, token_of: TokenOf | None = None
) -> Inspection:
    """Reads a PEFT folder as the engine would, and goes on where the engine would stop.

    ``token_of`` tells of the base's tokenizer. Without a ``base`` neither shapes nor the number of
    layers are checked. Raises AdapterNotFoundError if there is no adapter, and AdapterRefusedError
    if its files are damaged.
    """
    model = None if base is None else ModelConfig.from_hf(base.hf_config())
    folder = AdapterFolder(path)
    config, refusals = folder.config(), []
    peft_config = None
    try:
        peft_config = PeftConfig.from_dict(config)
    except AdapterRefusedError as error:
        refusals.append(str(error))
    try:
        with safe_open(folder.weights_file(), framework="np", backend="pread") as file:
            headers = read_headers(file)
            modules, placements = {}, {}
            try:
                check_dtypes(headers)
                modules = with_lora(find_modules(headers, model))
                if peft_config is not None:
                    placements = peft_config.place(modules)
                    check_switches(modules, peft_config)
                    _check_places(headers, modules, placements, peft_config)
            except AdapterRefusedError as error:
                refusals.append(str(error))
            reports = tuple(
                _report(p, module, placements.get(p), headers, file)
                for p, module in modules.items()
            )
            broken = [report.path for report in reports if not report.is_finite]
            if broken:
                refusals.append(f"The adapter's weights contain NaN or Inf: {some(broken)}")
            most = largest_of("float32")
            huge = [report.path for report in reports if report.is_finite and report.most > most]
            if huge:
                refusals.append(f"B times the adapter's scale is beyond float32: {some(huge)}")
    except (SafetensorError, OSError) as error:
        reason = shown(str(error))
        raise AdapterRefusedError(f"the adapter's weights cannot be read: {reason}") from error
    if base is not None and model is not None and not refusals:
        try:
            copies = _base_copies(base, model)
            limits = Limits(_NO_LIMIT)
            load_adapter("", path, model, limits, is_base_copy=copies, token_of=token_of)
        except AdapterRefusedError as error:
            refusals.append(str(error))
    sizes = {key: math.prod(header.shape) for key, header in headers.items()}
    return Inspection(
        path=path,
        modules=reports,
        num_parameters=sum(sizes.values()),
        num_bytes=sum(sizes[key] * _bits(h.dtype) for key, h in headers.items()) // 8,
        dtypes=tuple(sorted({header.dtype for header in headers.values()})),
        extras=tuple(sorted(extras_of(modules, _saved(peft_config, model)))),
        has_matrices=bool(_saved(peft_config)),
        refusals=tuple(refusals),
        with_model=model is not None,
        ties=peft_config is not None and peft_config.ensure_weight_tying,
    )


def _check_places(
    headers: dict[str, Header],
    modules: dict[str, Module],
    placements: dict[str, Placement],
    config: PeftConfig,
) -> None:
    """Raises AdapterRefusedError unless places and ranks fit some model: with ensure_weight_tying
    one with tied embeddings will do as well as another."""
    try:
        check_placements(placements)
        check_headers(headers, modules, placements, {}, None)
    except AdapterRefusedError:
        if not (config.ensure_weight_tying and {EMBEDDING, HEAD} <= modules.keys()):
            raise
        check_tie(modules, placements)
        check_placements(placements)
        check_headers(headers, modules, placements, {}, None)


def _base_copies(base: Checkpoint, model: ModelConfig) -> IsBaseCopy:
    """What compares arrays with the checkpoint's embedding and head, in the checkpoint's dtype."""
    dtype = jnp.dtype(model.dtype)

    def is_copy(target: str, array: np.ndarray) -> bool:
        wanted = vocabulary_tensors(model, target)
        weight = next(tensor for name, tensor in base.tensors() if name in wanted)
        return np.array_equal(array.astype(dtype), weight.astype(dtype))

    return is_copy


def _bits(dtype: str) -> int:
    """Of an element; also those of what is refused have it in their names, but for BOOL."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def _saved(config: PeftConfig | None, model: ModelConfig | None = None) -> set[str]:
    """The modules of which it has a matrix or rows of its own."""
    paths = {*config.modules_to_save, *config.token_indices} if config else set()
    if config and config.token_indices and model and model.tie_word_embeddings:
        paths.add("lm_head")
    return paths


def _report(
    path: str,
    module: Module,
    placement: Placement | None,
    headers: dict[str, Header],
    file: Any,
) -> ModuleReport:
    sides = ("a", "b", "bias", "magnitude")
    arrays = {
        side: file.get_tensor(module.tensors[side]).astype(np.float64)
        for side in sides
        if side in module.tensors
    }
    a, b = arrays["a"], arrays["b"]
    scale = None if placement is None else placement.scale
    norm = None
    if a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and scale is not None:
        # |B A|^2 = trace(B^T B A A^T): the product itself may have a billion entries.
        with np.errstate(over="ignore", invalid="ignore"):
            norm = abs(scale) * math.sqrt(max(float(np.sum((b.T @ b) * (a @ a.T))), 0.0))
    changes = bool(a.any() and b.any()) and scale != 0
    if "bias" in arrays:
        changes |= bool(arrays["bias"].any())
    # What a magnitude does depends on the base's weights.
    changes |= "magnitude" in module.tensors
    factors = {"a": 1.0, "b": abs(scale or 0.0)}
    most = max(factors[side] * float(np.abs(arrays[side]).max(initial=0.0)) for side in factors)
    shape = headers[module.tensors["a"]].shape
    return ModuleReport(
        path=path,
        rank=shape[0] if shape else 0,
        scale=scale,
        norm=norm,
        changes=changes,
        most=most,
        is_finite=all(np.isfinite(array).all() for array in arrays.values()),
    )
