"""Stage files: what they hold, where their bytes come from, and what a break leaves."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import gguf
import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker import cut_file
from worker.cut_file import MadeFile, drop_unused, make_stage
from worker.gguf_file import GgufError, read_files
from worker.model_bytes import FileBytes, HttpBytes, SourceError, open_model
from worker.shape import read_shape
from worker.stage_cut import ROWS, Wanted

LAYERS, WIDTH, VOCABULARY = 6, 32, 100
HEAD = Wanted(4, LAYERS, head=True)
TAIL = Wanted(0, 4, head=False)


def nothing(done: int, total: int) -> None:
    assert 0 <= done <= total


def write_model(path: Path, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([1, 2, 3, 4, 5, 6])
    writer.add_context_length(128)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{n}" for n in range(VOCABULARY)])
    writer.add_array("general.tags", ["a", "b", "c", "d", "e", "f"])

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, draw.standard_normal(shape).astype(np.float32))

    add("token_embd.weight", VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.attn_norm.weight", 7)  # no multiple of the alignment
        add(f"blk.{layer}.ffn_up.weight", 64, WIDTH)
    add("output_norm.weight", WIDTH)
    add("output.weight", VOCABULARY, WIDTH)
    add("rope_freqs.weight", 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def cut_of(path: Path, wanted: Wanted, folder: Path) -> MadeFile:
    return make_stage(FileBytes(path), wanted, folder, progress=nothing)


def test_the_stages_together_have_all_layers_once(model: Path, tmp_path: Path):
    whole = tensors_of(model)
    seen: dict[str, Any] = {}
    for wanted in (TAIL, HEAD):
        for name, data in tensors_of(cut_of(model, wanted, tmp_path).path).items():
            if name.startswith("blk."):
                _, number, rest = name.split(".", 2)
                seen[f"blk.{int(number) + wanted.start}.{rest}"] = data
            elif wanted.head:
                seen[name] = data
    assert seen == whole


def test_a_stage_without_the_head_has_no_vocabulary(model: Path, tmp_path: Path):
    path = cut_of(model, TAIL, tmp_path).path
    (file,) = read_files(path)
    tensors = {tensor.name: tensor.shape for tensor in file.tensors}
    assert tensors["token_embd.weight"] == (WIDTH, ROWS)
    assert "output.weight" not in tensors
    assert {"output_norm.weight", "rope_freqs.weight"} <= set(tensors)
    assert file.values["tokenizer.ggml.model"] == "no_vocab"
    assert file.values["llama.vocab_size"] == ROWS
    assert "tokenizer.ggml.tokens" not in file.values
    assert file.values["llama.attention.head_count_kv"] == (1, 2, 3, 4)
    assert gguf.GGUFReader(path).fields["general.tags"].contents() == list("abcdef")


def test_the_head_keeps_its_vocabulary(model: Path, tmp_path: Path):
    (file,) = read_files(cut_of(model, HEAD, tmp_path).path)
    assert file.values["llama.block_count"] == 2
    assert file.values["llama.attention.head_count_kv"] == (5, 6)
    assert file.values["tokenizer.ggml.model"] == "gpt2"
    assert file.values["llama.vocab_size"] == VOCABULARY


def test_parts_of_a_split_model_are_one(model: Path, tmp_path: Path):
    whole = gguf.GGUFReader(model)
    names = [f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    for number, name in enumerate(names):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        if not number:
            for key, field in whole.fields.items():
                if not key.startswith(("GGUF.", "general.architecture")):
                    kinds = field.types
                    writer.add_key_value(
                        key, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None
                    )
        for tensor in whole.tensors[number::2]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    for wanted in (TAIL, HEAD):
        split = cut_of(tmp_path / names[0], wanted, tmp_path / "split").path
        assert tensors_of(split) == tensors_of(cut_of(model, wanted, tmp_path).path)
        assert "split.count" not in read_files(split)[0].values


def test_a_file_is_made_once_and_of_another_model_again(model: Path, tmp_path: Path):
    first = cut_of(model, TAIL, tmp_path)
    written = first.path.stat().st_mtime_ns
    os.utime(first.path, ns=(0, written))
    again = cut_of(model, TAIL, tmp_path)
    assert (first.path, again.fetched) == (again.path, 0)
    # What is known of it by the time of writing holds; when it was used is told by the other.
    assert again.path.stat().st_mtime_ns == written
    assert again.path.stat().st_atime_ns > 0
    assert first.fetched == first.plan.fetched > 0
    other = write_model(tmp_path / "tiny.gguf", seed=1)
    assert cut_of(other, TAIL, tmp_path).path != first.path
    assert cut_of(model, Wanted(0, 5, head=False), tmp_path).path != first.path
    assert cut_of(model, Wanted(0, 4, head=True), tmp_path).path != first.path


class StopsShort(Exception):
    pass


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40))
def test_what_was_begun_is_gone_on_with(tmp_path_factory: pytest.TempPathFactory, steps: int):
    folder = tmp_path_factory.mktemp("stops")
    model = write_model(folder / "tiny.gguf")
    left = steps

    def stop(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise StopsShort

    fetched = 0
    source = FileBytes(model)
    try:
        make_stage(source, HEAD, folder / "cut", progress=stop)
    except StopsShort:
        (partial,) = (folder / "cut").glob(".*.partial")
        fetched = partial.stat().st_size
    again = make_stage(source, HEAD, folder / "cut", progress=nothing)
    assert again.fetched <= again.plan.fetched
    if fetched > len(again.plan.header):
        assert again.fetched < again.plan.fetched
    assert tensors_of(again.path) == tensors_of(cut_of(model, HEAD, folder / "anew").path)
    assert not list((folder / "cut").glob(".*.partial"))


def test_of_old_files_the_newest_are_kept_and_those_in_use(model: Path, tmp_path: Path):
    day = cut_file.UNUSED_SECONDS
    now = 100 * day
    made = [
        cut_of(model, Wanted(start, stop, head=False), tmp_path).path
        for start in range(4)
        for stop in range(start + 1, 5)
    ]
    other = tmp_path / "other.0-1.0123456789abcdef.gguf"
    shard = made[0].with_name(made[0].name.replace(".0-", ".shard-1-of-2-"))
    for path in (other, shard):
        path.write_bytes(b"")
    assert len(made) > cut_file.KEPT_FILES
    for age, path in enumerate(made):
        os.utime(path, (now - age * day / 20, 0))
    assert drop_unused(tmp_path, FileBytes(model).name, now=now) == []
    for age, path in enumerate(made):
        os.utime(path, (now - (age + 1) * day * 1.1, 0))
    # One of the oldest is asked for once more.
    assert cut_of(model, Wanted(3, 4, head=False), tmp_path).path == made[-1]
    gone = drop_unused(tmp_path, FileBytes(model).name, now=now)
    assert gone == made[cut_file.KEPT_FILES - 1 : -1]
    left = {path for path in tmp_path.iterdir() if path.suffix == ".gguf"}
    assert left == {*made, other, shard} - set(gone)


def test_what_came_out_broken_is_removed(model: Path, tmp_path: Path):
    path = cut_of(model, TAIL, tmp_path).path
    partial = path.with_name(f".{path.name}.partial")
    path.rename(partial)
    with partial.open("ab") as file:
        file.write(b"x")
    with pytest.raises(SourceError, match="came out broken"):
        cut_of(model, TAIL, tmp_path)
    assert cut_of(model, TAIL, tmp_path).fetched > 0


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (3, 3), (5, 2), (-1, 2)])
def test_layers_that_are_not_there_are_named(model: Path, tmp_path: Path, start: int, stop: int):
    with pytest.raises(GgufError, match="it has layers 0 to 5"):
        cut_of(model, Wanted(start, stop, head=False), tmp_path)


class Files(BaseHTTPRequestHandler):
    """Serves ranges of one folder and notes what was asked."""

    folder: ClassVar[Path]
    asked: ClassVar[list[tuple[int, int]]] = []
    ranges = True
    etag = '"1"'
    cuts_off = False

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        cls = type(self)
        if self.headers.get("If-Match") not in (None, cls.etag):
            self.send_error(412)
            return
        if not cls.ranges:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            return
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        cls.asked.append((first, first + len(part)))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", cls.etag)
        self.end_headers()
        self.wfile.write(part[:-1] if cls.cuts_off and first else part)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(model: Path) -> Iterator[tuple[str, type[Files]]]:
    handler = type("Served", (Files,), {"folder": model.parent, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}/tiny.gguf", handler
        serving.shutdown()
        thread.join()


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False) as made:
        yield made


def test_of_a_model_elsewhere_only_the_stages_bytes_are_fetched(
    model: Path, tmp_path: Path, server: tuple[str, type[Files]], client: httpx.Client
):
    url, handler = server
    made = make_stage(HttpBytes(url, client), TAIL, tmp_path, progress=nothing)
    assert tensors_of(made.path) == tensors_of(cut_of(model, TAIL, tmp_path / "local").path)
    header, *ranges = handler.asked
    assert header == (0, min(2**20, model.stat().st_size))
    assert sum(b - a for a, b in ranges) == made.fetched == made.plan.fetched
    layers = read_shape(model).layers[:4]
    assert made.fetched == pytest.approx(sum(layer.weights for layer in layers), rel=0.05)
    assert len(ranges) < 5  # what lies side by side is one request


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranges": False}, "does not give ranges"),
        ({"cuts_off": True}, "tiny.gguf: "),
        ({"etag": '"2"'}, "was replaced"),
    ],
)
def test_a_server_that_does_not_do_is_one_line(
    tmp_path: Path,
    server: tuple[str, type[Files]],
    client: httpx.Client,
    changes: dict[str, Any],
    words: str,
):
    url, handler = server
    source = HttpBytes(url, client)
    source.headers()
    for name, value in changes.items():
        setattr(handler, name, value)
    with pytest.raises(SourceError, match=words) as caught:
        b"".join(source.read(0, 64, 4096))
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_and_a_file_that_is_not(
    server: tuple[str, type[Files]], client: httpx.Client
):
    url, _ = server
    with pytest.raises(SourceError, match="answers 404"):
        HttpBytes(url.replace("tiny", "none"), client).headers()
    with pytest.raises(SourceError), open_model("http://127.0.0.1:9/x.gguf") as source:
        source.headers()
    with pytest.raises(SourceError, match="wanted a path, or a URL"), open_model("ftp://x/y"):
        pass
