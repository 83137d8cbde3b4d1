"""`dsv4-moe inspect`: what is wrong with a checkpoint is named, from headers alone."""

import dataclasses
import json
import math
import os
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.adapter.test_checkpoint_layout import FLASH, NVFP4, PRO
from vllm_dsv4_moe.checkpoint_layout import ModelSizes, checkpoint_tensors
from vllm_dsv4_moe.commands.checkpoint_scales import e4m3_value
from vllm_dsv4_moe.commands.cli import main
from vllm_dsv4_moe.commands.inspect_checkpoint import inspect, kinds, model_name
from vllm_dsv4_moe.commands.tiny import write_tiny_checkpoint
from vllm_dsv4_moe.commands.tiny_config import TinyConfig

EXPERT = "layers.2.ffn.experts.3"
SHARD = "model-00004-of-00005.safetensors"  # layers.2


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    config = TinyConfig(layers=3, hidden=128, intermediate=64, experts=8, heads=4, mtp=1)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("inspect") / "tiny", config)


@pytest.fixture
def checkpoint(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "copy"))


class Shard:
    """One safetensors file, to be changed: its header, or a tensor's bytes."""

    def __init__(self, path):
        self.path = path
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        self.header = json.loads(content[8 : 8 + length])
        self.data = bytearray(content[8 + length :])

    def put(self, name, value):
        first, last = self.header[name]["data_offsets"]
        assert last - first == len(value), (last - first, len(value))
        self.data[first:last] = value

    def save(self):
        write_file(self.path, self.header, self.data)


