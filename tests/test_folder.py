"""From folder to folder: killed and gone on with, refused, streamed: always the same bytes."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from hf_catquant import CatQuantConfig, folder, installing, mixed, pipeline, quantize_folder, threads, walk
from hf_catquant.checkpoint import weight_files
from hf_catquant.integrity import sha256
from hf_catquant.journal import open_journal
from hf_catquant.planning import plan_model
from hf_catquant.walk import Walk

RECONSTRUCT = {
    "solver": "reconstruct",
    "correction": ["blocks", "logits"],
    "solver_options": {"block_steps": 3, "model_steps": 4},
}
ROUND = {"solver": "rtn", "correction": None}


@pytest.fixture
def source(tmp_path):
    return Path(tiny_models.folder_of("llama_tied", str(tmp_path / "float")))


@pytest.fixture(autouse=True)
def everything_streams(monkeypatch):
    monkeypatch.setitem(folder.open_on_shelf.__kwdefaults__, "least", 1)


def request(name="llama_tied", **fields):
    fields = {"group_size": 16, "batch_size": 4, **fields}
    if fields.get("solver") != "rtn":
        fields.setdefault("dataset", tiny_models.samples(name, 12))
    return CatQuantConfig(**fields)


def digests(out):
    return {path.name: sha256(path) for path in sorted(out.iterdir())}


def run_killer(tmp_path, **request):
    command = [sys.executable, str(Path(__file__).with_name("kill_runner.py")), str(tmp_path), json.dumps(request)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_killed_after_each_block_it_gives_the_same_bytes(tmp_path):
    found = run_killer(tmp_path, model="llama_tied", config={}, points="steps")
    assert found == {"points": 4, "steps": 4, "different": [], "left": []}


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("llama_tied", RECONSTRUCT),
        ("llama", ROUND),
        ("bert", {"average_bits": 7.0, "low_rank": 2}),
        ("resnet", {"activations": "int4"}),
        ("whisper", {}),
    ],
)
def test_killed_at_any_flush_it_gives_the_same_bytes(tmp_path, model, config, threads):
    found = run_killer(tmp_path, model=model, config=config, points="all", threads=threads)
    assert found["points"] > 10
    assert (found["different"], found["left"]) == ([], [])


@pytest.mark.parametrize(
    ("name", "kept"), [("llama_tied", None), ("resnet", None), ("llama", 0), ("bert", None), ("vit", None)]
)
def test_streamed_or_whole_the_bytes_are_the_same(tmp_path, name, kept, monkeypatch):
    """Also where the answers are too large to keep while the weights that make them are put away."""
    source = tiny_models.folder_of(name, str(tmp_path / "float"))
    learned = {} if kept is None else {k: v for k, v in RECONSTRUCT.items() if k != "correction"}
    if name in ("bert", "vit"):  # they are here for their weights, which lie in the file as no weight in memory does
        learned = {"correction": None, "solver_options": {}, "rotation": None, "dataset": tiny_models.samples(name, 4)}
    for stream in (True, False):
        with monkeypatch.context() as patch:
            if stream and kept is not None:
                patch.setattr(walk, "KEPT_BYTES", kept)
            out = tmp_path / str(stream)
            quantize_folder(source, out, request(name, **learned), stream=stream, dtype=torch.float32)
        assert not (tmp_path / f"{stream}.journal").exists()
    assert digests(tmp_path / "True") == digests(tmp_path / "False")


def bytes_by_threads(tmp_path, name, counts=(1, 2), **fields):
    """Digests of ``name`` quantized with each of these numbers of threads."""
    source = tiny_models.folder_of(name, str(tmp_path / "float"))
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            quantize_folder(source, tmp_path / str(count), request(name, **fields))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    return [digests(tmp_path / str(count)) for count in counts]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("wav2vec2", {}),  # weight norms and convolutions
        ("mobilenet_v2", {}),
        ("convnext", {"low_rank": 2}),
        ("bert", {**RECONSTRUCT, "correction": None}),  # gradients of layer norms
    ],
)
def test_one_and_two_threads_give_the_same_bytes(tmp_path, name, fields):
    one, two = bytes_by_threads(tmp_path, name, **fields)
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"low_rank": 2}, {"activations": "int4"}, {**RECONSTRUCT, "correction": None}])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_any_architecture_gives_the_same_bytes_with_any_number_of_threads(tmp_path, name, fields):
    one, *others = bytes_by_threads(tmp_path, name, (1, 2, 4), **fields)
    assert all(other == one for other in others)


def test_a_larger_model_runs_on_all_threads_and_gives_the_same_bytes(tmp_path, monkeypatch):
    """With products beside the codes of convolutions, whose positions torch's own convolutions add up by threads."""
    monkeypatch.setattr(threads, "SMALL", 0)
    one, two = bytes_by_threads(tmp_path, "resnet", low_rank=2)
    assert one == two


