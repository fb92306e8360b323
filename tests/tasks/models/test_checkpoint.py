"""Model directories are untrusted: only their own files that transformers reads are used, and only if valid."""

import json
import os
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize_gemma.tasks.builtin import BUILTIN
from quantize_gemma.tasks.check import check_run
from quantize_gemma.tasks.download import download, resolve_model
from quantize_gemma.tasks.models.checkpoint import read_header, read_headers, source_files, weight_files
from quantize_gemma.tasks.models.load_check import check_directory
from quantize_gemma.tasks.models.source_files import open_source
from quantize_gemma.tasks.runtime import worker
from quantize_gemma.tasks.runtime.errors import UserError
from quantize_gemma.tasks.untie import untie
from tests.hub.server import serve
from tests.text_only import write_text_only

SECRET = "hf_not_for_the_release"
EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture
def model(tiny_copy: Callable[[], Path]) -> Path:
    return tiny_copy()


def check(model: Path) -> None:
    """Run the checks of `quantize-gemma check` on a directory."""
    check_run(str(model), "HQQ-INT8-INT4", 1024, "cpu", None)
    check_directory(str(model))


def check_rejected(model: Path, *words: str) -> None:
    """Check that the model is rejected in one sentence with these words, and is not copied."""
    with pytest.raises(UserError) as raised:
        check(model)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    target = model.parent / "target"
    target.mkdir()
    with pytest.raises(UserError):
        download(target, str(model), "0" * 40, False)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def read_raw_header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw_header(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def shard(model: Path) -> tuple[Path, Path]:
    """Split the model's file into two with an index; return the files."""
    header, data = read_raw_header(model / "model.safetensors")
    header.pop("__metadata__", None)
    files = [model / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    names = sorted(header)
    weight_map = {}
    for file, part in zip(files, (names[:40], names[40:]), strict=True):
        written, content = {}, b""
        for name in part:
            begin, end = header[name]["data_offsets"]
            written[name] = {**header[name], "data_offsets": [len(content), len(content) + end - begin]}
            content += data[begin:end]
            weight_map[name] = file.name
        write_raw_header(file, {"__metadata__": {"format": "pt"}, **written}, content)
    (model / "model.safetensors").unlink()
    index = {"metadata": {"total_size": len(data)}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return files[0], files[1]


# Which files a directory may have.


def test_a_link_that_leaves_the_model_directory_is_rejected_by_name(model: Path) -> None:
    secret = model.parent / "token"
    secret.write_text(SECRET)
    (model / "NOTICE.txt").symlink_to(secret)
    check_rejected(model, "NOTICE.txt", "token", "outside the model directory")
    with pytest.raises(UserError, match=r"NOTICE\.txt"):
        resolve_model(str(model), None, False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_links_of_every_kind_of_file_are_checked(model: Path, name: str) -> None:
    elsewhere = model.parent / "elsewhere"
    shutil.move(model / name, elsewhere)
    (model / name).symlink_to(os.path.relpath(elsewhere, model))
    check_rejected(model, name, "outside the model directory")


def test_a_shard_behind_a_link_is_rejected(model: Path) -> None:
    _, second = shard(model)
    check(model)
    shutil.move(second, model.parent / "second")
    second.symlink_to(model.parent / "second")
    check_rejected(model, second.name, "outside the model directory")


def test_a_link_within_the_model_directory_is_followed(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "mine.json")
    (model / "tokenizer.json").symlink_to("mine.json")
    (model / "LICENSES").mkdir()
    check(model)
    elsewhere = model.parent / "a link to the model"
    elsewhere.symlink_to(model)
    assert resolve_model(str(elsewhere), None, False).revision == resolve_model(str(model), None, False).revision


def test_a_revision_of_a_directory_is_rejected_even_if_it_has_the_name_of_a_repository(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parents[1])
    name = f"{model.parent.name}/{model.name}"
    message = f"is the directory {model}, .* leave out --revision 'main', or rename"
    with pytest.raises(UserError, match=message):
        resolve_model(name, "main", False)
    with pytest.raises(UserError, match=message):
        check_run(name, "HQQ-INT8-INT4", 1024, "cpu", None, revision="main")


def test_the_hubs_cache_and_its_blobs_are_a_model_directory(model: Path) -> None:
    repository = model.parent / "models--team--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.move(path, repository / "blobs" / f"{number:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040}")
    check(snapshot)
    (snapshot / "NOTICE").symlink_to("../../refs")
    (repository / "refs").write_text(SECRET)
    check_rejected(snapshot, "NOTICE", "outside the model directory")
    # The layout alone does not make a directory part of the Hub's cache.
    other = model.parent / "x" / "snapshots" / "y"
    other.mkdir(parents=True)
    (other.parent.parent / "blobs").mkdir()
    (other.parent.parent / "blobs" / "secret").write_text(SECRET)
    (other / "NOTICE").symlink_to("../../blobs/secret")
    with pytest.raises(UserError, match="outside the model directory"):
        source_files(other)


def test_pipes_sockets_and_dangling_links_are_rejected_without_waiting(model: Path) -> None:
    def pipe(path: Path) -> None:
        os.mkfifo(path)

    def bind(path: Path) -> None:
        # Not with bind(), whose paths are limited to 107 characters.
        os.mknod(path, stat.S_IFSOCK | 0o600)

    def dangle(path: Path) -> None:
        path.symlink_to("nowhere")

    for make in (pipe, bind, dangle):
        for name in ("NOTICE", "config.json", "model.safetensors"):
            broken = Path(shutil.copytree(model, model.parent / f"{make.__name__}-{name}"))
            (broken / name).unlink(missing_ok=True)
            make(broken / name)
            with pytest.raises(UserError, match=name):
                check(broken)


def test_a_file_name_with_a_line_break_is_rejected(model: Path) -> None:
    (model / "LICENSE\nlicense: mit").write_text("")
    check_rejected(model, r"'LICENSE\nlicense: mit'", "control characters")


def test_a_file_that_is_replaced_after_it_was_listed_is_not_copied(model: Path) -> None:
    """The checks use the open file: they also notice that a file or a parent directory was replaced with a link."""
    (model.parent / "secrets").mkdir()
    (model.parent / "secrets" / "NOTICE").write_text(SECRET)
    (model / "NOTICE").write_text("mine")
    assert "NOTICE" in source_files(model)
    (model / "NOTICE").unlink()
    (model / "NOTICE").symlink_to(model.parent / "secrets" / "NOTICE")
    with pytest.raises(UserError, match="outside the model directory"):
        open_source(model, "NOTICE")


def test_only_files_that_a_release_needs_are_copied(model: Path, tmp_path: Path) -> None:
    before = resolve_model(str(model), None, False).revision
    for name in (
        "trainer_state.json",
        "credentials.json",
        "adapter_config.json",
        "other.jinja",
        "model_ema.safetensors",
    ):
        (model / name).write_text("{}")
    assert resolve_model(str(model), None, False).revision == before
    (tmp_path / "target").mkdir()
    download(tmp_path / "target", str(model), before, False)
    names = {path.name for path in BUILTIN["tiny-gemma3"].iterdir()} - {"README.md"}
    assert {path.name for path in (tmp_path / "target").iterdir()} == names


def test_only_weights_that_transformers_would_read_are_fetched_from_a_repository(model: Path, tmp_path: Path) -> None:
    first, second = shard(model)
    shutil.copy(first, model / "model_ema.safetensors")
    (model / "credentials.json").write_text("{}")
    with serve(tmp_path / "hub", {}) as hub:
        sha = hub.add("model", "team/tiny", model)
        target = tmp_path / "store" / "download" / ".partial-x" / "data"
        target.mkdir(parents=True)
        values = {"source": "team/tiny", "revision": sha, "offline": False}
        call = {
            "function": "quantize_gemma.tasks.download:download",
            "target": str(target),
            "paths": {},
            "values": values,
        }
        worker.run(
            "quantize_gemma.tasks.runtime.worker_main:call", call, lambda *_: None, None, {"HF_ENDPOINT": hub.url}
        )
    names = {path.name for path in target.iterdir()}
    assert {first.name, second.name, "model.safetensors.index.json"} <= names
    assert not names & {"model_ema.safetensors", "credentials.json"}
    assert read_headers(target) == read_headers(model)


# Which weights are read.


def test_a_second_safetensors_file_next_to_the_model_is_not_read(model: Path, tmp_path: Path) -> None:
    header, data = read_raw_header(model / "model.safetensors")
    write_raw_header(model / "model_ema.safetensors", header, bytes(len(data)))
    assert [path.name for path in weight_files(model)] == ["model.safetensors"]
    assert {tensor.file for tensor in read_headers(model).values()} == {"model.safetensors"}
    # A file that an index names is not read either if model.safetensors exists.
    weight_map = dict.fromkeys(header.keys() - {"__metadata__"}, "model_ema.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert [path.name for path in weight_files(model)] == ["model.safetensors"]
    check(model)
    (tmp_path / "untied").mkdir()
    untie(tmp_path / "untied", model)
    untied = read_headers(tmp_path / "untied")
    assert {tensor.file for tensor in untied.values()} == {"model-base.safetensors", "lm_head.safetensors"}
    assert not (tmp_path / "untied" / "model_ema.safetensors").exists()


def test_files_without_an_index_that_transformers_would_not_read_are_rejected(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    check_rejected(model, "'weights.safetensors'", "model.safetensors.index.json", "save_pretrained")


def test_a_weight_that_two_files_have_is_rejected(model: Path) -> None:
    first, second = shard(model)
    shutil.copy(first, second)
    check_rejected(model, "is in two files")


def test_two_names_of_one_loaded_weight_are_rejected(model: Path) -> None:
    header, data = read_raw_header(model / "model.safetensors")
    begin, end = header[EMBEDDING]["data_offsets"]
    other = {**header[EMBEDDING], "data_offsets": [len(data), len(data) + end - begin]}
    header["model.language_model.embed_tokens.weight"] = other
    write_raw_header(model / "model.safetensors", header, data + bytes(end - begin))
    check_rejected(model, "is the same weight as", EMBEDDING)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["weight_map"].update({EMBEDDING: "../model.safetensors"}), ["'../model.safetensors'"]),
        (lambda index: index["weight_map"].update({EMBEDDING: "/etc/passwd"}), ["'/etc/passwd'"]),
        (lambda index: index["weight_map"].update({EMBEDDING: "pytorch_model.bin"}), ["'pytorch_model.bin'"]),
        (lambda index: index["weight_map"].update({EMBEDDING: None}), [EMBEDDING, "None"]),
        (lambda index: index["weight_map"].update({EMBEDDING: "a\0.safetensors"}), ["\\x00"]),
        (lambda index: index["weight_map"].update({EMBEDDING: "model-3.safetensors"}), ["model-3", "missing"]),
        (
            lambda index: index["weight_map"].update({"more": "model-00001-of-00002.safetensors"}),
            ["do not agree", "more"],
        ),
        (lambda index: index["weight_map"].pop(EMBEDDING), ["do not agree", EMBEDDING]),
        (lambda index: index.update(weight_map=[]), ["weight_map"]),
        (lambda index: index.update(weight_map={}), ["weight_map"]),
        (lambda index: index.pop("metadata"), ["metadata"]),
    ],
)
def test_a_wrong_index_is_rejected(model: Path, change: Callable[[dict[str, Any]], object], words: list[str]) -> None:
    shard(model)
    edit_json(model / "model.safetensors.index.json", change)
    check_rejected(model, "safetensors", *words)


def tensor(**changes: Any) -> Callable[[dict[str, Any]], object]:
    """Return a function that changes the embedding's entry in a header."""
    return lambda header: header[EMBEDDING].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (tensor(dtype="F8_E4M3"), ["unsupported dtype", "F8_E4M3", EMBEDDING, "bfloat16"]),
        (tensor(dtype="I8", shape=[2048, 128]), ["I8", EMBEDDING, "unquantized"]),
        (tensor(dtype=None), ["dtype", EMBEDDING]),
        (tensor(shape="2048"), ["shape", EMBEDDING]),
        (tensor(shape=[2048, 64.0]), ["shape", EMBEDDING]),
        (tensor(shape=[2048, 64, True]), ["shape", EMBEDDING]),
        (tensor(shape=[-2048, -64]), ["shape", EMBEDDING]),
        (tensor(shape=[1, 2048, 64]), ["no embed_tokens"]),
        (tensor(data_offsets=[0.0, 262144.0]), ["data_offsets", EMBEDDING]),
        (tensor(data_offsets=[0]), ["data_offsets", EMBEDDING]),
        (tensor(data_offsets={"0": 0}), ["data_offsets", EMBEDDING]),
        (tensor(more=1), [EMBEDDING, "exactly dtype, shape, and data_offsets"]),
        (lambda header: header.update({EMBEDDING: 5}), [EMBEDDING, "exactly"]),
        (lambda header: header.update({"__metadata__": {"format": 1}}), ["metadata"]),
        (lambda header: header.update({"a\nb": header.pop(EMBEDDING)}), ["control characters"]),
    ],
)
def test_a_wrong_header_is_rejected(model: Path, change: Callable[[dict[str, Any]], object], words: list[str]) -> None:
    header, data = read_raw_header(model / "model.safetensors")
    change(header)
    write_raw_header(model / "model.safetensors", header, data)
    check_rejected(model, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"7", ["not a JSON object"]),
        (b"[" * 100_000, ["nested too deeply"]),
        (b"\xff\xfe", ["truncated or corrupt"]),
        (b'{"a": NaN}', ["NaN"]),
        (b'{"a": {}, "a": {}}', ["'a' twice"]),
    ],
)
def test_a_header_that_is_not_an_object_is_rejected(model: Path, text: bytes, words: list[str]) -> None:
    write_raw_header(model / "model.safetensors", text, b"")
    check_rejected(model, "model.safetensors", "truncated or corrupt", *words)


