"""How the tests read what runs leave on disk: with no code of the engine, the loop or the checkpoints."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")


def parts(folder: Path, kind: str = "weights") -> dict[str, torch.Tensor]:
    """Whole flat tensors of one kind of a checkpoint, put together from the ranks' files."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in folder.glob("part_*"):
        with safe_open(path, "pt") as file:
            for name, offset in json.loads(file.metadata()["offsets"]).items():
                pieces.setdefault(name, []).append((offset, file.get_tensor(f"{kind}/{name}")))
    for found in pieces.values():
        found.sort(key=lambda piece: piece[0])
        assert [offset for offset, _ in found] == [sum(len(t) for _, t in found[:i]) for i in range(len(found))]
    return {name: torch.cat([tensor for _, tensor in found]) for name, found in pieces.items()}


def checkpoint_at(run: Path, step: int) -> Path:
    return run / f"checkpoints/step_{step:08d}"


def at_step(run: Path, step: int, kind: str = "weights") -> dict[str, torch.Tensor]:
    return parts(checkpoint_at(run, step), kind)


def without_key_biases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Softmax does not feel what is added to every key alike: the true gradient is zero, and Adam, which divides by
    the gradient's size, makes steps of mere rounding.
    """
    keyless = {}
    for name, tensor in tensors.items():
        if name.endswith("qkv.bias"):
            q, _, v = tensor.chunk(3)
            tensor = torch.cat([q, v])
        elif name.endswith("kv.bias"):
            tensor = tensor.chunk(2)[1]
        keyless[name] = tensor
    return keyless


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """‖a - b‖ ÷ ‖b‖ over all parameters."""
    assert a.keys() == b.keys()
    both = [torch.cat([x[name].flatten().double() for name in sorted(a)]) for x in (a, b)]
    return float((both[0] - both[1]).norm() / both[1].norm())


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run)}
