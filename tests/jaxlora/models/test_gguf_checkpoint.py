"""GGUF files read as transformers reads them, and every quantization as gguf dequantizes it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxlora import LLM, SamplingParams
from jaxlora.config import ModelConfig, RopeScaling
from jaxlora.errors import ModelLoadError
from jaxlora.models.gguf_checkpoint import GGUFCheckpoint, llama3_scaling
from tests.jaxlora.models.gguf_files import (
    gguf_name,
    metadata_of,
    to_llama_rows,
    write_gguf,
)

TINY = {
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
    "llama-untied": transformers.LlamaConfig(**TINY, tie_word_embeddings=False),
    "llama-biased": transformers.LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "qwen2": transformers.Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**TINY, tie_word_embeddings=False),
}


def tiny_model(name: str, **changes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)  # biases and norms too, which start as zeros and ones
    return model


def state_of(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def write_model(
    path: Path, arch: str, state: dict[str, np.ndarray], kind: Kind = Kind.F32, **changes: Any
) -> Path:
    """Writes a model's tensors, quantizing its matrices, as llama.cpp converts it."""
    tensors = {}
    for name, array in state.items():
        stored_as = kind if array.ndim == 2 else Kind.F32
        stored = gguf.quantize(array, stored_as)
        if arch == "llama":
            stored = to_llama_rows(name, stored, 4, 2)
        tensors[gguf_name(name)] = (stored, stored_as)
    return write_gguf(path, arch, metadata_of(arch, **changes), tensors)


def small_file(path: Path, arch: str = "llama", **changes: Any) -> Path:
    """A file with one tensor, for what its metadata alone decide."""
    embedding = {"token_embd.weight": (np.zeros((32, 256), np.float32), Kind.F32)}
    return write_gguf(path, arch, metadata_of(arch, **changes), embedding)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_every_architecture_comes_back_exactly(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    expected = state_of(model)
    arch = name.split("-", maxsplit=1)[0]
    lengths = {"attention.key_length": 64, "attention.value_length": 64}
    file = write_model(tmp_path / "m.gguf", arch, expected, **lengths)

    checkpoint = GGUFCheckpoint(file)
    tensors = dict(checkpoint.tensors())

    assert set(tensors) == set(expected)
    for tensor_name, array in tensors.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[tensor_name], err_msg=tensor_name)
    hf = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    assert ModelConfig.from_hf(checkpoint.hf_config()) == ModelConfig.from_hf(hf)


def random_rows(kind: Kind, rows: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of blocks of random bits whose float16 scales are small and finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    scale_offsets = {
        Kind.Q2_K: (80, 82),
        Kind.Q3_K: (108,),
        Kind.Q4_K: (0, 2),
        Kind.Q5_K: (0, 2),
        Kind.Q6_K: (208,),
        Kind.IQ4_NL: (0,),
        Kind.IQ4_XS: (0,),
    }[kind]
    blocks = rng.integers(0, 256, (rows, width // block, size), dtype=np.uint8)
    for offset in scale_offsets:
        scales = rng.uniform(0.01, 0.1, blocks.shape[:2]).astype(np.float16)
        blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize(
    "kind",
    [
        *(Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1),
        *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS),
    ],
    ids=lambda kind: kind.name,
)
def test_every_quantization_is_dequantized_and_unpermuted(kind: Kind, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": 32,
        "model.layers.0.self_attn.q_proj.weight": 256,
        "model.layers.0.self_attn.k_proj.weight": 128,
        "model.layers.0.mlp.up_proj.weight": 256,
    }
    quantizes = kind.name in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
    stored = {
        name: gguf.quantize(rng.standard_normal((rows, 256), np.float32), kind)
        if quantizes
        else random_rows(kind, rows, 256, rng)
        for name, rows in shapes.items()
    }
    file = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        metadata_of("llama"),
        {gguf_name(n): (to_llama_rows(n, rows, 4, 2), kind) for n, rows in stored.items()},
    )

    checkpoint = GGUFCheckpoint(file)

    for name, array in checkpoint.tensors():
        # A row's blocks do not depend on other rows: dequantized in Hugging Face's order, nothing
        # is left to undo.
        expected = gguf.dequantize(stored[name], kind)
        assert array.shape == (shapes[name], 256)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected, err_msg=name)
    dtypes = {Kind.F16: "float16", Kind.BF16: "bfloat16"}
    assert checkpoint.hf_config()["dtype"] == dtypes.get(kind, "bfloat16")