def write_file(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


def change_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_whole_checkpoint_has_no_problem(original, capsys):
    found = inspect(original, scales=True)
    assert found.problems == [] and found.missing == found.mismatched == found.extra == []
    assert [(layer.router, layer.experts, layer.ours) for layer in found.layers] == [
        ("hash", "NVFP4", True),
        ("hash", "NVFP4", True),
        ("dense", "NVFP4", True),
        ("dense", "MXFP4", True),
    ]
    assert main(["inspect", str(original), "--details", "--scales"]) == 0
    text = capsys.readouterr().out
    assert "layers.0-1     hash   NVFP4 experts" in text
    assert "this plugin can serve it" in text
    assert "layers.0-2.ffn.experts.0-7.w1.weight_scale" in text
    assert "activations of NVFP4 experts: bf16 on sm90, nvfp4 on sm100" in text


def test_activations_are_those_that_the_layers_would_run_in(original, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_DSV4_MOE_ACTIVATIONS", "fp8")
    monkeypatch.setenv("VLLM_DSV4_MOE_FORMATS", "nvfp4,mxfp4")
    assert main(["inspect", str(original)]) == 0
    text = capsys.readouterr().out
    assert "activations of NVFP4 experts: fp8 on sm90, refused as fp8 on sm100" in text
    assert "activations of MXFP4 experts: fp8 on sm90" in text
    for wanted, of_nvfp4, of_mxfp4 in (
        ("auto", "bf16", "fp8"),
        ("bf16", "bf16", "bf16"),
        ("nvfp4", "refused as nvfp4", "refused as nvfp4"),
    ):
        found = inspect(original, formats="nvfp4,mxfp4", activations=wanted).activations
        assert (found["NVFP4"]["sm90"], found["MXFP4"]["sm90"]) == (of_nvfp4, of_mxfp4)


@pytest.fixture(scope="module")
def v41(tmp_path_factory):
    """V4's gates and experts under a V4.1 config: text_config, a vision tower, no hash layer."""
    folder = tmp_path_factory.mktemp("v41") / "tiny"
    config = TinyConfig(layers=2, hash_layers=0, hidden=128, intermediate=64, experts=8, heads=4)
    write_tiny_checkpoint(folder, config)
    path = folder / "config.json"
    text = json.loads(path.read_text())
    for key in ("num_hash_layers", "compress_ratios", "q_lora_rank"):
        del text[key]
    quant = text.pop("quantization_config")
    nested = {"text_config": text, "vision_config": {"num_hidden_layers": 4}}
    path.write_text(
        json.dumps(nested | {"model_type": "deepseek_v41", "quantization_config": quant})
    )
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("gate.bias")]:
            tensors[f"{name}_vl"] = tensors[name] + 1
        save_file(tensors, file)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map |= {f"{k}_vl": v for k, v in weight_map.items() if k.endswith("gate.bias")}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_gates_and_experts_of_v41_are_checked_and_the_rest_is_named(v41, tmp_path, capsys):
    found = inspect(v41, scales=True)
    assert found.problems == [] and found.extra == []
    assert [(layer.router, layer.experts, layer.ours) for layer in found.layers] == [
        ("dense", "NVFP4", True)
    ] * 2
    (note,) = found.notes
    others = len([n for n in found.kinds if ".gate." not in n.name and ".experts." not in n.name])
    assert others > 20 and "of V4.1 that are no gate or expert were not checked" in note
    assert main(["inspect", str(v41)]) == 0
    assert "this plugin can serve it" in capsys.readouterr().out
    # Without a bias for image tokens, and with an expert too few.
    copy = Path(shutil.copytree(v41, tmp_path / "copy"))
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        gone = [n for n in tensors if n.endswith("bias_vl") or "layers.1.ffn.experts.7." in n]
        save_file({name: t for name, t in tensors.items() if name not in gone}, file)
    problems = "\n".join(inspect(copy).problems)
    assert "layers.*.ffn.gate.bias_vl are missing" in problems
    assert "layers.1.ffn.experts.7.w1.weight is missing" in problems


def test_hash_layers_by_transformers_name_for_them(original, tmp_path):
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    path = copy / "config.json"
    config = json.loads(path.read_text())
    del config["num_hash_layers"]
    path.write_text(json.dumps(config | {"mlp_layer_types": ["hash_moe", "hash_moe", "moe"]}))
    assert inspect(copy) == dataclasses.replace(inspect(original), folder=str(copy))


def test_a_v41_config_without_a_size_says_which(v41, tmp_path):
    copy = Path(shutil.copytree(v41, tmp_path / "copy"))
    change_config(copy, text_config={"hidden_size": 128})
    with pytest.raises(ValueError, match="lacks moe_intermediate_size, .*not a DeepSeek-V4.1"):
        inspect(copy)


def without(name):
    return lambda shard: shard.header.pop(name)


def with_shape(name, shape, dtype=None):
    def change(shard):
        entry = shard.header[name]
        entry["shape"] = shape
        entry["dtype"] = dtype or entry["dtype"]

    return change


def as_f32(name):
    def change(shard):
        entry = shard.header[name]
        size = math.prod(entry["shape"]) * 4
        entry |= {"dtype": "F32", "data_offsets": [len(shard.data), len(shard.data) + size]}
        shard.data += bytes(size)

    return change


def with_extra(name):
    def change(shard):
        shard.header[name] = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}

    return change


def changed(checkpoint, change):
    """What is found once a shard is changed and nothing says which files there are."""
    shard = Shard(checkpoint / SHARD)
    change(shard)
    shard.save()
    (checkpoint / "model.safetensors.index.json").unlink()
    return inspect(checkpoint)


W2 = f"{EXPERT}.w2.weight"
OTHER = f"{W2} has another shape or dtype"
GATE = "layers.2.ffn.gate"
PROBLEMS = {
    "no-weight-scale-2": (
        without(f"{EXPERT}.w1.weight_scale_2"),
        f"{EXPERT}.w1.weight_scale_2 is missing",
    ),
    "no-bias": (without(f"{GATE}.bias"), f"{GATE}.bias is missing"),
    "wrong-shape": (with_shape(W2, [64, 64]), OTHER),
    "wrong-dtype": (with_shape(W2, [128, 32], "I8"), OTHER),
    "table-on-a-dense-layer": (
        with_extra(f"{GATE}.tid2eid"),
        f"{GATE}.tid2eid is not of this model's MoE layers",
    ),
}


