"""The Fréchet distance is that of Gaussians, and I3D names what real clips show."""

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from sora_train.errors import UserError
from sora_train.evaluate.fvd import frechet_distance
from sora_train.evaluate.i3d import I3D, features, load_i3d, max_pool, resized, shapes


def plain(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook's formula, by scipy's root of a matrix."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(s1 @ s2))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s1 + s2 - 2 * root))


def test_the_distance_is_the_textbooks_where_covariances_have_full_rank():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 20)) @ rng.normal(size=(20, 20))
    b = rng.normal(size=(200, 20)) @ rng.normal(size=(20, 20)) + 1
    assert frechet_distance(a, b) == pytest.approx(plain(a, b), rel=1e-9)


def test_the_distance_of_diagonal_gaussians_is_the_closed_form():
    # Rows ± s e_i: mean m, covariance exactly 2 s² / (n - 1) on the diagonal.
    rng, d = np.random.default_rng(1), 30
    means, sides = rng.normal(size=(2, d)), rng.uniform(0.1, 3, size=(2, d))
    a, b = (mean + np.concatenate([np.diag(side), -np.diag(side)]) for mean, side in zip(means, sides, strict=True))
    deviations = sides * np.sqrt(2 / (2 * d - 1))
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [2, 16, 399, 600])
def test_a_set_is_at_distance_zero_from_itself_also_with_fewer_clips_than_features(n: int):
    x = 100 * np.random.default_rng(n).normal(size=(n, 400)) + 1000
    scale = np.square(x - x.mean(0)).sum() / (n - 1)
    assert 0 <= frechet_distance(x, x[::-1]) < 1e-10 * scale


def test_the_distance_is_symmetric_and_finite_where_covariances_have_no_full_rank():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(12, 400)), rng.normal(size=(30, 400))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    # Both lie in 40 dimensions, where a root by eigenvalues is safe after a little is added to the diagonal.
    assert frechet_distance(a, b) == pytest.approx(eigen(a, b), rel=1e-4)
    constant = np.ones((5, 400))
    assert frechet_distance(constant, constant + 2) == pytest.approx(1600)
    with pytest.raises(ValueError, match="at least two rows"):
        frechet_distance(a[:1], b)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(a * np.nan, b)


def eigen(a: np.ndarray, b: np.ndarray) -> float:
    """Tr (S1^½ S2 S1^½)^½ by eigenvalues of symmetric matrices, those below zero left out."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s1) + np.trace(s2) - 2 * shared)


def test_frames_are_resized_as_tensorflow_1_does():
    ramp = torch.arange(10.0).view(1, 1, 1, 1, 10).expand(1, 1, 1, 6, 10)
    wide = resized(ramp, 25)[0, 0, 0]
    assert torch.allclose(wide[0, :-2], 0.4 * torch.arange(23.0))  # pixel i is read at 10 i / 25
    assert torch.equal(wide[0, -2:], torch.full((2,), 9.0).minimum(0.4 * torch.tensor([23.0, 24.0])))
    assert torch.equal(resized(ramp[..., :6], 6), ramp[..., :6])
    assert torch.equal(resized(ramp, 2)[0, 0, 0, 0], torch.tensor([0.0, 5.0]))


def test_pools_pad_as_tensorflow_does():
    x = torch.tensor([5.0, 1, 2, 9, 3, 4]).view(1, 1, 1, 1, 6)
    # 6 places, windows of 3, stride 2: 3 windows need 7 places, so one zero is put behind and none before.
    assert max_pool(x, (1, 1, 3), (1, 1, 2)).flatten().tolist() == [5, 9, 4]
    assert max_pool(x, (1, 1, 3), (1, 1, 1)).flatten().tolist() == [5, 5, 9, 9, 9, 4]


def test_a_file_that_is_not_i3d_is_refused_with_what_is_wrong(tmp_path: Path):
    with pytest.raises(UserError, match=r"validation\.i3d: .*none\.safetensors can't be read"):
        load_i3d(tmp_path / "none.safetensors")
    (tmp_path / "i3d.pt").write_bytes(b"PK\x03\x04 a pickle in a zip")
    with pytest.raises(UserError, match="cut short or no safetensors"):
        load_i3d(tmp_path / "i3d.pt")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"Conv3d_1a_7x7\.conv\.weight should be \(64, 3, 7, 7, 7\) and is missing"):
        load_i3d(tmp_path / "other.safetensors")


@pytest.fixture(scope="module")
def i3d(shared: Path) -> I3D:
    return load_i3d(shared / "models/i3d/i3d_kinetics400.safetensors")


def test_the_file_holds_what_the_forward_pass_reads_and_nothing_else(shared: Path):
    stored = load_file(shared / "models/i3d/i3d_kinetics400.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == shapes()


def test_fewer_than_sixteen_frames_are_refused(i3d: I3D):
    with pytest.raises(UserError, match="at least 16 frames, these have 15"):
        i3d(torch.zeros(1, 15, 8, 8, 3, dtype=torch.uint8))


def decoded(path: Path) -> np.ndarray:
    """All frames of a video, uint8 `F H W 3`."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def signing(shared: Path, name: str, frames: int = 48) -> np.ndarray:
    """The middle of a clip in which a word of sign language is made, cropped to a square."""
    video = decoded(shared / f"data/clips/asl_{name}.mkv")
    start, side = (len(video) - frames) // 2 if len(video) > frames else 0, (video.shape[2] - video.shape[1]) // 2
    return np.ascontiguousarray(video[start : start + frames, :, side:-side])


