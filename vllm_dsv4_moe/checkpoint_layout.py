"""What a DeepSeek-V4 checkpoint holds: the name, dtype and shape of every tensor, from config.json.

Sizes come from the config alone. Dtypes are written as safetensors headers write them: BF16, F32,
U8, I8, I64, F8_E4M3, F8_E8M0. The tables were checked against the published V4-Flash (69,187
tensors) and V4-Pro (145,116 tensors). Of V4.1 only gates and experts are listed, as vLLM loads
them: they are V4's, without hash layers and with a second bias, which routes image tokens.
"""

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

DTYPE_BYTES = {"BF16": 2, "F32": 4, "U8": 1, "I8": 1, "I64": 8, "I32": 4} | dict.fromkeys(
    ("F8_E4M3", "F8_E8M0"), 1
)
NVFP4_BLOCK = 16
MXFP4_BLOCK = 32
FP8_BLOCK = 128
V41 = "deepseek_v41"  # model_type


# ModelSizes' fields that are config.json's under another name.
CONFIG_KEYS = {
    "hidden": "hidden_size",
    "intermediate": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "num_layers": "num_hidden_layers",
    "num_hash_layers": "num_hash_layers",
    "vocab": "vocab_size",
    "heads": "num_attention_heads",
    "head_dim": "head_dim",
    "q_lora": "q_lora_rank",
    "o_lora": "o_lora_rank",
    "o_groups": "o_groups",
    "index_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "hc_mult": "hc_mult",
}
# Those of them that the MoE layers go by.
MOE_FIELDS = ("hidden", "intermediate", "num_experts", "top_k", "num_layers")


class TensorSpec(NamedTuple):
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


Named = Iterator[tuple[str, TensorSpec]]


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of config.json that shape a tensor, and which formats its weights have."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    num_shared_experts: int
    num_layers: int
    num_hash_layers: int
    num_mtp_layers: int
    compress_ratios: tuple[int, ...]  # one a layer: 0 or 1 none, 4 with an indexer, 128
    vocab: int
    heads: int
    head_dim: int
    q_lora: int
    o_lora: int
    o_groups: int
    index_heads: int
    index_head_dim: int
    hc_mult: int
    moe_quant_algo: str  # "NVFP4", or "" for the MXFP4 of DeepSeek's own files
    quant_ignore: tuple[str, ...]  # patterns of what ModelOpt left as it was, MTP layers included
    unquantized_linears: frozenset[str]  # kept in BF16; every other linear is FP8 in square blocks
    num_dspark_targets: int = 0  # layers whose inputs a DSpark draft reads; 0 of MTP drafts
    dspark_markov_rank: int = 0
    fp8_block: int = FP8_BLOCK
    is_v41: bool = False  # then sizes that no gate or expert has are 0
    has_image_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSizes":
        """Read config.json. ValueError names each key that is absent, or one whose value is no
        size."""
        if config.get("model_type") == V41:
            return cls._from_v41(config)
        if "mlp_layer_types" in config:  # what transformers writes for num_hash_layers
            hashed = config["mlp_layer_types"].count("hash_moe")
            config = {"num_hash_layers": hashed, **config}
        _require(config, [*CONFIG_KEYS.values(), "compress_ratios"], "DeepSeek-V4")
        quant = config.get("quantization_config") or {}
        ratios = tuple(config["compress_ratios"])
        if len(ratios) < config["num_hidden_layers"]:
            raise ValueError(
                f"config.json lists {len(ratios)} compress_ratios "
                f"for {config['num_hidden_layers']} layers: it needs one for each layer"
            )
        mtp_layers = config.get("num_nextn_predict_layers") or 0
        targets = config.get("dspark_target_layer_ids") or ()
        if targets:  # DSpark's layers are three whatever num_nextn_predict_layers says, as in vLLM
            mtp_layers = config.get("n_mtp_layers") or 3
        return cls(
            **{field: config[key] for field, key in CONFIG_KEYS.items()},
            num_mtp_layers=mtp_layers,
            num_dspark_targets=len(targets),
            dspark_markov_rank=config.get("dspark_markov_rank") or 0,
            compress_ratios=ratios,
            unquantized_linears=frozenset(quant.get("ignored_layers") or ()),
            **_expert_formats(quant),
        )

    @classmethod
    def _from_v41(cls, config: Mapping[str, Any]) -> "ModelSizes":
        """The text model's sizes are in text_config. Draft layers are left out."""
        text = {**config, **(config.get("text_config") or {})}
        keys = {field: CONFIG_KEYS[field] for field in MOE_FIELDS}
        _require(text, list(keys.values()), "DeepSeek-V4.1")
        vision = config.get("vision_config") or {}
        return cls(
            **dict.fromkeys(CONFIG_KEYS, 0) | {field: text[key] for field, key in keys.items()},
            num_mtp_layers=0,
            compress_ratios=(),
            unquantized_linears=frozenset(),
            is_v41=True,
            has_image_bias=vision.get("num_hidden_layers", 0) > 0,
            **_expert_formats(text.get("quantization_config") or {}),
        )

    def is_nvfp4(self, experts: str) -> bool:
        """Whether `layers.N.ffn.experts` (or `mtp.N.ffn.experts`) is NVFP4, as vLLM decides it."""
        if self.moe_quant_algo != "NVFP4":
            return False
        return not any(fnmatch.fnmatchcase(experts, pattern) for pattern in self.quant_ignore)


