"""`sora download` with huggingface_hub itself against a hub on loopback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wan_models import make_wan_pipeline, wan_transformer

from sora_train.codec import BUILTIN, CodecConfig
from sora_train.codec.conventions import cleaning_of
from sora_train.codec.files import find_text_encoder, find_vae
from sora_train.errors import UserError

PROGRAM = """
import json, shutil, sys
from sora_train.codec import CodecConfig
from sora_train.codec.download import download
from sora_train.errors import UserError

codec, to, extra, free = json.loads(sys.argv[1])
if free is not None:
    usage = shutil.disk_usage
    shutil.disk_usage = lambda place: usage(place)._replace(free=free)
try:
    download(CodecConfig(**codec), to, extra)
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


def run(hub: Any, to: Path, *, extra=None, free: int | None = None, **codec: str) -> tuple[str, str]:
    """What the download printed and, where it failed, its message. HF_ENDPOINT is read when the library is imported."""
    url = hub if isinstance(hub, str) else hub.url
    settings = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(to.parent / "home"), "HF_TOKEN": ""}
    arguments = json.dumps([codec or {"vae": "acme/pipe", "text": "acme/pipe"}, str(to), extra, free])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr if done.returncode else ""


def test_what_the_recipe_names_comes_whole_and_is_found_afterwards(hub: Any, tmp_path: Path):
    to = tmp_path / "models"
    out, message = run(hub, to)
    assert message == ""
    folder = to / "acme--pipe"
    wanted = {path for path in hub.files if path.split("/")[0] in ("vae", "text_encoder", "tokenizer")}
    wanted -= {"vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == wanted | {"sora_download.json"}
    assert all((folder / path).read_bytes() == hub.files[path] for path in wanted)
    # The table comes before the first file: repository, revision, hash, size, and what there is room for.
    table = out[: out.index("acme/pipe 1/")]
    assert f"acme/pipe  newest = commit {hub.commit}  (codec.vae, codec.text)" in table
    assert hub.facts(WEIGHTS)["lfs"]["sha256"] in table
    assert "free in" in table
    assert out.splitlines()[-3:] == [
        f"codec.vae: acme/pipe@{hub.commit}",
        f"codec.text: acme/pipe@{hub.commit}",
        f"codec.models: {to}",
    ]
    for find, part in ((find_vae, "vae"), (find_text_encoder, "text")):
        files = find("acme/pipe", str(to))
        assert files.hash == find("builtin").hash
        assert files.place.is_relative_to(folder), part
    state = json.loads((folder / "sora_download.json").read_text())
    assert (state["commit"], state["complete"]) == (hub.commit, True)
    hub.gets.clear()
    assert "already there" in run(hub, to)[0]
    assert hub.gets == []  # a second time nothing is fetched


def test_a_wan_pipeline_comes_with_what_its_recipe_needs_and_no_more(serve: Any, tmp_path: Path):
    pipeline = make_wan_pipeline(tmp_path / "made", "2.2")
    shutil.rmtree(pipeline / "transformer")
    wan_transformer("2.2").save_pretrained(pipeline / "transformer", max_shard_size="60KB")
    files = {str(path.relative_to(pipeline)): path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}
    files |= {"assets/logo.png": b"png", "README.md": b"readme", "transformer/diffusion_pytorch_model.bin": b"pickle"}
    wan = {"vae": "acme/pipe", "text": "acme/pipe", "extra": {"model.init_from": "acme/pipe"}}
    with serve(files) as hub:
        assert run(hub, tmp_path / "m", **wan)[1] == ""
    folder = tmp_path / "m" / "acme--pipe"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    wanted = {path for path in files if path.split("/")[0] in ("transformer", "vae", "text_encoder", "tokenizer")}
    wanted |= {"model_index.json", "scheduler/scheduler_config.json", "sora_download.json"}
    assert there == wanted - {"transformer/diffusion_pytorch_model.bin"}
    assert sum(path.startswith("transformer/") and path.endswith(".safetensors") for path in there) > 1
    codec = CodecConfig(vae="acme/pipe", text="acme/pipe", models=str(tmp_path / "m"))
    assert (find_vae(codec.vae, codec.models).factor, cleaning_of(codec, "acme/pipe")) == (16, "wan")
    assert find_text_encoder(codec.text, codec.models).kind == "UMT5EncoderModel"


@pytest.fixture
def big(hub: Any) -> str:
    """A file of several of the library's chunks of 10 MiB, whose connection breaks off within the second."""
    path = "transformer/x.safetensors"
    hub.files[path] = bytes(range(256)) * (24 * 2**12)
    hub.cut[path] = 15 * 2**20
    return path


def test_a_connection_that_breaks_off_once_is_taken_up_where_it_was(hub: Any, big: str, tmp_path: Path):
    assert run(hub, tmp_path / "models", vae="builtin", extra={"model.init_from": "acme/pipe"})[1] == ""
    assert [wish for path, wish in hub.gets if path == big] == ["", f"bytes={10 * 2**20}-"]
    assert (tmp_path / "models" / "acme--pipe" / big).read_bytes() == hub.files[big]


def test_another_run_takes_up_what_the_last_one_left(hub: Any, big: str, tmp_path: Path):
    to, hub.down = tmp_path / "models", True
    message = run(hub, to, vae="acme/pipe", extra={"model.init_from": "acme/pipe"})[1]
    assert f"acme/pipe: {big} was interrupted at 10.5 MB of 25.2 MB" in message
    assert "Run the same command again to resume" in message
    with pytest.raises(UserError, match="interrupted in .*acme--pipe. Run it again with `--to"):
        find_vae("acme/pipe", str(to))
    hub.down = False
    hub.gets.clear()
    assert run(hub, to, vae="acme/pipe", extra={"model.init_from": "acme/pipe"})[1] == ""
    assert [wish for path, wish in hub.gets if path == big] == [f"bytes={10 * 2**20}-"]
    assert (to / "acme--pipe" / big).read_bytes() == hub.files[big]
    assert find_vae("acme/pipe", str(to)).hash == find_vae("builtin").hash


def test_wrong_bytes_are_found_and_removed(hub: Any, tmp_path: Path):
    for path in (WEIGHTS, "vae/config.json"):  # known by sha256, and by git's hash
        to = tmp_path / path.replace("/", "-")
        hub.wrong = {path}
        message = run(hub, to)[1]
        assert f"acme/pipe: {path} arrived with another size or hash than the hub lists" in message
        assert not list((to / "acme--pipe" / "vae").glob(f"{Path(path).name}*"))


def test_a_file_that_was_damaged_afterwards_is_fetched_again(hub: Any, tmp_path: Path):
    to = tmp_path / "models"
    run(hub, to)
    (to / "acme--pipe" / WEIGHTS).write_bytes(bytes(len(hub.files[WEIGHTS])))
    assert run(hub, to)[1] == ""
    assert (to / "acme--pipe" / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_another_revision_replaces_what_it_does_not_have(hub: Any, tmp_path: Path):
    to = tmp_path / "models"
    hub.files["vae/old.safetensors"] = b"old"
    assert f"v1 = commit {hub.commit}" in run(hub, to, vae="acme/pipe@v1")[0]
    del hub.files["vae/old.safetensors"]
    hub.commit = "d" * 40
    run(hub, to, vae="acme/pipe@" + "d" * 40)
    assert not (to / "acme--pipe" / "vae" / "old.safetensors").exists()
    assert find_vae("acme/pipe@" + "d" * 40, str(to)).hash == find_vae("builtin").hash
    assert find_vae("acme/pipe@ddddddd", str(to)).channels == 4
    with pytest.raises(UserError, match=f"is acme/pipe@v1, but .*acme--pipe holds d+ .*{'d' * 40}.*--to"):
        find_vae("acme/pipe@v1", str(to))


def test_a_hub_out_of_reach_is_one_message_that_names_each_folder_to_fill(tmp_path: Path):
    to = tmp_path / "models"
    (to / "acme--text").mkdir(parents=True)
    _, message = run("http://127.0.0.1:9", to, vae="acme/pipe@v1", text="acme/text", extra={"model.init_from": "a/b"})
    assert "the hub (http://127.0.0.1:9) can't be reached" in message
    assert f"codec.vae: {to}/acme--pipe: *.json, *.safetensors, spiece.model of vae/ (or" in message
    assert "127.0.0.1:9/acme/pipe/tree/v1" in message
    assert f"codec.text: {to}/acme--text (exists): *.json" in message
    assert f"model.init_from: {to}/a--b: " in message
    assert message.strip().endswith(f"codec.models: {to}")


def test_a_folder_filled_by_hand_is_taken_as_it_is(tmp_path: Path):
    folder = tmp_path / "acme--pipe" / "vae"
    folder.mkdir(parents=True)
    for path in (BUILTIN / "vae").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert find_vae("acme/pipe@v1", str(tmp_path)).hash == find_vae("builtin").hash


def test_a_folder_of_models_that_is_not_there_is_named(tmp_path: Path):
    nowhere = f"{tmp_path}/no/such/place"
    with pytest.raises(UserError, match=f"codec.models: no folder '{nowhere}'. Fill it with `sora download"):
        find_vae("acme/pipe", nowhere)
    assert find_vae("builtin", nowhere).channels == 4


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((401, "RepoNotFound"), "is not on the hub, or private"),
        ((403, "GatedRepo"), "is gated. Accept its terms at http"),
        ((429, ""), "the hub refuses"),
        ((503, ""), "can't be reached"),
    ],
)
def test_a_refusal_is_said_in_plain_words(hub: Any, tmp_path: Path, refusal: tuple[int, str], words: str):
    hub.refusal = refusal
    assert words in run(hub, tmp_path / "models")[1]


