"""Remarks on sources, from the file to the saved records."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.commits import Commits
from data_prep.reasons import remark_kinds
from data_prep.resume import SourceRecord, load_progress
from data_prep.schemas import DECODED, END_OF_SOURCE
from data_prep.stages import Decode
from sora_train.data.config import DataConfig, SelectionConfig
from sora_train.schema import QUARANTINE_SCHEMA


def test_a_source_ends_with_all_remarks_on_it(tmp_path: Path, write):
    path = write(tmp_path / "a.mkv", np.arange(120) / 30, options={"x264-params": "tff=1"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    data = DataConfig(root=str(tmp_path), captions=str(tmp_path / "c.csv"), frames=8, fps=8, height=32, width=64)
    (tmp_path / "c.csv").write_text("video_file_name,prompt\na.mkv,x\n")
    source = {
        "row_id": "r",
        "source": "a.mkv",
        "captions": ["x"],
        "source_size": 1,
        "source_version": "",
        "path": str(path),
        "skip": [],
    }
    decode = Decode(data, SelectionConfig(), 1)
    rows = pa.Table.from_pylist(list(decode.clips(source)), DECODED).to_pylist()
    decode.decoder.close()
    assert [row["reason"] for row in rows] == [None, END_OF_SOURCE]
    assert sorted(set(remark_kinds(rows[-1]["remark"]))) == ["breaks_off", "interlaced"]


def test_remarks_are_saved_with_their_source(tmp_path: Path):
    records = {
        "r": SourceRecord("a.mp4", 5, "1", ["c"], ["hdr", "interlaced"]),
        "s": SourceRecord("b.mp4", 6, "1", ["d"]),
    }
    commits = Commits(str(tmp_path), "encoding", "key")
    commits.records = dict(records)
    commits.save_sources(QUARANTINE_SCHEMA.empty_table(), set())
    (saved,) = load_progress(str(tmp_path), "key").sources(["row_id", "remarks"])
    assert saved.to_pylist() == [{"row_id": "r", "remarks": ["hdr", "interlaced"]}, {"row_id": "s", "remarks": []}]