@pytest.mark.parametrize(("change", "problem"), PROBLEMS.values(), ids=PROBLEMS)
def test_difference_is_named(checkpoint, change, problem, capsys):
    assert changed(checkpoint, change).problems == [problem]
    assert main(["inspect", str(checkpoint)]) == 1
    assert f"problem: {problem}" in capsys.readouterr().out


def test_details_have_the_shapes(checkpoint):
    found = changed(checkpoint, with_shape(W2, [64, 64]))
    assert found.mismatched == [f"{W2}: U8 [128, 32] expected, U8 [64, 64] found"]


def without_input_scales(shard):
    for name in [name for name in shard.header if "input_scale" in name]:
        del shard.header[name]


NOTES = {
    "extra": (with_extra("layers.2.attn.rotary"), "layers.2.attn.rotary is extra"),
    "extra-mtp-layer": (
        with_extra("mtp.1.ffn.experts.0.w1.scale"),
        "1 MTP tensors are extra, mtp.1.ffn.experts.0.w1.scale among them",
    ),
    "castable-dtype": (
        as_f32("layers.2.ffn_norm.weight"),
        "layers.2.ffn_norm.weight has another dtype, which vLLM casts",
    ),
    "no-input-scales": (
        without_input_scales,
        "layers.*.ffn.experts.*.w1.input_scale are absent: the activation-scale policy "
        "`checkpoint` cannot be used (8, first layers.2.ffn.experts.0.w1.input_scale)",
    ),
}


@pytest.mark.parametrize(("change", "note"), NOTES.values(), ids=NOTES)
def test_harmless_difference_is_a_note(checkpoint, change, note):
    found = changed(checkpoint, change)
    assert found.problems == [] and note in found.notes


def test_truncated_shard_is_named_with_its_sizes(checkpoint, capsys):
    path = checkpoint / SHARD
    size = path.stat().st_size
    os.truncate(path, size - 100_000)
    assert main(["inspect", str(checkpoint)]) == 1
    text = capsys.readouterr().out
    assert (
        f"{SHARD} is cut short: it has {size - 100_000} bytes and its header speaks of {size}"
        in text
    )


@pytest.mark.parametrize("length", [0, 5, 100], ids=["empty", "in-the-length", "in-the-header"])
def test_shard_cut_before_its_data(checkpoint, length):
    os.truncate(checkpoint / SHARD, length)
    assert inspect(checkpoint).problems[0].startswith(f"{SHARD} is cut short")


def test_damaged_header(checkpoint):
    write_file(checkpoint / SHARD, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}})
    problem = inspect(checkpoint).problems[0]
    assert problem.startswith(f"{SHARD} has a damaged header") and "F32 [2] in 4 bytes" in problem