def test_what_can_not_be_is_said_before_anything_is_fetched(hub: Any, tmp_path: Path):
    to = tmp_path / "models"
    assert "has no revision 'v9'" in run(hub, to, vae="acme/pipe@v9")[1]
    assert "codec.vae: no folder './x'" in run(hub, to, vae="./x")[1]
    assert "one folder holds one revision" in run(hub, to, vae="acme/pipe@v1", text="acme/pipe@v2")[1]
    assert f"{to} has 1 kB free" in run(hub, to, free=1000)[1]
    del hub.files[WEIGHTS], hub.files["vae/diffusion_pytorch_model.fp16.safetensors"]
    assert "has no safetensors for codec.vae: pickled weights are never loaded" in run(hub, to)[1]
    assert hub.gets == []
    assert not to.exists()


def test_what_is_not_on_the_hub_is_left_out_and_said(hub: Any, tmp_path: Path):
    out, _ = run(hub, tmp_path / "m", vae=str(BUILTIN / "vae"), extra={"model.init_from": "acme/pipe"})
    assert "codec.vae: " in out
    assert "is a folder, nothing to fetch" in out
    assert "codec.text: builtin comes with sora_train, nothing to fetch" in out
    folder = tmp_path / "m" / "acme--pipe"
    assert (folder / "transformer" / "x.safetensors").read_bytes() == b"x" * 999
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix == ".json"}
    # What `sora sample` of the folder needs besides the parts that the codec names.
    assert {"transformer/config.json", "scheduler/scheduler_config.json", "model_index.json"} <= there
    assert "Nothing to download" in run("http://127.0.0.1:9", tmp_path / "m", vae="builtin")[0]