def test_a_header_longer_than_safetensors_allows_is_rejected(model: Path) -> None:
    with (model / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 2 * 10**8))
        stream.truncate(3 * 10**8)
    check_rejected(model, "longer", "safetensors allows")


def test_overlapping_tensors_and_gaps_are_rejected_as_in_safetensors(tmp_path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    def file(*extents: tuple[int, int], size: int) -> Path:
        header = {
            f"t{n}": {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
            for n, (begin, end) in enumerate(extents)
        }
        write_raw_header(tmp_path / "file.safetensors", header, bytes(size))
        return tmp_path / "file.safetensors"

    for extents, size in (
        ([(0, 8), (4, 12)], 12),
        ([(0, 4), (8, 12)], 12),
        ([(4, 12)], 12),
        ([(0, 8), (0, 8)], 8),
        ([(0, 8)], 9),
        ([(0, 8)], 7),
    ):
        path = file(*extents, size=size)
        with pytest.raises(SafetensorError), safe_open(str(path), framework="pt"):
            pass
        with pytest.raises(UserError, match="truncated or corrupt"):
            read_header(path)
    with safe_open(str(file((0, 8), (8, 8), (8, 12), size=12)), framework="pt") as good:
        assert sorted(good.keys()) == sorted(read_header(tmp_path / "file.safetensors"))


# Which values config.json and the files next to it may have.


def setting(name: str, value: Any, *, of: str | None = None) -> Callable[[dict[str, Any]], object]:
    return lambda config: (config[of] if of else config).update({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (setting("architectures", 5), ["architectures", "5"]),
        (setting("architectures", [5]), ["5", "not Gemma 3"]),
        (setting("architectures", None), ["gemma3", "not Gemma 3"]),
        (setting("model_type", "llama"), ["model_type", "'llama'"]),
        (setting("text_config", None), ["text_config", "None"]),
        (setting("text_config", []), ["text_config", "[]"]),
        (setting("vision_config", None), ["vision_config"]),
        (setting("mm_tokens_per_image", "16"), ["mm_tokens_per_image", "'16'"]),
        (setting("mm_tokens_per_image", None), ["mm_tokens_per_image", "None"]),
        (setting("quantization_config", "fp8"), ["quantized already"]),
        (setting("transformers_weights", "other.safetensors"), ["transformers_weights"]),
        (setting("hidden_size", "64", of="text_config"), ["text_config.hidden_size", "'64'"]),
        (setting("hidden_size", 65, of="text_config"), ["shape", "65", "different models"]),
        (setting("hidden_size", 10**12, of="text_config"), ["text_config.hidden_size", "10000000"]),
        (setting("num_hidden_layers", 9_999_999, of="text_config"), ["layers, but there are only 80 weights"]),
        (setting("num_key_value_heads", 0, of="text_config"), ["num_key_value_heads", "0"]),
        (setting("num_key_value_heads", 3, of="text_config"), ["num_key_value_heads must divide"]),
        (setting("sliding_window", None, of="text_config"), ["sliding_window", "None"]),
        (setting("max_position_embeddings", 1e9, of="text_config"), ["max_position_embeddings"]),
        (setting("max_position_embeddings", True, of="text_config"), ["max_position_embeddings"]),
        (setting("layer_types", ["full_attention"], of="text_config"), ["config.json", "layer types"]),
        (setting("hidden_activation", "no such", of="text_config"), ["config.json", "no such"]),
        (setting("rope_parameters", {"full_attention": 5}, of="text_config"), ["config.json"]),
        (setting("attn_logit_softcapping", 50.0, of="text_config"), ["config.json", "attn_logit_softcapping"]),
        (setting("final_logit_softcapping", 30.0, of="text_config"), ["config.json", "final_logit_softcapping"]),
        (setting("attention_bias", True, of="text_config"), ["config.json", "attention_bias"]),
        (setting("mm_tokens_per_image", 9), ["an image is", "mm_tokens_per_image"]),
        (setting("tie_word_embeddings", False), ["lm_head.weight", "tie_word_embeddings"]),
        (setting("patch_size", 7, of="vision_config"), ["vision_config", "patch_size must divide"]),
    ],
)
def test_a_wrong_configuration_is_rejected(model: Path, change: Any, words: list[str]) -> None:
    edit_json(model / "config.json", change)
    check_rejected(model, *words)


def test_a_null_quantization_config_means_unquantized(model: Path) -> None:
    edit_json(model / "config.json", setting("quantization_config", None))
    check(model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, ["nested too deeply"]),
        ("7", ["not a JSON object"]),
        ("", ["cannot be read"]),
        ('{"rms": NaN}', ["NaN"]),
        ('{"rms": 1e999}', ["1e999"]),
        ('{"a": "\\ud800"}', ["not UTF-8"]),
        ('{"a": 1' + "0" * 5000 + "}", ["cannot be read"]),
        ('{"model_type": "gemma3", "model_type": "llama"}', ["'model_type' twice"]),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_json_that_libraries_read_in_different_ways_is_rejected(
    model: Path, name: str, text: str, words: list[str]
) -> None:
    (model / name).write_text(text)
    check_rejected(model, name, *words)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("generation_config.json", '{"eos_token_id": "1"}', ["eos_token_id"]),
        ("tokenizer.json", "{}", ["tokenizer.json", "no vocabulary"]),
        ("chat_template.jinja", "{% for %}", ["Template"]),
        ("processor_config.json", '{"processor_class": "Qwen2VLProcessor"}', ["transformers cannot read"]),
    ],
)
def test_what_transformers_cannot_read_is_reported_before_a_stage_needs_it(
    model: Path, name: str, text: str, words: list[str]
) -> None:
    (model / name).write_text(text)
    check_rejected(model, *words)