@pytest.mark.parametrize("name", ["eat", pytest.param("want", marks=pytest.mark.slow)])
def test_i3d_names_what_real_clips_show(i3d: I3D, shared: Path, name: str):
    labels = (shared / "models/i3d/kinetics400_label_map.txt").read_text().splitlines()
    logits = i3d(torch.from_numpy(signing(shared, name))[None])[0]
    assert labels[int(logits.argmax())] == "sign language interpreting"
    assert logits.softmax(0).max() > 0.3


def windows(shared: Path, each: int) -> list[np.ndarray]:
    """Clips of 16 frames of three real videos, evenly spread."""
    found = []
    for name in ("asl_book.mkv", "stream_of_water.mp4", "mdn_frog.mp4"):
        video = decoded(shared / "data/clips" / name)[:, ::2, ::2]
        found += [video[start : start + 16] for start in np.linspace(0, len(video) - 16, each).astype(int)]
    return found


def blurred(videos: list[np.ndarray], sigma: float) -> list[np.ndarray]:
    return [gaussian_filter(video, (0, sigma, sigma, 0)) for video in videos]


def check_distances(i3d: I3D, shared: Path, each: int, sigmas: tuple[float, ...]) -> None:
    """0 to itself, more with every blur, and most to noise."""
    videos = windows(shared, each)
    real = features(i3d, videos)
    noise = np.random.default_rng(0).integers(0, 256, (len(videos), 16, 64, 64, 3), dtype=np.uint8)
    found = [frechet_distance(real, real), *(frechet_distance(real, features(i3d, blurred(videos, s))) for s in sigmas)]
    found.append(frechet_distance(real, features(i3d, noise)))
    print("FVD to itself, under blur, to noise:", *(f"{value:.4g}" for value in found))
    assert found[0] < 1e-6
    assert all(b > a + 10 for a, b in pairwise(found[:-1]))
    assert found[-1] > 1000


def test_fvd_is_zero_to_itself_grows_with_blur_and_is_large_to_noise(i3d: I3D, shared: Path):
    check_distances(i3d, shared, each=1, sigmas=(1.0, 3.0))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fvd_is_zero_to_itself_grows_with_blur_and_is_large_to_noise_on_more_clips(i3d: I3D, shared: Path):
    check_distances(i3d, shared, each=3, sigmas=(0.5, 1.0, 2.0, 4.0))


def test_every_layer_sees_on_real_clips_what_it_saw_in_training(i3d: I3D, shared: Path, monkeypatch):
    # Batch norm remembers the mean and variance that each convolution had over Kinetics, so that behind it a channel's
    # mean is its bias and its variance 1. A wrong order, stride, padding or scale of pixels would move them.
    stored = load_file(shared / "models/i3d/i3d_kinetics400.safetensors")
    seen: dict[str, list[torch.Tensor]] = {}
    plain = torch.nn.functional.relu_
    names = iter([])

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.setdefault(next(names), []).append(torch.stack([x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4))]))
        return plain(x)

    order = [key.removesuffix(".conv.weight") for key in shapes() if key.endswith(".conv.weight")][:-1]
    monkeypatch.setattr(torch.nn.functional, "relu_", watched)
    for video in windows(shared, each=1):
        names = iter(order)
        i3d(torch.from_numpy(video)[None])
    assert len(seen) == 57
    for name, figures in seen.items():
        mean, variance = torch.stack(figures).mean(0)
        assert (mean - stored[f"{name}.bn.bias"]).square().mean().sqrt() < 0.8, name
        assert 0.5 < variance.mean() < 4, name