def test_absent_mtp_layer_is_a_note(checkpoint):
    (checkpoint / "model-00005-of-00005.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    found = inspect(checkpoint)
    assert found.problems == []
    assert any("MTP tensors are absent" in note for note in found.notes)


def test_missing_file_of_the_index(checkpoint):
    (checkpoint / SHARD).unlink()
    found = inspect(checkpoint)
    assert f"{SHARD} is missing, and model.safetensors.index.json names it" in found.problems


def test_tensor_in_two_files(checkpoint):
    shutil.copy(checkpoint / SHARD, checkpoint / "model-00009-of-00005.safetensors")
    (checkpoint / "model.safetensors.index.json").unlink()
    assert any("is in two files" in problem for problem in inspect(checkpoint).problems)


def test_experts_of_another_format(checkpoint):
    change_config(checkpoint, quantization_config={"quant_method": "fp8"})
    found = inspect(checkpoint, formats="nvfp4")
    assert not any(layer.ours for layer in found.layers)
    assert any("no layer has NVFP4 experts" in problem for problem in found.problems)


def test_a_block_of_another_format_is_not_held_against_nvfp4(checkpoint):
    change_config(checkpoint, quantization_config={"quant_method": "fp8", "group_size": 32})
    assert not any("group_size" in problem for problem in inspect(checkpoint).problems)


@pytest.mark.parametrize("expert", [-1, 8])
def test_rows_of_a_table_that_no_layer_could_be_loaded_with_are_counted(checkpoint, expert):
    shard = Shard(checkpoint / "model-00002-of-00005.safetensors")
    name = "layers.0.ffn.gate.tid2eid"
    table = np.tile(np.arange(6, dtype="<i8"), (512, 1))
    table[[7, 300], 2] = expert
    shard.put(name, table.tobytes())
    shard.save()
    found = inspect(checkpoint)
    assert found.problems == [
        f"2 of 512 rows of {name} have ids that are not of the 8 experts, the first 7"
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "[1]", "is JSON, but no object with the sizes of a model"),
        ("config.json", {"hidden_size": "128"}, "hidden_size of config.json is '128'"),
        ("config.json", {"num_experts_per_tok": None}, "num_experts_per_tok of config.json is Non"),
        ("config.json", {"compress_ratios": 4}, "compress_ratios of config.json is 4"),
        ("model.safetensors.index.json", "[1]", "has no weight_map that can be read"),
        ("model.safetensors.index.json", '{"weight_map": []}', "has no weight_map that can be"),
    ],
    ids=["list", "word", "null", "ratios", "index of a list", "weight map of a list"],
)
def test_what_can_not_be_read_is_a_sentence(checkpoint, name, content, says, capsys):
    if isinstance(content, dict):
        change_config(checkpoint, **content)
    else:
        (checkpoint / name).write_text(content)
    assert main(["inspect", str(checkpoint)]) == 2
    assert says in capsys.readouterr().err


def test_a_model_without_shared_experts_may_say_null(checkpoint):
    change_config(checkpoint, n_shared_experts=None)
    assert all("shared_experts" in problem for problem in inspect(checkpoint).problems)


@pytest.mark.parametrize("dtype", ["<i8", "<i4"])
def test_rows_that_name_an_expert_twice_are_counted(checkpoint, dtype):
    shard = Shard(checkpoint / "model-00002-of-00005.safetensors")
    name = "layers.0.ffn.gate.tid2eid"
    entry = shard.header[name]
    first, last = entry["data_offsets"]
    table = np.frombuffer(shard.data[first:last], "<i8").reshape(entry["shape"]).astype(dtype)
    table[[3, 500], 4] = table[[3, 500], 1]
    table[9] = 7
    shard.data += table.tobytes()
    offsets = [len(shard.data) - table.nbytes, len(shard.data)]
    shard.header[name] = entry | {"dtype": "I" + str(8 * int(dtype[2])), "data_offsets": offsets}
    shard.save()
    found = inspect(checkpoint)
    assert found.problems == []
    assert f"3 of 512 rows of {name} name an expert twice: both count" in found.notes
    assert sum("twice" in note for note in found.notes) == 1


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0], ids=["nan", "zero", "negative"])
def test_bad_global_scale(checkpoint, value):
    shard = Shard(checkpoint / SHARD)
    shard.put(f"{EXPERT}.w1.weight_scale_2", struct.pack("<f", value))
    shard.save()
    assert inspect(checkpoint).problems == []
    found = inspect(checkpoint, scales=True)
    (problem,) = found.problems
    assert problem.startswith("layers.2:")
    assert "1 of 16 w1 or w3 weight_scale_2 are NaN" in problem
    assert found.scales[2].gate_up_differ == 1 and "both are honoured" in found.notes[-1]


