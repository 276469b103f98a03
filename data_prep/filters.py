"""Filters: skip clips that are black, frozen, too still, too lively, blurred or duplicates; and find scene cuts.

docs/architecture.md says how to add one. A filter that needs no pixels belongs in `video.clips.Source.plan_clips`.

Black and frozen follow FFmpeg's blackdetect and freezedetect; motion is DIS optical flow (Kroeger et al. 2016,
arXiv:1603.03590, OpenCV's implementation); cuts are PySceneDetect's; the perceptual hash is ImageHash's `phash`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import cv2
import numpy as np

from data_prep.reasons import ClipError
from sora_train.data.config import SelectionConfig

cv2.setNumThreads(1)  # a decoder has one core; the others belong to other decoders and to the VAE

BLACK_LUMA, BLACK_SHARE = 25, 0.98  # blackdetect: at most 10 % of full luma, in 98 % of the pixels
FROZEN_BLOCKS, FROZEN_STEP = 16, 4  # blocks along the short side; largest change of a block's mean, of 255
FLOW_SIDE = 96  # pixels of the short side when motion is measured; OpenCV's DIS crashes below 16
HASH_SIDE = 64  # pixels of the short side when frames are hashed; imagehash is slow at shrinking to its 32 x 32
CUT_SIDE = 256  # pixels of the long side when cuts are searched, as in PySceneDetect


def check_pixels(frames: np.ndarray, fps: float, selection: SelectionConfig) -> None:
    """Raises ClipError if frames uint8 `F H W 3` do not pass the filters of `selection`.

    The order is: `black`, `frozen`, `too_still` or `too_lively`, `blurred`. A clip of one frame has no motion and is
    not frozen. Filters that are off are not computed.
    """
    if selection.black and (share := black_share(frames)) >= BLACK_SHARE:
        raise ClipError("black", f"{share:.1%} of every frame is black; kept below {BLACK_SHARE:.0%} (selection.black)")
    if len(frames) > 1:
        if selection.frozen and (step := max_block_change(frames)) <= FROZEN_STEP:
            raise ClipError(
                "frozen", f"no part changes by more than {step:.0f} of 255; kept above {FROZEN_STEP} (selection.frozen)"
            )
        if selection.min_motion or selection.max_motion:
            speed = motion(frames, fps)
            found = f"moves by {speed:.3g} % of its width per second"
            if speed < selection.min_motion:
                raise ClipError("too_still", f"{found}; the least is {selection.min_motion:g} (selection.min_motion)")
            if selection.max_motion and speed > selection.max_motion:
                raise ClipError("too_lively", f"{found}; the most is {selection.max_motion:g} (selection.max_motion)")
    if selection.min_sharpness and (sharp := sharpness(frames)) < selection.min_sharpness:
        raise ClipError(
            "blurred", f"sharpness {sharp:.3g}; the least is {selection.min_sharpness:g} (selection.min_sharpness)"
        )


def black_share(frames: np.ndarray) -> float:
    """The share of black pixels in the frame of `F H W 3` that has the fewest."""
    return min(float((to_grey(frame) <= BLACK_LUMA).mean()) for frame in frames)


def max_block_change(frames: np.ndarray) -> float:
    """The largest difference between a block's mean colour in any frame and in the first frame, of 255.

    A mean over whole frames, as in freezedetect, does not tell noise from motion: a still photograph changes by 0.4 to
    5.9 after encoding, a car that drives into the frame by 0.9. Means of blocks do: 1 to 4 for noise (x264 at crf 18
    to 34 and with a camera's noise, MPEG-2, MPEG-4; 5 at crf 40) against 7 for that car and more for everything else.
    """
    first, *rest = (resize_short_side(frame, FROZEN_BLOCKS).astype(np.int16) for frame in frames)
    return max(float(np.abs(later - first).max()) for later in rest)


def motion(frames: np.ndarray, fps: float) -> float:
    """Mean length of the optical flow, in percent of the frame's width per second.

    Correct to 12 % for steps of up to a tenth of the width per frame in detailed images. Flat areas count as still.
    The noise of a still image is below 0.5.
    """
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    small = [resize_short_side(to_grey(frame), FLOW_SIDE) for frame in frames]
    # An array in place of None would be the initial flow.
    steps = [flow.calc(a, b, None) for a, b in pairwise(small)]  # pyright: ignore[reportArgumentType, reportCallIssue]
    lengths = [cv2.magnitude(step[..., 0], step[..., 1]).mean() for step in steps]
    return float(np.mean(lengths)) / small[0].shape[1] * 100 * fps


def sharpness(frames: np.ndarray) -> float:
    """Variance of the Laplacian of the grey frames, 0 to 255: the median over the frames."""
    return float(np.median([cv2.Laplacian(to_grey(frame), cv2.CV_32F).var() for frame in frames]))


def to_grey(frame: np.ndarray) -> np.ndarray:
    """Full-range luma uint8 `H W` of a frame uint8 `H W 3`."""
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)


def resize_short_side(image: np.ndarray, side: int) -> np.ndarray:
    """An image `H W` or `H W 3` resized to a short side of `side`, by area averaging if it shrinks."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=how)


def perceptual_hash(frames: np.ndarray) -> str:
    """48 hex digits: 64 bits of imagehash.phash for the first, middle and last of frames uint8 `F H W 3`."""
    import imagehash
    from PIL import Image

    indices = (0, len(frames) // 2, len(frames) - 1)
    hashes = {}
    for index in dict.fromkeys(indices):
        small = resize_short_side(to_grey(frames[index]), HASH_SIDE)
        hashes[index] = str(imagehash.phash(Image.fromarray(small)))
    return "".join(hashes[index] for index in indices)


def scene_spans(path: str, threshold: float, alive: Callable[[], None] = lambda: None) -> list[tuple[float, float]]:
    """Start and end of each scene of a video, in seconds since its first frame; one span if there are no cuts.

    Every frame that PySceneDetect scores `threshold` or more against the one before is a cut, even directly after
    another cut; slow dissolves are not found. It reads the whole video and calls `alive` at each frame. If a file
    ends early, the last span reaches to the end that its container promises, so the missing clips get a reason. Raises
    ClipError `unreadable`, `no_video_stream` or `too_large`, and `corrupt` if no frame decodes.
    """
    import av
    from av.video.reformatter import Interpolation, VideoReformatter
    from scenedetect import ContentDetector, FrameTimecode

    from data_prep.video.damage import DamagedFrame
    from data_prep.video.probe import error_text, read_header
    from data_prep.video.readers import PyAvReader

    header = read_header(path)
    detector, resizer = ContentDetector(threshold, min_scene_len=0), VideoReformatter()
    starts, end, count, damage, width, height = [0.0], 0.0, 0, "", 0, 0
    video = PyAvReader(path, header)  # for the same time axis as the clips'
    try:
        video.rewind()
        for time, frame, *_ in video.decoded_frames():
            alive()
            if isinstance(frame, DamagedFrame):
                damage, end = damage or f": {frame.why}", time
                continue
            if not width:  # the first frame's shape is every frame's, since the detector compares them
                scale = min(1.0, CUT_SIDE / max(frame.width, frame.height))
                width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
            small = resizer.reformat(frame, width, height, "bgr24", interpolation=Interpolation.AREA).to_ndarray()
            if detector.process_frame(FrameTimecode(count, 25.0), small):
                starts.append(time)
            end, count = time + video.frame_duration(frame), count + 1
    except (av.FFmpegError, ValueError) as error:
        damage = f": {error_text(error)}"
    finally:
        video.close()
    if not count:
        raise ClipError("corrupt", f"no frame decodes{damage}")
    return list(pairwise([*starts, max(end, header.container_duration_s)]))