def test_smollm2_equals_what_transformers_loads(
    smollm2_path: str, smollm2_reference: transformers.PreTrainedModel
) -> None:
    checkpoint = GGUFCheckpoint(Path(smollm2_path))
    expected = state_of(smollm2_reference)

    names = []
    for name, array in checkpoint.tensors():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
        names.append(name)

    assert sorted(names) == sorted(expected)
    ours, theirs = checkpoint.hf_config(), smollm2_reference.config.to_dict()
    theirs["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
    for key in set(ours) - {"architectures", "dtype", "eos_token_id", "rms_norm_eps"}:
        assert ours[key] == theirs[key], key
    assert np.float32(ours["rms_norm_eps"]) == np.float32(theirs["rms_norm_eps"])
    assert checkpoint.generation_config()["eos_token_id"] == [2]


def test_host_memory_holds_one_tensor_and_not_the_file(tmp_path: Path) -> None:
    rows = np.ones((2048, 1024), np.float16)
    tensors = {f"blk.{i}.ffn_up.weight": (rows, Kind.F16) for i in range(8)}
    tensors["token_embd.weight"] = (rows, Kind.F16)
    file = write_gguf(tmp_path / "m.gguf", "llama", metadata_of("llama"), tensors)

    checkpoint = GGUFCheckpoint(file)
    tracemalloc.start()
    for _, array in checkpoint.tensors():
        assert array.shape == rows.shape
        del array
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    # A tensor as it is stored and as float32: 3 of the file's 9 parts of half that size.
    assert peak < 1.05 * 3 * rows.nbytes


def llama3_table(head_dim: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """The divisors of transformers' own implementation, without the noise of its float32."""
    parameters = {"rope_type": "llama3", "rope_theta": theta, **scaling}
    config = transformers.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    divisors = (plain / scaled).numpy()
    for exact in (1.0, scaling["factor"]):
        divisors[np.isclose(divisors, exact, rtol=3e-7)] = exact
    return divisors


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (128, 500000.0, {"factor": 8.0, **LLAMA3}),  # Llama 3.1 8B and 70B
        (64, 500000.0, {"factor": 32.0, **LLAMA3}),  # Llama 3.2 1B
        (128, 500000.0, {"factor": 32.0, **LLAMA3}),  # Llama 3.2 3B
        (128, 500000.0, {"factor": 16.0, **LLAMA3, "original_max_position_embeddings": 4096}),
        (64, 100000.0, {"factor": 2.5, **LLAMA3, "high_freq_factor": 3.0}),
        (128, 10000.0, {"factor": 4.0, **LLAMA3, "high_freq_factor": 8.0}),
    ],
)
def test_llama3_rope_parameters_are_recovered_from_the_table(
    head_dim: int, theta: float, scaling: dict[str, Any]
) -> None:
    table = llama3_table(head_dim, theta, scaling)
    assert llama3_scaling(table, head_dim, theta) == {"rope_type": "llama3", **scaling}


def test_llama3_rope_parameters_are_recovered_up_to_a_common_factor() -> None:
    doubled = {
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
        "original_max_position_embeddings": 16384,
    }
    table = llama3_table(128, 500000.0, doubled)
    assert llama3_scaling(table, 128, 500000.0) == {
        "rope_type": "llama3",
        "factor": 8.0,
        **LLAMA3,
    }


