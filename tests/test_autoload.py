"""Loading without ``import hf_catquant``: the file that Python runs at its start does it, and can break nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_models
from hf_catquant import CatQuantConfig

ROOT = Path(__file__).resolve().parents[1]
# As an installation does: the .pth file and what it imports lie in a folder that `site` reads.
START = f"import site, sys; site.addsitedir({str(ROOT)!r}); "
LOAD = """
import transformers
try:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
except BaseException as error:
    print("REFUSED", type(error).__name__, error)
else:
    print("LOADED", type(model.classifier).__module__)
"""


def python(code: str, *words: str, **environment: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", code, *words]
    env = {**os.environ, "CATQUANT_AUTOLOAD": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("autoload")
    config = CatQuantConfig(weights="ternary", group_size=16, solver="rtn", correction=None)
    source = tiny_models.folder_of("bert", str(root / "float"))
    model = type(tiny_models.build("bert")).from_pretrained(source, quantization_config=config)
    model.save_pretrained(root / "quantized")
    return str(root / "quantized")


def test_a_checkpoint_loads_and_an_ordinary_model_imports_nothing(folder):
    ordinary = """
import transformers
transformers.BertModel(transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
import transformers.quantizers.auto as auto
print("IMPORTED" if "hf_catquant" in sys.modules else "ABSENT", "catquant" in auto.AUTO_QUANTIZER_MAPPING)
print(type(auto.__loader__).__name__, [f for f in sys.meta_path if type(f).__module__ == "hf_catquant_autoload"])
"""
    printed = python(START + ordinary + LOAD, folder).splitlines()
    assert printed == ["ABSENT True", "SourceFileLoader []", "LOADED hf_catquant.layers.linear"]


def test_switched_off_it_fails_closed(folder):
    assert "REFUSED RuntimeError" in python(START + LOAD, folder, CATQUANT_AUTOLOAD="0")


@pytest.mark.parametrize("word", ["0", "false", "False", " OFF ", "no", "", "1", "true", "2"])
def test_the_usual_words_switch_it_off(word, monkeypatch):
    spec = importlib.util.spec_from_file_location("fresh_autoload", ROOT / "hf_catquant_autoload.py")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setenv("CATQUANT_AUTOLOAD", word)
    fresh.install()
    assert len(sys.meta_path) == (word in ("1", "true", "2"))


def test_an_installation_without_the_package_fails_closed(folder):
    gone = "sys.modules['hf_catquant'] = None\n"
    printed = python(START + gone + LOAD, folder)
    assert "REFUSED ModuleNotFoundError" in printed
    assert "hf_catquant" in printed


@pytest.mark.slow
def test_it_steps_aside_for_an_import_by_hand(folder):
    assert "LOADED" in python(START + "import hf_catquant" + LOAD, folder)
    late = "import transformers.quantizers.auto, hf_catquant" + LOAD
    assert "LOADED" in python(START + late, folder)


@pytest.mark.slow
def test_nothing_that_it_does_can_raise(folder):
    # The one of an installed package is taken out first: it would do its work beside the broken one.
    broken = f"""
import sys, importlib.util
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "hf_catquant_autoload"]
spec = importlib.util.spec_from_file_location("hf_catquant_autoload", {str(ROOT / "hf_catquant_autoload.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["hf_catquant_autoload"] = module
spec.loader.exec_module(module)
def fail(*args):
    raise MemoryError("on purpose")
module.install()
if sys.argv[2] == "offer":
    module.offer = fail
else:
    module.Loader = fail
import torch
import transformers.quantizers.auto as auto
print("catquant" in auto.AUTO_QUANTIZER_MAPPING)
"""
    for part in ("offer", "loader"):
        assert python(broken, folder, part).strip() == "False"


def test_a_missing_module_is_silent(tmp_path):
    line = (ROOT / "hf_catquant_autoload.pth").read_text()
    (tmp_path / "x.pth").write_text(line.replace("hf_catquant_autoload", "nowhere_to_be_found"))
    code = f"import site; site.addsitedir({str(tmp_path)!r}); print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_it_uses_nothing_that_python_has_not_loaded():
    spec = importlib.util.spec_from_file_location("fresh_autoload", ROOT / "hf_catquant_autoload.py")
    code = f"""
import sys
before = set(sys.modules)
exec(open({spec.origin!r}).read(), {{"__name__": "x"}})
print(sorted(set(sys.modules) - before))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