def interrupted(source, out, config, monkeypatch, after=2, **more):
    """A run that fails in the middle; its journal stays."""
    write, count = folder.Journal.write, [0]

    def failing(self, *args):
        write(self, *args)
        count[0] += 1
        if count[0] == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder.Journal, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            quantize_folder(source, out, config, **more)


def test_going_on_with_something_else_is_refused(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    interrupted(source, out, request(), monkeypatch)
    with pytest.raises(ValueError, match="--resume goes on with it"):
        quantize_folder(source, out, request())
    with pytest.raises(ValueError, match=r"config.seed = 0, this one has 1"):
        quantize_folder(source, out, request(seed=1), resume=True)
    with pytest.raises(ValueError, match=r'config.dtype = "torch.float32", this one has "torch.bfloat16"'):
        quantize_folder(source, out, request(), resume=True, dtype=torch.bfloat16)
    other = tiny_models.samples("llama_tied", 12, seed=5)
    with pytest.raises(ValueError, match=r"data, 4 a batch = "):
        quantize_folder(source, out, request(dataset=other), resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "source_digest", lambda: "another")
        with pytest.raises(ValueError, match=r"versions.source = "):
            quantize_folder(source, out, request(), resume=True)
    weights = source / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"weights.model.safetensors = "):
        quantize_folder(source, out, request(), resume=True)
    weights.write_bytes(kept)
    assert not out.exists()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(
            ValueError, match=rf"threads = {before}, this one has {before + 1}: .* OMP_NUM_THREADS={before} "
        ):
            quantize_folder(source, out, request(), resume=True)
    finally:
        torch.set_num_threads(before)
    quantize_folder(source, out, request(), resume=True)
    quantize_folder(source, tmp_path / "whole", request())
    assert digests(out) == digests(tmp_path / "whole")


def test_a_search_for_formats_loses_no_layer_that_was_tried(tmp_path, source, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("hf_catquant"), "propagate", True)
    out, tried, alone = tmp_path / "out", [], mixed.Losses.alone
    monkeypatch.setattr(
        mixed.Losses, "alone", lambda self, site, name: tried.append((site.name, name)) or alone(self, site, name)
    )
    data = {"dataset": tiny_models.samples("llama_tied", 2), "modules_to_not_convert": ["model.layers.1"]}
    config = request(weights="int4", average_bits=7.0, **data, **ROUND)
    interrupted(source, out, config, monkeypatch, after=3)
    assert len({site for site, _ in tried}) == 3
    assert "mixed formats: 7 layers are tried in int4, int8 each" in caplog.text.splitlines()[0]
    assert [line for line in caplog.text.splitlines() if "[2/7] model.layers.0.self_attn.k_proj: tried in" in line]
    steps = sorted(path.name for path in (tmp_path / "out.journal").glob("*.safetensors"))
    assert steps == [f"formats-000{number}.safetensors" for number in range(3)]
    before = tried.copy()
    quantize_folder(source, out, config, resume=True)
    assert not {*before} & {*tried[len(before) :]}
    quantize_folder(source, tmp_path / "whole", config)
    assert digests(out) == digests(tmp_path / "whole")
    assert not (tmp_path / "out.journal").exists()