def test_scale_statistics_are_those_of_the_bytes(checkpoint):
    shard = Shard(checkpoint / SHARD)
    for expert in range(8):
        for linear in ("w1", "w2", "w3"):
            blocks = np.full(512, 0x38, np.uint8)  # 1.0
            if (expert, linear) == (3, "w2"):
                blocks[:6] = [0x00, 0x80, 0x01, 0x7E, 0x7F, 0xB8]  # 0, -0, 2^-9, 448, NaN, -1
            shard.put(f"layers.2.ffn.experts.{expert}.{linear}.weight_scale", blocks.tobytes())
            scale = struct.pack("<f", 2.0**-expert)
            shard.put(f"layers.2.ffn.experts.{expert}.{linear}.weight_scale_2", scale)
    shard.save()
    layer = inspect(checkpoint, scales=True).scales[2]
    assert (layer.w2_global.low, layer.w2_global.high, layer.w2_global.count) == (2**-7, 1, 8)
    assert (layer.w13_global.count, layer.gate_up_differ) == (16, 0)
    assert (layer.blocks.low, layer.blocks.high, layer.blocks.bad) == (2**-9, 448, 2)
    assert (layer.blocks_read, layer.blocks_zero, layer.blocks_at_max) == (24 * 512, 2, 1)
    assert layer.problems() == ["layers.2: 2 of weight_scale are NaN or negative"]
    sampled = inspect(checkpoint, scales=True, num_sampled=2).scales[2]  # experts 0 and 4
    assert (sampled.blocks_read, sampled.blocks.bad) == (6 * 512, 0)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    config = TinyConfig(
        layers=2, hash_layers=1, hidden=128, intermediate=64, experts=8, heads=4, mtp=1,
        expert_format="mxfp4",
    )  # fmt: skip
    return write_tiny_checkpoint(tmp_path_factory.mktemp("inspect") / "mxfp4", config)


def test_mxfp4_experts_are_ours_where_formats_says_so(mxfp4, original, monkeypatch, capsys):
    assert main(["inspect", str(mxfp4), "--scales"]) == 0
    text = capsys.readouterr().out
    assert "layers.0       hash   MXFP4 experts" in text and "run by vLLM" not in text
    monkeypatch.setenv("VLLM_DSV4_MOE_FORMATS", "nvfp4")
    assert main(["inspect", str(mxfp4)]) == 1
    assert "no layer has NVFP4 experts" in capsys.readouterr().out
    mixed = inspect(original, formats="nvfp4")
    assert [(layer.experts, layer.ours) for layer in mixed.layers] == [
        ("NVFP4", True), ("NVFP4", True), ("NVFP4", True), ("MXFP4", False)
    ]  # fmt: skip


def test_mxfp4_scale_statistics_are_those_of_the_bytes(mxfp4, tmp_path):
    copy = Path(shutil.copytree(mxfp4, tmp_path / "copy"))
    shards = map(Shard, copy.glob("*.safetensors"))
    (shard,) = (shard for shard in shards if "layers.1.ffn.experts.3.w2.scale" in shard.header)
    for expert in range(8):
        for linear in ("w1", "w2", "w3"):
            blocks = np.full(256, 127, np.uint8)  # 1.0
            if (expert, linear) == (3, "w2"):
                blocks[:4] = [0, 254, 255, 120]  # 2^-127, 2^127, NaN, 2^-7
            shard.put(f"layers.1.ffn.experts.{expert}.{linear}.scale", blocks.tobytes())
    shard.save()
    layer = inspect(copy, scales=True, formats="mxfp4").scales[1]
    assert (layer.blocks.low, layer.blocks.high, layer.blocks.bad) == (2.0**-127, 2.0**127, 1)
    assert layer.blocks_read == 24 * 256
    assert layer.problems() == ["layers.1: 1 of scale are NaN or negative"]


def test_e4m3_values():
    torch = pytest.importorskip("torch")
    codes = torch.arange(0x7F, dtype=torch.uint8)
    assert codes.view(torch.float8_e4m3fn).float().tolist() == [e4m3_value(int(c)) for c in codes]


