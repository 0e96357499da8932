"""hf_catquant: post-training binary, ternary and 2/3/4/8-bit quantization for models of the Hugging Face Hub.

Importing the package registers ``quant_method="catquant"`` with transformers.
"""

from typing import TYPE_CHECKING, Any

from .config import CatQuantConfig
from .correction import CatConfig
from .correction_file import load_correction, save_correction
from .discrimination import FEATURE_DISCRIMINATION, FeatureStatistics, feature_discrimination, stream_discrimination
from .exports import export
from .extract import extract_features
from .features import BinaryQuantizer, TernaryQuantizer
from .generate import generate_samples
from .plugin import fit_correction
from .quantizer import quantize
from .registration import register
from .report import report
from .version import __version__

if TYPE_CHECKING:
    from .folder import quantize_folder

register()

__all__ = [
    "FEATURE_DISCRIMINATION",
    "BinaryQuantizer",
    "CatConfig",
    "CatQuantConfig",
    "FeatureStatistics",
    "TernaryQuantizer",
    "__version__",
    "export",
    "extract_features",
    "feature_discrimination",
    "fit_correction",
    "generate_samples",
    "load_correction",
    "quantize",
    "quantize_folder",
    "report",
    "save_correction",
    "stream_discrimination",
]


def __getattr__(name: str) -> Any:
    # It brings the library that reads data files, which takes longer to import than all the rest.
    if name == "quantize_folder":
        from .folder import quantize_folder

        return quantize_folder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