def test_rope_tables_become_rope_scaling(tmp_path: Path) -> None:
    table = llama3_table(64, 500000.0, {"factor": 32.0, **LLAMA3})
    tensors = {
        "token_embd.weight": (np.zeros((32, 256), np.float32), Kind.F32),
        "rope_freqs.weight": (table, Kind.F32),
    }
    file = write_gguf(tmp_path / "m.gguf", "llama", metadata_of("llama"), tensors)
    checkpoint = GGUFCheckpoint(file)
    assert ModelConfig.from_hf(checkpoint.hf_config()).rope_scaling == RopeScaling(
        kind="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_len=8192,
    )
    assert [name for name, _ in checkpoint.tensors()] == ["model.embed_tokens.weight"]

    tensors["rope_freqs.weight"] = (np.ones_like(table), Kind.F32)
    file = write_gguf(tmp_path / "ones.gguf", "llama", metadata_of("llama"), tensors)
    assert "rope_scaling" not in GGUFCheckpoint(file).hf_config()

    for strange in (np.full_like(table, 2.0), np.linspace(1, 4, 32, dtype=np.float32), table[:16]):
        tensors["rope_freqs.weight"] = (strange, Kind.F32)
        file = write_gguf(tmp_path / "strange.gguf", "llama", metadata_of("llama"), tensors)
        with pytest.raises(ModelLoadError, match="rope_freqs"):
            GGUFCheckpoint(file)

    tensors["rope_freqs.weight"] = (table, Kind.F32)
    file = write_gguf(tmp_path / "two.gguf", "llama", metadata_of("llama", **YARN), tensors)
    with pytest.raises(ModelLoadError, match="come with yarn scaling"):
        GGUFCheckpoint(file)


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 2.0}, 2.0),
        ({"rope.scale_linear": 2.0}, 2.0),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
    ],
)
def test_linear_rope_scaling(
    tmp_path: Path, changes: dict[str, Any], scaling: float | None
) -> None:
    config = ModelConfig.from_hf(
        GGUFCheckpoint(small_file(tmp_path / "m.gguf", **changes)).hf_config()
    )
    expected = None if scaling is None else RopeScaling(kind="linear", factor=scaling)
    assert config.rope_scaling == expected


YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}