def _require(config: Mapping[str, Any], keys: list[str], model: str) -> None:
    absent = [key for key in keys if key not in config]
    if absent:
        raise ValueError(f"config.json lacks {', '.join(absent)}: it is not a {model} config")
    for key in keys:
        if key == "n_shared_experts" and config[key] is None:
            continue  # there are none
        values = config[key] if key == "compress_ratios" else [config[key]]
        if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
            kind = "a list of sizes" if key == "compress_ratios" else "a size"
            raise ValueError(f"{key} of config.json is {config[key]!r}: it must be {kind}")


def _expert_formats(quant: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "moe_quant_algo": (quant.get("moe_quant_algo") or "").upper(),
        "quant_ignore": tuple(p for p in quant.get("ignore") or () if isinstance(p, str)),
    }


def checkpoint_tensors(sizes: ModelSizes) -> Named:
    """Every tensor, layer by layer, MTP layers last; of V4.1, gates and experts only."""
    if sizes.is_v41:
        for layer in range(sizes.num_layers):
            yield from _gate_and_experts(sizes, f"layers.{layer}.ffn.", is_hash=False)
        return
    hidden, vocab = sizes.hidden, sizes.vocab
    yield "embed.weight", TensorSpec("BF16", (vocab, hidden))
    for layer in range(sizes.num_layers):
        yield from layer_tensors(sizes, layer)
    yield from _head_tensors(sizes, "")
    yield "head.weight", TensorSpec("BF16", (vocab, hidden))
    for layer in range(sizes.num_mtp_layers):
        yield from mtp_tensors(sizes, layer)


def layer_tensors(sizes: ModelSizes, layer: int) -> Named:
    prefix = f"layers.{layer}."
    is_hash = layer < sizes.num_hash_layers
    yield from block_tensors(sizes, prefix, sizes.compress_ratios[layer], is_hash)


def mtp_tensors(sizes: ModelSizes, layer: int) -> Named:
    """One layer of a draft: a block, and for multi-token prediction two projections and a head."""
    prefix = f"mtp.{layer}."
    yield from block_tensors(sizes, prefix, ratio=0, is_hash=False)
    if sizes.num_dspark_targets:
        yield from dspark_tensors(sizes, layer)
        return
    for name in ("e_proj", "h_proj"):
        yield from linear(sizes, f"{prefix}{name}", sizes.hidden, sizes.hidden)
    for name in ("enorm", "hnorm"):
        yield f"{prefix}{name}.weight", TensorSpec("BF16", (sizes.hidden,))
    yield from _head_tensors(sizes, prefix)


def dspark_tensors(sizes: ModelSizes, layer: int) -> Named:
    """What a DSpark draft's layers have besides blocks: a projection before the first, heads after
    the last."""
    prefix, hidden, rank = f"mtp.{layer}.", sizes.hidden, sizes.dspark_markov_rank
    if layer == 0:
        yield from linear(sizes, f"{prefix}main_proj", hidden, hidden * sizes.num_dspark_targets)
        yield f"{prefix}main_norm.weight", TensorSpec("BF16", (hidden,))
    if layer == sizes.num_mtp_layers - 1:
        yield from _head_tensors(sizes, prefix)
        for name in ("embed", "head"):
            yield f"{prefix}markov_head.{name}.weight", TensorSpec("BF16", (sizes.vocab, rank))
        yield f"{prefix}confidence_head.proj.weight", TensorSpec("BF16", (1, hidden + rank))


