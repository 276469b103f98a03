"""Files of adapters: those of diffusers, peft, ComfyUI and kohya are read as their own libraries read them."""

import json
from pathlib import Path

import peft
import pytest
import torch
from diffusers import WanPipeline
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wan_models import TEXT_WIDTH, wan_transformer

from sora_train.errors import UserError
from sora_train.lora.adapters import adapter_state, add_adapters, load_adapter_state, merge
from sora_train.lora.config import LoraConfig
from sora_train.lora.files import DIFFUSERS_FILE, Adapter, read_lora, with_alpha, write_lora
from sora_train.lora.names import linear_layers
from sora_train.model import ModelConfig, build
from sora_train.model.convert import config_from_diffusers, from_diffusers
from tests.model.wan_reference import run_reference

LATTE = ModelConfig(width=48, depth=4, heads=4, text_width=24, sample_size=8)
JOINT = ModelConfig(width=48, depth=2, heads=4, text_width=24, sample_size=8, attention="joint")
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def randomised(model: torch.nn.Module, seed: int = 3) -> None:
    """Sets every matrix of peft's adapters to random numbers, so that each changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def adapter_of(config: ModelConfig, rank: int = 3, scale: float = 2.0, seed: int = 0) -> Adapter:
    """Random adapters on every attention and feed-forward layer."""
    model = build(config)
    add_adapters(model, LoraConfig(rank=rank, targets=("to_q", "to_k", "to_v", "to_out", "ff")))
    randomised(model, seed)
    return with_alpha(adapter_state(model), scale)


def equal(a: Adapter, b: Adapter) -> bool:
    same = a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    return same and a.scales == b.scales


def content(file: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """A file's metadata and the bytes of its tensors; safetensors writes the metadata in any order."""
    with safe_open(file, "pt") as opened:
        return opened.metadata(), {name: opened.get_tensor(name).numpy().tobytes() for name in opened.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def wan() -> ModelConfig:
    return config_from_diffusers(dict(wan_transformer("2.1").config) | {"_class_name": "WanTransformer3DModel"})


def merged(base: Path, file: Path, weight: float = 1.0) -> torch.nn.Module:
    """Our model with the weights of diffusers' one in `base`, and the adapters of a file."""
    model = from_diffusers(base).eval()
    adapter = read_lora(file, model.config)
    merge(model, adapter.tensors, adapter.scales, weight)
    return model


def difference(model: torch.nn.Module, theirs: torch.nn.Module) -> float:
    """Largest difference of outputs, as a share of the largest output."""
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 3, 16, 8, 8, generator=generator), torch.randn(2, 5, TEXT_WIDTH, generator=generator)
    t, mask = torch.tensor([17.0, 803.0]), torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        expected = run_reference(theirs, x, t, text, mask)
        return float((model(x, t, text, mask) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 2, "rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {r"blocks\.1\..*to_v": 9}},
    ],
)
def test_adapters_that_diffusers_saved_give_its_outputs(settings, tmp_path):
    theirs = wan_transformer("2.1")
    theirs.save_pretrained(tmp_path / "base")
    plain = difference(from_diffusers(tmp_path / "base").eval(), theirs)
    theirs.add_adapter(peft.LoraConfig(target_modules=LAYERS, **settings))
    randomised(theirs)
    metadata = theirs.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(theirs)
    WanPipeline.save_lora_weights(tmp_path / "a", layers, transformer_lora_adapter_metadata=metadata)
    theirs.save_lora_adapter(tmp_path / "b")  # without the prefix
    assert plain < 1e-5
    assert difference(from_diffusers(tmp_path / "base").eval(), theirs) > 0.02
    for folder in ("a", "b"):
        assert difference(merged(tmp_path / "base", tmp_path / folder / DIFFUSERS_FILE), theirs) < 1e-5


