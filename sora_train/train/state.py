"""The training state that `state.json` of a checkpoint holds; its fields are the keys there."""

from dataclasses import dataclass, replace

from sora_train.data.order import batch_number


@dataclass(frozen=True)
class State:
    """The training state. Together with the recipe's seed it determines everything that follows."""

    step: int = 0
    """Steps done, including those that the guard skipped."""
    samples_seen: int = 0
    """Clips that the weights were trained on, without padding and skipped steps."""
    updates: int = 0
    """AdamW's own count of steps, without the skipped ones; its bias correction uses it."""
    skipped: tuple[int, ...] = ()
    """Numbers of the batches that are never taken again, after a rollback."""
    streak: tuple[int, ...] = ()
    """Numbers of the batches that were skipped in a row up to now."""
    rollbacks: int = 0
    """Rollbacks so far."""
    back_at: int = -1
    """Step of the checkpoint that the last rollback loaded; -1 if there was none."""
    norms: tuple[float, ...] = ()
    """Gradient norms of the last good steps, for the guard."""
    loss: float | None = None
    """Mean loss since the previous checkpoint."""
    clips: str = ""
    """`ShardSet.fingerprint` of the clips that the order of samples is over."""
    data_from: int = 0
    """Batch number at which these clips' first epoch began: 0, or where the run continued with new data."""
    data_epoch: int = 0
    """The number of that epoch."""
    epoch: int = 0
    """The epoch of the last batch that was taken."""
    base: str = ""
    """Hash of the frozen base that adapters were trained on (`adapted.py`); empty if all weights are trained."""
    base_from: str = ""
    """The folder of that base."""


def with_clips(state: State, clips: str, epoch: int = 0) -> State:
    """The state of a run that continues with the clips of this fingerprint.

    If they differ from the state's, the next batch begins an epoch of them: the one after the state's epoch, or after
    `epoch` if that is later.
    """
    if state.clips in ("", clips):
        return replace(state, clips=clips)
    next_batch = batch_number(state.step, state.skipped)
    return replace(state, clips=clips, data_from=next_batch, data_epoch=max(state.epoch, epoch) + 1, streak=())