def expert_tensors(sizes: ModelSizes, experts: str, expert: int) -> Named:
    """w1 (gate), w3 (up) and w2 (down) of one routed expert; shapes are (out, in)."""
    hidden, inter = sizes.hidden, sizes.intermediate
    nvfp4 = sizes.is_nvfp4(experts)
    for name, rows, columns in (
        ("w1", inter, hidden),
        ("w2", hidden, inter),
        ("w3", inter, hidden),
    ):
        linear = f"{experts}.{expert}.{name}"
        if nvfp4:
            yield f"{linear}.weight", TensorSpec("U8", (rows, columns // 2))
            scales = TensorSpec("F8_E4M3", (rows, columns // NVFP4_BLOCK))
            yield f"{linear}.weight_scale", scales
            yield f"{linear}.weight_scale_2", TensorSpec("F32", ())
            yield f"{linear}.input_scale", TensorSpec("F32", ())
        else:
            yield f"{linear}.weight", TensorSpec("I8", (rows, columns // 2))
            yield f"{linear}.scale", TensorSpec("F8_E8M0", (rows, columns // MXFP4_BLOCK))


def block_tensors(sizes: ModelSizes, prefix: str, ratio: int, is_hash: bool) -> Named:
    mixes = (2 + sizes.hc_mult) * sizes.hc_mult
    for part in ("attn", "ffn"):
        yield f"{prefix}hc_{part}_fn", TensorSpec("F32", (mixes, sizes.hc_mult * sizes.hidden))
        yield f"{prefix}hc_{part}_base", TensorSpec("F32", (mixes,))
        yield f"{prefix}hc_{part}_scale", TensorSpec("F32", (3,))
        yield f"{prefix}{part}_norm.weight", TensorSpec("BF16", (sizes.hidden,))
    yield from _attention_tensors(sizes, f"{prefix}attn.", ratio)
    yield from _moe_tensors(sizes, f"{prefix}ffn.", is_hash)


def _attention_tensors(sizes: ModelSizes, prefix: str, ratio: int) -> Named:
    q_size = sizes.heads * sizes.head_dim
    o_size = sizes.o_groups * sizes.o_lora
    yield from linear(sizes, f"{prefix}wq_a", sizes.q_lora, sizes.hidden)
    yield from linear(sizes, f"{prefix}wq_b", q_size, sizes.q_lora)
    yield from linear(sizes, f"{prefix}wkv", sizes.head_dim, sizes.hidden)
    yield from linear(sizes, f"{prefix}wo_a", o_size, q_size // sizes.o_groups)
    yield from linear(sizes, f"{prefix}wo_b", sizes.hidden, o_size)
    yield f"{prefix}q_norm.weight", TensorSpec("BF16", (sizes.q_lora,))
    yield f"{prefix}kv_norm.weight", TensorSpec("BF16", (sizes.head_dim,))
    yield f"{prefix}attn_sink", TensorSpec("F32", (sizes.heads,))
    if ratio > 1:
        yield from _compressor(sizes, f"{prefix}compressor.", ratio, sizes.head_dim)
    if ratio == 4:
        index_size = sizes.index_heads * sizes.index_head_dim
        yield from linear(sizes, f"{prefix}indexer.wq_b", index_size, sizes.q_lora)
        projection = TensorSpec("BF16", (sizes.index_heads, sizes.hidden))
        yield f"{prefix}indexer.weights_proj.weight", projection
        yield from _compressor(sizes, f"{prefix}indexer.compressor.", ratio, sizes.index_head_dim)


def _compressor(sizes: ModelSizes, prefix: str, ratio: int, head_dim: int) -> Named:
    width = head_dim * (2 if ratio == 4 else 1)  # windows of ratio 4 overlap: two sets of weights
    yield f"{prefix}wkv.weight", TensorSpec("BF16", (width, sizes.hidden))
    yield f"{prefix}wgate.weight", TensorSpec("BF16", (width, sizes.hidden))
    yield f"{prefix}ape", TensorSpec("F32", (ratio, width))
    yield f"{prefix}norm.weight", TensorSpec("BF16", (head_dim,))


def _moe_tensors(sizes: ModelSizes, prefix: str, is_hash: bool) -> Named:
    yield from _gate_and_experts(sizes, prefix, is_hash)
    if sizes.num_shared_experts:
        inter = sizes.intermediate * sizes.num_shared_experts
        yield from linear(sizes, f"{prefix}shared_experts.w1", inter, sizes.hidden)
        yield from linear(sizes, f"{prefix}shared_experts.w2", sizes.hidden, inter)
        yield from linear(sizes, f"{prefix}shared_experts.w3", inter, sizes.hidden)


def _gate_and_experts(sizes: ModelSizes, prefix: str, is_hash: bool) -> Named:
    yield f"{prefix}gate.weight", TensorSpec("BF16", (sizes.num_experts, sizes.hidden))
    if is_hash:
        yield f"{prefix}gate.tid2eid", TensorSpec("I64", (sizes.vocab, sizes.top_k))
    else:
        yield f"{prefix}gate.bias", TensorSpec("F32", (sizes.num_experts,))
    if sizes.has_image_bias:
        yield f"{prefix}gate.bias_vl", TensorSpec("F32", (sizes.num_experts,))
    for expert in range(sizes.num_experts):
        yield from expert_tensors(sizes, f"{prefix}experts", expert)


def _head_tensors(sizes: ModelSizes, prefix: str) -> Named:
    yield f"{prefix}norm.weight", TensorSpec("BF16", (sizes.hidden,))
    yield f"{prefix}hc_head_fn", TensorSpec("F32", (sizes.hc_mult, sizes.hc_mult * sizes.hidden))
    yield f"{prefix}hc_head_base", TensorSpec("F32", (sizes.hc_mult,))
    yield f"{prefix}hc_head_scale", TensorSpec("F32", (1,))


def linear(sizes: ModelSizes, name: str, rows: int, columns: int) -> Named:
    if name in sizes.unquantized_linears:
        yield f"{name}.weight", TensorSpec("BF16", (rows, columns))
        return
    yield f"{name}.weight", TensorSpec("F8_E4M3", (rows, columns))
    scales = (-(-rows // sizes.fp8_block), -(-columns // sizes.fp8_block))
    yield f"{name}.scale", TensorSpec("F8_E8M0", scales)
