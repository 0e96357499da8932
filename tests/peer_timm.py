"""timm's models: quantized, saved, and loaded again, by this package and inside transformers' wrapper.

timm imports torchvision, which has to fit the installed torch to the build. Where it does not import, a stand-in takes its
place: what timm's models use of it is a frozen batch norm that no model here has.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_catquant
from hf_catquant import CatConfig, CatQuantConfig, quantize
from hf_catquant.packed_model import quantized_modules
from hf_catquant.plain import load_quantized, save_quantized


class _Names(type):
    """Of classes that have every attribute: its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(ModuleType):
    """A torchvision of which every name is an empty class."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (nn.Module,), {})


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def timm_or_skip() -> Any:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        finder = _Finder()
        sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
        try:
            return importlib.import_module("timm")
        except ImportError:
            pytest.skip("timm is not installed", allow_module_level=True)
        finally:
            sys.meta_path.remove(finder)  # type: ignore[arg-type]
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
    return pytest.importorskip("timm")


timm = timm_or_skip()
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
MODELS = {
    "vision transformer": ("vit_tiny_patch16_224", VIT),
    "convolutions": ("resnet10t", {"num_classes": 5}),
    "depthwise": ("mobilenetv3_small_050", {"num_classes": 5}),
}


def build(name: str) -> nn.Module:
    kind, options = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(kind, pretrained=False, **options).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_round_trip(name: str, tmp_path: Path):
    model = build(name)
    before = model(images(4))
    data = None if name == "depthwise" else list(images(24))
    request = {
        "weights": "int4",
        "group_size": 16,
        "correction": CatConfig(num_clusters=1, alpha=1.0) if data else None,
    }
    quantize(model, CatQuantConfig(**request, dataset=data, batch_size=8, solver="gptq" if data else "rtn"))
    after = model(images(4))
    assert float((after - before).norm() / before.norm()) < 0.5
    assert hf_catquant.report(model).coverage > 90
    save_quantized(model, tmp_path / "first")
    again = load_quantized(build(name), tmp_path / "first")
    assert torch.equal(again(images(4)), after)
    save_quantized(again, tmp_path / "second")
    files = [(tmp_path / part / "model.safetensors").read_bytes() for part in ("first", "second")]
    assert files[0] == files[1]


@pytest.fixture
def without_torchvision() -> Iterator[None]:
    """transformers' wrapper of timm looks for a torchvision, of which these models use nothing."""
    importlib.import_module(
        "transformers.models.auto.image_processing_auto"
    )  # it asks for the version, if there is one
    from transformers.utils import import_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_utils, "is_torchvision_available", lambda: True)
        import_utils.is_timm_available.cache_clear()
        yield
    import_utils.is_timm_available.cache_clear()


@pytest.mark.usefixtures("without_torchvision")
def test_inside_transformers_wrapper(tmp_path: Path):
    from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

    options = {name: value for name, value in VIT.items() if name != "num_classes"}
    config = TimmWrapperConfig(architecture=MODELS["vision transformer"][0], model_args=options)
    config.num_labels = 5
    model = TimmWrapperForImageClassification(config).eval()
    quantize(model, CatQuantConfig(weights="int4", group_size=16, solver="rtn", correction=None))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert quantized_modules(again).keys() == quantized_modules(model).keys()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images(2)).logits, model(pixel_values=images(2)).logits)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "catquant"