def test_what_was_tried_on_batches_of_another_size_is_tried_again(tmp_path):
    journal, calls = open_journal(tmp_path / "journal", resume=False), []
    site = SimpleNamespace(name="layer")
    for size, count in ((8, 1), (8, 1), (4, 2), (4, 2)):
        found = pipeline._journaled(journal, size, 0, site, lambda: calls.append(0) or {"int4": 0.1 + len(calls)})
        assert found == {"int4": 0.1 + count}
    journal.close()


TOY = """
from transformers import LlamaConfig, LlamaForCausalLM
class ToyConfig(LlamaConfig):
    model_type = "catquant_toy"
class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)
"""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_going_on_with_other_code_of_the_model_is_refused(tmp_path, source, monkeypatch, elsewhere):
    home = tmp_path / "code_of_catquant_toy" if elsewhere else source
    home.mkdir(exist_ok=True)
    (home / "modeling_toy.py").write_text(TOY)
    config = json.loads((source / "config.json").read_text())
    prefix = f"{home}--" if elsewhere else ""
    config["auto_map"] = {
        "AutoConfig": f"{prefix}modeling_toy.ToyConfig",
        "AutoModelForCausalLM": f"{prefix}modeling_toy.ToyForCausalLM",
    }
    config |= {"model_type": "catquant_toy", "architectures": ["ToyForCausalLM"]}
    (source / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    interrupted(source, out, request(**ROUND), monkeypatch, trust_remote_code=True)
    (home / "modeling_toy.py").write_text(TOY.replace("return super", "return  super"))
    with pytest.raises(ValueError, match=r'begun with code.*modeling_toy\.py = "'):
        quantize_folder(source, out, request(**ROUND), resume=True, trust_remote_code=True)
    (home / "modeling_toy.py").write_text(TOY)
    quantize_folder(source, out, request(**ROUND), resume=True, trust_remote_code=True)


def test_going_on_with_another_tokenizer_is_refused(tmp_path, source, monkeypatch):
    class Processor:
        def __call__(self, sample):
            return sample

        def save_pretrained(self, folder):
            shutil.copy(source / "tokenizer.json", folder)

    (source / "tokenizer.json").write_text("{}")
    config, out = request(processor=Processor(), **ROUND), tmp_path / "out"
    interrupted(source, out, config, monkeypatch)
    (source / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=r"begun with files\.tokenizer\.json = "):
        quantize_folder(source, out, config, resume=True)


def test_a_tokenizer_of_another_model_does_not_stay(tmp_path, source, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_catquant"), "propagate", True)
    out = tmp_path / "out"
    (out / "additional_chat_templates").mkdir(parents=True)
    for name in ("vocab.json", "tokenizer.json", "generation_config.json", "additional_chat_templates/a.jinja"):
        (out / name).write_text("of another model")
    (out / "vocab.json").write_text("its own")
    (source / "vocab.json").write_text("its own")
    (source / "generation_config.json").unlink()
    kept = ("notes.txt", "template.jinja", "my_vocab.json", "README.md")
    kept += (
        "mine.spm",
        "dict.txt",
        "model_backup.safetensors",
        "model-lora-rank8.safetensors",
        "model.fp16.safetensors",
    )
    (out / "model-00001-of-00002.safetensors").write_text("of another model")
    for name in kept:
        (out / name).write_text("mine")
    quantize_folder(source, out, request(**ROUND), overwrite=True)
    assert (out / "vocab.json").read_text() == "its own"
    assert all((out / name).read_text() == "mine" for name in kept)
    assert not (out / "tokenizer.json").exists()
    assert not (out / "additional_chat_templates" / "a.jinja").exists()
    for name in ("tokenizer.json", "model-00001-of-00002.safetensors"):
        assert not (out / name).exists()
        assert f"{out / name} is removed" in caplog.text
    assert (
        not (out / "generation_config.json").exists()
        or "of another" not in (out / "generation_config.json").read_text()
    )


def custom(source):
    """Make of a folder one whose model brings its code; what it holds besides."""
    (source / "modeling_toy.py").write_text(TOY)
    config = json.loads((source / "config.json").read_text())
    remote = {"AutoConfig": "modeling_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}
    config |= {"model_type": "catquant_toy", "architectures": ["ToyForCausalLM"], "auto_map": remote}
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize("killed", [False, True])
def test_code_of_another_model_does_not_stay(tmp_path, source, caplog, monkeypatch, killed):
    monkeypatch.setattr(logging.getLogger("hf_catquant"), "propagate", True)
    toy, out = custom(Path(shutil.copytree(source, tmp_path / "toy"))), tmp_path / "out"
    quantize_folder(toy, out, request(**ROUND), trust_remote_code=True)
    assert json.loads((out / "report.json").read_text())["code"] == {
        "modeling_toy.py": sha256(out / "modeling_toy.py")
    }
    quantize_folder(toy, out, request(**ROUND), overwrite=True, trust_remote_code=True)
    assert (out / "modeling_toy.py").is_file()  # its own
    (out / "mine.py").write_text("")
    if killed:  # when the files of the other model are replaced already
        with monkeypatch.context() as patch:
            patch.setattr(installing, "_drop_measured", lambda out: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                quantize_folder(source, out, request(**ROUND), overwrite=True)
    quantize_folder(source, out, request(**ROUND), overwrite=not killed, resume=killed)
    assert not (out / "modeling_toy.py").exists()
    assert (out / "mine.py").exists()
    assert f"{out / 'modeling_toy.py'} is removed: it is not of the model that is in this folder now" in caplog.text
    assert "code" not in json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("change", ["code", "report", "config", "source"])
def test_code_that_may_be_anybodys_stays(tmp_path, source, change):
    toy, out = custom(Path(shutil.copytree(source, tmp_path / "toy"))), tmp_path / "out"
    quantize_folder(toy, out, request(**ROUND), trust_remote_code=True)
    if change == "code":
        (out / "modeling_toy.py").write_text("# mine")
    elif change == "source":
        shutil.copy(out / "modeling_toy.py", source)
    else:
        (out / f"{change}.json").unlink()
    quantize_folder(source, out, request(**ROUND), overwrite=True)
    assert (out / "modeling_toy.py").exists()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"),
            r"no tensor model\.layers\.0\.self_attn\.q_proj\.wei",
        ),
        (lambda t: t.pop("model.norm.weight"), r"no tensor model\.norm\.weight, which LlamaForCausalLM reads"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(7)}),
            r"other shapes .* model\.norm\.weight \(\[7\] instead of \[32\]\)",
        ),
    ],
)
def test_random_numbers_are_never_quantized(tmp_path, source, stream, edit, words):
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        quantize_folder(source, tmp_path / "out", request(**ROUND), stream=stream)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_what_only_training_reads_may_be_missing(tmp_path):
    path = tiny_models.folder_of("wav2vec2", str(tmp_path / "float"))
    tensors = load_file(f"{path}/model.safetensors")
    tensors.pop("wav2vec2.masked_spec_embed")
    save_file(tensors, f"{path}/model.safetensors", metadata={"format": "pt"})
    for stream in (True, False):
        folder.open_source(path, torch.float32, stream, False)