def test_adapters_that_peft_saved_give_its_outputs(tmp_path):
    wan_transformer("2.1").save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules=LAYERS)
    theirs = peft.get_peft_model(wan_transformer("2.1"), settings).eval()
    randomised(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    assert difference(merged(tmp_path / "base", tmp_path / "peft"), theirs.get_base_model()) < 1e-5


@pytest.mark.parametrize("kind", ["wan", "latte", "joint"])
def test_a_file_read_and_written_again_is_equal(kind, wan, tmp_path):
    config = {"wan": wan, "latte": LATTE, "joint": JOINT}[kind]
    adapter = adapter_of(config)
    files = write_lora(tmp_path, adapter, config, "mine")
    assert [file.name for file in files] == [DIFFUSERS_FILE, "mine_comfyui.safetensors"][: 1 + (kind == "wan")]
    (tmp_path / "again").mkdir()
    for file in files:
        read = read_lora(file, config)
        assert equal(read, adapter)
        again = write_lora(tmp_path / "again", read, config, "mine")
        assert [content(place) for place in again] == [content(place) for place in files]


def test_ranks_and_alphas_of_single_layers_survive(wan, tmp_path):
    low, high = adapter_of(wan, 2, 1.0), adapter_of(wan, 5, 0.5)
    ours = [name for name in low.alphas if "attention" in name]
    chosen = {name: high if name in ours else low for name in low.alphas}
    tensors = {key: chosen[key.partition(".lora_")[0]].tensors[key] for key in low.tensors}
    mixed = Adapter(tensors, {name: adapter.alphas[name] for name, adapter in chosen.items()})
    for file in write_lora(tmp_path, mixed, wan, "mixed"):
        assert equal(read_lora(file, wan), mixed)
    theirs = wan_transformer("2.1")
    theirs.save_pretrained(tmp_path / "base")
    theirs.load_lora_adapter(tmp_path / DIFFUSERS_FILE, use_safetensors=True)  # else alpha is ignored
    assert difference(merged(tmp_path / "base", tmp_path / DIFFUSERS_FILE), theirs) < 1e-5


@pytest.mark.parametrize("kind", ["lora_down", "musubi"])
def test_names_of_kohya_give_what_diffusers_makes_of_them(kind, wan, tmp_path):
    adapter, layers = adapter_of(wan, scale=0.25), linear_layers(wan)
    there = {}
    for name, layer in layers.items():
        if name not in adapter.alphas:
            continue
        key = f"diffusion_model.{layer.original}"
        if kind == "musubi":
            key = "lora_unet_" + layer.original.replace(".", "_")
        there |= {
            f"{key}.lora_down.weight": adapter.tensors[f"{name}.lora_A.weight"],
            f"{key}.lora_up.weight": adapter.tensors[f"{name}.lora_B.weight"],
            f"{key}.alpha": torch.tensor(adapter.alphas[name]),
        }
    save_file(there, tmp_path / "kohya.safetensors")
    assert equal(read_lora(tmp_path / "kohya.safetensors", wan), adapter)
    theirs = wan_transformer("2.1")
    theirs.save_pretrained(tmp_path / "base")
    theirs.load_lora_adapter(WanPipeline.lora_state_dict(tmp_path, weight_name="kohya.safetensors"))
    assert difference(merged(tmp_path / "base", tmp_path / "kohya.safetensors"), theirs) < 1e-5


def test_the_file_for_comfyui_gives_what_diffusers_makes_of_it(wan, tmp_path):
    adapter = adapter_of(wan, scale=0.25)
    write_lora(tmp_path, adapter, wan, "x")
    keys = load_file(tmp_path / "x_comfyui.safetensors").keys()
    assert "diffusion_model.blocks.1.cross_attn.o.lora_B.weight" in keys
    assert "diffusion_model.blocks.0.ffn.2.alpha" in keys
    theirs = wan_transformer("2.1")
    theirs.save_pretrained(tmp_path / "base")
    theirs.load_lora_adapter(WanPipeline.lora_state_dict(tmp_path, weight_name="x_comfyui.safetensors"))
    assert difference(merged(tmp_path / "base", tmp_path / "x_comfyui.safetensors"), theirs) < 1e-5


def test_layers_outside_the_blocks_are_read_too(wan, tmp_path):
    """Distilled adapters have them."""
    theirs = wan_transformer("2.1")
    theirs.save_pretrained(tmp_path / "base")
    names = {"time_projection.1", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"}
    there = {}
    for layer in linear_layers(wan).values():
        if layer.original in names | {"head.head", "blocks.0.self_attn.q"}:
            there[f"diffusion_model.{layer.original}.lora_A.weight"] = 0.1 * torch.randn(2, layer.in_features)
            there[f"diffusion_model.{layer.original}.lora_B.weight"] = 0.1 * torch.randn(layer.out_features, 2)
    assert len(there) == 14
    save_file(there, tmp_path / "x.safetensors")
    theirs.load_lora_adapter(WanPipeline.lora_state_dict(tmp_path, weight_name="x.safetensors"))
    assert difference(merged(tmp_path / "base", tmp_path / "x.safetensors"), theirs) < 1e-5


def test_several_files_with_weights_equal_their_sum(wan, tmp_path):
    torch.manual_seed(0)
    model = build(wan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, two = adapter_of(wan, 3, 2.0, 1), adapter_of(wan, 4, 1.0, 2)
    merge(model, one.tensors, one.scales, 0.7)
    merge(model, two.tensors, two.scales, -1.3)
    a, b = "blocks.1.text_attention.kv.v.lora_A.weight", "blocks.1.text_attention.kv.v.lora_B.weight"
    change = model.state_dict()["blocks.1.text_attention.kv.weight"] - before["blocks.1.text_attention.kv.weight"]
    expected = 1.4 * one.tensors[b] @ one.tensors[a] - 1.3 * two.tensors[b] @ two.tensors[a]
    torch.testing.assert_close(change[wan.width :], expected, rtol=1e-5, atol=1e-6)
    unchanged = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert set(unchanged) == {name for name in before if not any(x in name for x in ("attention", "feed_forward"))} | {
        name for name in before if ("norm" in name or "bias" in name)
    }


def test_a_checkpoint_has_the_alpha_of_its_recipe(tmp_path):
    adapter = adapter_of(JOINT, 4, 0.75)
    save_file(adapter.tensors, tmp_path / "ema.safetensors")
    (tmp_path / "recipe.yaml").write_text("lora:\n  rank: 4\n  alpha: 3.0\n")
    assert equal(read_lora(tmp_path, JOINT), adapter)


def damaged(place: Path, what: str, adapter: Adapter, config: ModelConfig) -> Path:
    """A file with a fault."""
    (good,) = write_lora(place, adapter, config)
    content = load_file(good)
    first, second, *_ = content
    layer = first.partition(".lora_")[0]
    match what:
        case "pickle":
            file = place / "adapter.pt"
            torch.save(content, file)
            return file
        case "cut short":
            good.write_bytes(good.read_bytes()[:-7])
            return good
        case "metadata":
            save_file(content, good, {"lora_adapter_metadata": "{"})
            return good
        case "one matrix":
            content.pop(second)
        case "rank":
            content[second] = content[second][:, :-1].contiguous()
        case "not finite":
            content[first][0, 0] = float("nan")
        case "unknown":
            content[first.replace("transformer.", "transformer.other_")] = content[first].clone()
        case "more":
            content[f"{layer}.diff_b"] = torch.zeros(4)
        case "whole model":
            content = {name: tensor.contiguous() for name, tensor in build(config).state_dict().items()}
        case "empty":
            content = {}
    save_file(content, good)
    return good


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("pickle", "is a pickle, which may run any code"),
        ("cut short", "is cut short or no safetensors"),
        ("metadata", r"the settings of .* can't be read"),
        ("one matrix", r"has only one matrix of \S+attn1\.to_\S+\. Fetch or export it again"),
        ("rank", r"the matrices of \S+ are \[3, 48\] and \[48, 2\], which have no product"),
        ("not finite", "has values that are not finite"),
        ("unknown", r"has 1 of \d+ tensors that the model has no layer for: transformer\.other_"),
        ("more", r"changes more than LoRA's matrices \(1 of \d+ tensors: \S+\.diff_b\)"),
        ("whole model", r"holds no adapters, but blocks\.0\.attention"),
        ("empty", "holds no adapters, but nothing"),
    ],
)
def test_a_wrong_file_gets_one_clear_message(what, says, tmp_path):
    file = damaged(tmp_path, what, adapter_of(LATTE), LATTE)
    with pytest.raises(UserError, match=says) as caught:
        read_lora(file, LATTE)
    assert caught.value.code == "lora"
    assert "\n" not in str(caught.value)


def test_a_file_of_another_model_is_refused_with_both_sizes(wan, tmp_path):
    (latte,) = write_lora(tmp_path, adapter_of(LATTE), LATTE)
    other = ModelConfig(width=96, depth=4, heads=4, text_width=24, sample_size=8)
    with pytest.raises(UserError, match="maps 48 numbers to 48, and this model's 96 to 96. Use a file for the same"):
        read_lora(latte, other)
    with pytest.raises(UserError, match=r"has no layers transformer\.\S+transformer_blocks"):
        read_lora(latte, wan)
    shallow = ModelConfig(width=48, depth=2, heads=4, text_width=24, sample_size=8)
    with pytest.raises(UserError, match=r"has \d+ of \d+ tensors that the model has no layer for"):
        read_lora(latte, shallow)


def test_a_missing_file_or_folder_without_one_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors does not exist"):
        read_lora(tmp_path / "none.safetensors", LATTE)
    with pytest.raises(UserError, match="is a folder without pytorch_lora_weights"):
        read_lora(tmp_path, LATTE)


def test_adapters_read_go_into_a_model_of_the_same_rank(wan, tmp_path):
    adapter = adapter_of(wan)
    (file, _) = write_lora(tmp_path, adapter, wan, "x")
    model = build(wan)
    add_adapters(model, LoraConfig(rank=3, targets=("to_q", "to_k", "to_v", "to_out", "ff")))
    load_adapter_state(model, read_lora(file, wan).tensors)
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in adapter_state(model).items())


def test_diffusers_metadata_is_written(wan, tmp_path):
    write_lora(tmp_path, adapter_of(wan, 4, 0.5), wan)
    with safe_open(tmp_path / DIFFUSERS_FILE, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 2.0)