@pytest.mark.parametrize(
    ("name", "metadata", "said"),
    [
        ("llama", {}, {}),
        (
            "qwen3",
            {"yarn_beta_fast": 2.3, "yarn_beta_slow": 0.4, "yarn_ext_factor": 1.0},
            {"beta_fast": 2.3, "beta_slow": 0.4},
        ),
    ],
)
def test_yarn_is_that_of_transformers(
    tmp_path: Path, name: str, metadata: dict[str, float], said: dict[str, float]
) -> None:
    """As llama.cpp's converter writes it, far past the positions that the model was trained for."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **said}
    reference = tiny_model(name, rope_parameters={"rope_theta": 500000.0, **scaling})
    metadata = {f"rope.scaling.{key}": value for key, value in metadata.items()}
    file = write_model(tmp_path / "m.gguf", name, state_of(reference), **YARN | metadata)
    llm = LLM(
        str(file),
        max_num_seqs=1,
        max_num_batched_tokens=128,
        skip_tokenizer_init=True,
        use_tqdm=False,
    )
    assert llm.llm_engine.max_model_len == 128

    prompt = np.random.default_rng(0).integers(0, 32, 120).tolist()
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    (output,) = llm.generate([prompt], params, use_tqdm=False)

    with torch.no_grad():
        expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None
    for i, (token, told) in enumerate(zip(prompt[1:], output.prompt_logprobs[1:], strict=True)):
        assert told is not None
        assert told[token].logprob == pytest.approx(float(expected[i, token]), abs=1e-4)


def test_yarn_by_a_factor_of_one_is_none(tmp_path: Path) -> None:
    file = small_file(tmp_path / "m.gguf", **YARN | {"rope.scaling.factor": 1.0})
    assert "rope_scaling" not in GGUFCheckpoint(file).hf_config()


def test_what_the_metadata_leave_out_is_llama_cpps_default(tmp_path: Path) -> None:
    changes = {"rope.freq_base": None, "attention.head_count_kv": None}
    config = GGUFCheckpoint(small_file(tmp_path / "m.gguf", **changes)).hf_config()
    assert config["rope_theta"] == 10000.0
    assert config["num_key_value_heads"] == 4
    assert config["head_dim"] == 64


def test_a_sliding_window_and_the_end_tokens_are_passed_on(tmp_path: Path) -> None:
    metadata = metadata_of("llama", **{"attention.sliding_window": 4096}) | {
        "tokenizer.ggml.tokens": [str(i) for i in range(32)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.eom_token_id": 2,
    }
    embedding = {"token_embd.weight": (np.zeros((32, 256), np.float32), Kind.F32)}
    checkpoint = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", "llama", metadata, embedding))
    assert checkpoint.generation_config() == {"eos_token_id": [2, 3], "bos_token_id": 1}
    config = ModelConfig.from_hf(checkpoint.hf_config())
    assert (config.sliding_window, config.eos_token_ids, config.bos_token_id) == (4096, (2, 3), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count=8"),
        ({"attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type='longrope'"),
        (YARN | {"rope.scaling.yarn_ext_factor": 0.0}, "yarn_ext_factor=0.0 with .*'yarn'"),
        ({"rope.scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor=1.0 with .*'linear'"),
        (YARN | {"rope.scaling.yarn_attn_factor": 1.0}, "yarn_attn_factor=1.0"),
        (YARN | {"rope.scaling.attn_factor": 1.2}, "attn_factor=1.2"),
        (YARN | {"rope.scaling.yarn_log_multiplier": 1.0}, "yarn_log_multiplier=1.0"),
        ({"attention.head_count_kv": [2, 4]}, "attention.head_count_kv differs between layers"),
        ({"rope.dimension_count": 32}, "rope.dimension_count=32"),
        ({"attention.value_length": 32}, "attention.value_length=32"),
        ({"block_count": None}, "lacks the metadata llama.block_count"),
        ({"attention.head_count": None}, "lacks the metadata llama.attention.head_count"),
        ({"attention.head_count": 0}, "attention.head_count=0, which must be a positive number"),
        ({"attention.layer_norm_rms_epsilon": "small"}, "rms_epsilon='small', which must be"),
    ],
)
def test_metadata_that_are_not_served_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        GGUFCheckpoint(small_file(tmp_path / "m.gguf", **changes))


@pytest.mark.parametrize(
    ("name", "stored", "kind", "message"),
    [
        ("blk.0.ffn_gate_inp.weight", np.zeros((8, 256), np.float32), Kind.F32, "ffn_gate_inp"),
        ("rope_factors_long.weight", np.zeros(32, np.float32), Kind.F32, "rope_factors_long"),
        ("output.scale", np.zeros(32, np.float32), Kind.F32, "output.scale"),
        ("output.weight", np.zeros((8, 50), np.uint8), Kind.IQ1_S, "output.weight as IQ1_S"),
        ("blk.0.attn_q.weight", np.zeros((6, 256), np.float32), Kind.F32, "6 rows"),
    ],
)
def test_tensors_that_are_not_served_are_refused_by_name(
    tmp_path: Path, name: str, stored: np.ndarray, kind: Kind, message: str
) -> None:
    tensors = {"token_embd.weight": (np.zeros((32, 256), np.float32), Kind.F32)}
    file = write_gguf(
        tmp_path / "m.gguf", "llama", metadata_of("llama"), tensors | {name: (stored, kind)}
    )
    with pytest.raises(ModelLoadError, match=message):
        dict(GGUFCheckpoint(file).tensors())


def test_broken_files_are_refused(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "m.gguf").read_bytes()
    for length in (0, 2, 30, 200, len(whole) - 100):
        file = tmp_path / "cut.gguf"
        file.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf is truncated or not a GGUF file"):
            GGUFCheckpoint(file)
    with pytest.raises(ModelLoadError, match="not a GGUF file"):
        GGUFCheckpoint(Path(__file__))


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    """gguf reads one, but what is read here is the bytes as they are."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((32, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="big-endian"):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_which_layers_of_a_qwen_have_a_window_is_not_known(tmp_path: Path) -> None:
    file = small_file(tmp_path / "m.gguf", "qwen2", **{"attention.sliding_window": 64})
    config = ModelConfig.from_hf(GGUFCheckpoint(file).hf_config())
    assert (config.sliding_window, config.sees_past_window) == (64, True)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="architecture 'gemma2'; served are llama, qwen2"):
        GGUFCheckpoint(small_file(tmp_path / "gemma.gguf", "gemma2"))
    embedding = {"token_embd.weight": (np.zeros((32, 256), np.float32), Kind.F32)}
    for extra, message in (
        ({"split.count": 3}, "one of 3 parts"),
        ({"split.count": "two"}, "split.count='two', which must be a number"),
        ({"llama.rope.freq_base": "high"}, "llama.rope.freq_base='high', which must be a number"),
        (
            {"llama.rope.scaling.factor": "2"},
            "llama.rope.scaling.factor='2', which must be a number",
        ),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id='</s>', which must be a number"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "2 tokens, but token_embd.weight has 32 rows"),
    ):
        file = write_gguf(tmp_path / "m.gguf", "llama", metadata_of("llama") | extra, embedding)
        with pytest.raises(ModelLoadError, match=message):
            GGUFCheckpoint(file)
    file = write_gguf(tmp_path / "empty.gguf", "llama", metadata_of("llama"), {})
    with pytest.raises(ModelLoadError, match=r"lacks the tensor token_embd\.weight"):
        GGUFCheckpoint(file)