def test_one_file_comes_before_an_index_as_in_transformers(tmp_path, source):
    index = {"metadata": {}, "weight_map": {"x": "old.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(source) == [source / "model.safetensors"]
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'old.safetensors' is no safetensors file of this folder"):
        weight_files(source)


def test_once_all_is_written_something_else_is_refused_too(tmp_path, source, monkeypatch):
    """Killed between writing the output and putting it in its place."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(folder, "install", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize_folder(source, out, request())
    other = tiny_models.samples("llama_tied", 12, seed=5)
    for config, words in (
        (request(seed=1), r"config.seed = 0, this one has 1"),
        (request(dataset=other), r"data, 4 a batch = "),
        (request(**ROUND), r"config.correction"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize_folder(source, out, config, resume=True)
    another = Path(tiny_models.folder_of("llama", str(tmp_path / "another")))
    with pytest.raises(ValueError, match=r"weights.config.json = "):
        quantize_folder(another, out, request(), resume=True)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(folder, "quantize", lambda *args: pytest.fail("it is quantized already"))
        model = quantize_folder(source, out, request(), resume=True)
    assert model.config.quantization_config.seed == 0
    assert not (tmp_path / "out.journal").exists()


def test_places_that_cannot_be_taken_are_refused_before_any_work(tmp_path, source, monkeypatch):
    monkeypatch.setattr(folder, "open_journal", lambda *args, **options: pytest.fail("it has begun"))
    (tmp_path / "out.journal").mkdir()
    (tmp_path / "out.journal" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for place, words in (
        ("out", "out.journal holds notes.txt, which is not a journal's"),
        ("file", "file is a file: choose another folder"),
        ("/", "/ is where a file system begins, .*: choose a folder in it"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize_folder(source, tmp_path / place, request(**ROUND), overwrite=True)
    assert (tmp_path / "out.journal" / "notes.txt").read_text() == "mine"
    (tmp_path / "adapted").mkdir()
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}")
    for options in ({"overwrite": True}, {"resume": True, "overwrite": True}):
        with pytest.raises(
            ValueError, match=r"adapted/adapter_config\.json: transformers would load .*: move the adapter"
        ):
            quantize_folder(source, tmp_path / "adapted", request(**ROUND), **options)


def test_a_link_is_followed_and_the_folder_of_work_stays(tmp_path, source, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    inode = here.stat().st_ino
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "there").mkdir()
    quantize_folder(source, tmp_path / "link", request(**ROUND))
    monkeypatch.chdir(here)
    quantize_folder(source, ".", request(**ROUND))
    assert (tmp_path / "link").is_symlink()
    assert here.stat().st_ino == inode
    assert digests(here) == digests(tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "here", "link", "there"]


def test_an_error_of_the_user_leaves_no_journal(tmp_path, source):
    with pytest.raises(ValueError, match="matches no module"):
        quantize_folder(source, tmp_path / "out", request(modules_to_not_convert=["nothing"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float"]


def test_the_output_is_not_lost_to_the_next_run(tmp_path, source):
    out = tmp_path / "out"
    quantize_folder(source, out, request(**ROUND))
    before = digests(out)
    for resume in (False, True):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            quantize_folder(source, out, request(**ROUND), resume=resume)
    with pytest.raises(ValueError, match="holds the float model"):
        quantize_folder(source, source, request(**ROUND), overwrite=True)
    (out / "model-00009-of-00009.safetensors").write_text("of an older save")
    (out / "notes.txt").write_text("mine")
    quantize_folder(source, out, request(weights="int4", **ROUND), overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "model-00009-of-00009.safetensors").exists()
    assert digests(out) != before
    tiny = folder.load_quantized(str(out))
    assert tiny.config.quantization_config.weights == "int4"


def test_a_second_run_into_one_folder_is_told(tmp_path, source):
    held = open_journal(tmp_path / "out.journal", resume=False)
    with pytest.raises(RuntimeError, match=rf"pid {os.getpid()}\) quantizes into this folder"):
        quantize_folder(source, tmp_path / "out", request(**ROUND))
    held.close()


def test_no_room_on_the_disk_is_said_before_it_begins(tmp_path, source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 1000))
    with pytest.raises(OSError, match=r"need [\d,]+ bytes, but 1,000 are free"):
        quantize_folder(source, tmp_path / "out", request(**ROUND))
    assert not (tmp_path / "out.journal").exists()


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path, source):
    """The largest file that a process may write stands for the disk: steps fit, the checkpoint does not."""
    out = tmp_path / "out"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    quantize_folder(source, tmp_path / "whole", request(**ROUND))
    resource.setrlimit(
        resource.RLIMIT_FSIZE, ((tmp_path / "whole" / "model.safetensors").stat().st_size - 100, limit[1])
    )
    try:
        with pytest.raises(OSError, match=r"cannot write .*: the file would be larger.*--resume goes on"):
            quantize_folder(source, out, request(**ROUND))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not out.exists()
    assert len(list((tmp_path / "out.journal").glob("unit-*.safetensors"))) == 4
    quantize_folder(source, out, request(**ROUND), resume=True)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_disk_that_is_really_full(tmp_path, source, monkeypatch):
    small = tmp_path / "disk"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        monkeypatch.setattr(folder, "_check_room", lambda *args: None)
        with pytest.raises(OSError, match=r"cannot write .*: the disk is full: free some space"):
            quantize_folder(source, small / "out", request(**ROUND))
        assert not (small / "out").exists()
        assert [path.name for path in (small / "out.journal").iterdir() if path.name.startswith(".")] == []
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        quantize_folder(source, small / "out", request(**ROUND), resume=True)
        quantize_folder(source, tmp_path / "whole", request(**ROUND))
        assert digests(small / "out") == digests(tmp_path / "whole")
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        with pytest.raises(OSError, match=r"cannot write .*: the file system is read-only: choose another folder"):
            quantize_folder(source, small / "again", request(**ROUND))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_batches_shrink_where_memory_runs_out(tmp_path, source, monkeypatch, caplog):
    quantize_folder(source, tmp_path / "small", request(batch_size=2))
    catch = Walk._catch

    def limited(self, index, stream, batch, until):
        if index == 2 and len(self.batches[batch]["input_ids"]) > 2:
            raise torch.OutOfMemoryError("too much")
        return catch(self, index, stream, batch, until)

    monkeypatch.setattr(Walk, "_catch", limited)
    monkeypatch.setattr(logging.getLogger("hf_catquant"), "propagate", True)
    quantize_folder(source, tmp_path / "out", request(batch_size=8))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert saved["batch_size"] == 2
    assert "out of memory with 8 samples a batch" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):  # data that can be read once
        quantize_folder(
            source, tmp_path / "once", request(batch_size=8, dataset=iter(tiny_models.samples("llama_tied", 12)))
        )


def test_without_room_for_a_draft_the_whole_model_learns_all_the_same(tmp_path, source, monkeypatch, caplog):
    learned = {k: v for k, v in RECONSTRUCT.items() if k != "correction"} | {
        "correction": None,
        "solver_options": {"block_steps": 0, "model_steps": 16},
    }
    quantize_folder(source, tmp_path / "roomy", request(**learned))
    write, drafts = folder.Journal.write, []

    def full(self, step, tensors, record):
        if step == "model-draft":
            drafts.append(sum(tensor.nbytes for tensor in tensors.values()))
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, step, tensors, record)

    monkeypatch.setattr(folder.Journal, "write", full)
    with caplog.at_level(logging.WARNING, "hf_catquant"):
        quantize_folder(source, tmp_path / "full", request(**learned))
    assert len(drafts) > 1
    assert caplog.text.count("no room for a draft") == 1
    assert digests(tmp_path / "full") == digests(tmp_path / "roomy")
    plan = plan_model(folder.open_source(source, torch.float32, True, False), request(**learned))
    assert plan.drafts == pytest.approx(2 * max(drafts), rel=0.2)
    assert "drafts" in str(plan)