def write_sparse(folder, config, num_files=64):
    """A checkpoint of real size whose files hold headers and holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = list(checkpoint_tensors(ModelSizes.from_config(config)))
    weight_map = {}
    for number in range(num_files):
        header, offset = {}, 0
        for name, spec in tensors[number::num_files]:
            offsets = [offset, offset + spec.num_bytes]
            header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
            offset = offsets[1]
        path = folder / f"model-{number:05}.safetensors"
        write_file(path, header)
        os.truncate(path, path.stat().st_size + offset)
        weight_map |= dict.fromkeys(header, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def nvfp4(config):
    quant = NVFP4["quantization_config"] | {"quant_method": "fp8"}
    return config | {"model_type": "deepseek_v4", "quantization_config": quant}


@pytest.fixture(scope="module")
def sparse_pro(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pro") / "pro"
    write_sparse(folder, nvfp4(PRO))
    yield folder
    shutil.rmtree(folder)


def bytes_read_so_far():
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.slow
def test_pro_of_913_gb_in_seconds_without_reading_it(sparse_pro):
    before, started = bytes_read_so_far(), time.process_time()
    found = inspect(sparse_pro, tp=8)
    seconds, read = time.process_time() - started, bytes_read_so_far() - before
    assert found.problems == [] and found.model.startswith("V4-Pro (hidden 7168")
    assert found.num_bytes > 913e9 and found.num_tensors == 285_660
    assert sum(layer.ours for layer in found.layers) == 62  # the draft, too
    assert read < 100e6, read
    assert seconds < 30, seconds
    experts = 61 * 384 * 3 * 7168 * 3072 * (1 / 2 + 1 / 16) / 8
    assert abs(found.weight_bytes_per_gpu["experts"] / experts - 1) < 0.001


@pytest.mark.slow
def test_pro_weights_under_the_config_of_flash(sparse_pro, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in sparse_pro.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(nvfp4(FLASH)))
    assert main(["inspect", str(folder)]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if "problem:" in line]
    assert (
        "the weights are those of V4-Pro (hidden 7168, intermediate 3072, 384 experts"
        in problems[0]
    )
    assert "config.json is that of V4-Flash (hidden 4096" in problems[0]
    assert len(problems) == 1 and "tensors are missing" in problems[0]


def test_kinds_name_ranges_of_layers_and_experts():
    found = kinds(
        dict(checkpoint_tensors(ModelSizes.from_config(nvfp4(PRO) | {"n_routed_experts": 8})))
    )
    names = {kind.name: kind.num_tensors for kind in found}
    assert names["layers.0-60.ffn.experts.0-7.w1.weight"] == 61 * 8
    assert names["layers.2,4..60.attn.indexer.wq_b.weight"] == 30
    assert names["layers.0,1,3..59.attn.compressor.ape"] == 31
    assert sum(kind.num_tensors for kind in found) == 285_660 - 61 * 376 * 12 - 376 * 6


def test_json_says_the_same(original, capsys):
    assert main(["inspect", str(original), "--json", "--scales", "--tp", "2", "--dp", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and len(found["layers"]) == len(found["scales"]) == 4
    whole = inspect(original).weight_bytes_per_gpu["experts"]
    assert found["weight_bytes_per_gpu"]["experts"] == whole // 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        (json.dumps(nvfp4(FLASH)), "holds no .safetensors file"),
    ],
    ids=["no-config", "broken-config", "no-weights"],
)
def test_nothing_to_check_is_one_sentence(tmp_path, config, words, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((5120, 2304, 384, 40), "V4.1-Flash (hidden 5120, intermediate 2304, 384 experts, 40"),
        ((5120, 2304, 384, 41), "hidden 5120, intermediate 2304, 384 experts, 41 layers"),
    ],
)
def test_a_model_is_recognised_by_its_sizes(sizes, name):
    fields = ("hidden", "intermediate", "num_experts", "num_layers")
    assert model_name(dict(zip(fields, sizes, strict=True))).startswith(name)