def test_a_checkpoint_without_a_tokenizer_is_rejected(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    check_rejected(model, "tokenizer.json", "save_pretrained")


def test_a_tokenizer_with_huge_token_ids_is_rejected(model: Path) -> None:
    edit_json(model / "tokenizer.json", lambda value: value["model"]["vocab"].update({"more": 2**32 - 1}))
    check_rejected(model, "tokenizer.json", "consecutive token ids")


def test_a_tokenizer_of_another_model_is_rejected(model: Path) -> None:
    header, data = read_raw_header(model / "model.safetensors")
    rows = 64
    begin, end = header[EMBEDDING]["data_offsets"]
    cut = end - begin - rows * (end - begin) // header[EMBEDDING]["shape"][0]
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - cut for offset in entry["data_offsets"]]
    header[EMBEDDING] |= {"shape": [rows, 64], "data_offsets": [begin, end - cut]}
    write_raw_header(model / "model.safetensors", header, data[: end - cut] + data[end:])
    edit_json(model / "config.json", setting("vocab_size", rows, of="text_config"))
    check_rejected(model, "tokenizer", "outside the model's vocabulary")


WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}<bos>"


def test_a_chat_template_without_a_system_role_is_valid_and_recorded_for_chartqa(model: Path, tmp_path: Path) -> None:
    """Only ChartQA needs the role, so a text-only model does not."""
    text_only = write_text_only(model, tmp_path / "text-only")
    assert check_directory(str(model)) == {"system_message": True}
    for checkpoint in (text_only, model):
        (checkpoint / "chat_template.jinja").write_text(WITHOUT_SYSTEM)
    assert check_directory(str(text_only)) == {"system_message": True}
    assert check_directory(str(model)) == {"system_message": False}
    (tmp_path / "target").mkdir()
    output: Any = download(tmp_path / "target", str(model), resolve_model(str(model), None, False).revision, False)
    assert output["metadata"]["system_message"] is False


def test_a_chat_template_that_takes_only_text_is_rejected_for_a_model_with_images(model: Path, tmp_path: Path) -> None:
    text_only = write_text_only(model, tmp_path / "text-only")
    for checkpoint in (text_only, model):
        (checkpoint / "chat_template.jinja").write_text("{{ '<bos>' + messages[0]['content'] }}")
    check(text_only)
    check_rejected(model, f"transformers cannot read the chat template of {model} (TypeError: ")
