"""Makes transformers load catquant checkpoints without ``import hf_catquant``; runs when Python starts.

``hf_catquant_autoload.pth`` lies beside the installed package, so Python's ``site`` runs :func:`install` in every process:
in notebooks, servers, workers. It does nothing but put a finder in front of ``sys.meta_path`` that waits for one module,
``transformers.quantizers.auto``. When that has run, the finder leaves, and the tables of quantizers get two entries that
import ``hf_catquant`` when a catquant checkpoint is met, and not before.

A .pth file and not an entry point of ``torch.backends``: torch raises when such an entry point cannot be imported, so a
removed checkout would break ``import torch`` for everything in the environment. Here nothing that goes wrong is ever raised:
without this hook a checkpoint does not load, which is what it does without the package. ``CATQUANT_AUTOLOAD=0`` (or
``false``, ``off``, ``no``, in any case, or set to nothing) switches it off. Only the standard library is used, and of it
only what Python has loaded by then.
"""

import os
import sys

MODULE = "transformers.quantizers.auto"
METHOD = "catquant"
SWITCH = "CATQUANT_AUTOLOAD"
OFF = ("", "0", "false", "off", "no")


def install():
    """Wait for transformers, unless the environment says not to or it is there already."""
    wanted = os.environ.get(SWITCH, "1").strip().lower() not in OFF
    if wanted and not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder:
    """Finds nothing itself: asks the others for one module, and has it call :func:`offer` after it ran."""

    def find_spec(self, name, path=None, target=None):
        """The spec of ``transformers.quantizers.auto``, None for every other module."""
        if name != MODULE:
            return None
        try:
            sys.meta_path.remove(self)
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in list(sys.meta_path))), None)
            if spec is not None and hasattr(spec.loader, "exec_module"):
                spec.loader = Loader(spec.loader)
            return spec
        except Exception:  # the import goes on as if this file were not here
            return None


class Loader:
    """The loader of a module, with a call behind it."""

    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        """As the loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module):
        """As the loader does; then put the loader back and offer the quantizer."""
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            offer(module)
        except Exception:  # another transformers: then a catquant checkpoint raises, as it does without the package
            return


def offer(auto):
    """Enter the two stand-ins, unless ``hf_catquant`` has registered itself."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, LateConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, late_quantizer)


class LateConfig:
    """Stands for ``CatQuantConfig`` in transformers' table until a checkpoint asks for it."""

    @classmethod
    def from_dict(cls, *args, **kwargs):
        """``CatQuantConfig.from_dict``."""
        import hf_catquant

        return hf_catquant.CatQuantConfig.from_dict(*args, **kwargs)


def late_quantizer(*args, **kwargs):
    """``CatQuantizer(...)``: importing the package has put it into transformers' table."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    import hf_catquant  # noqa: F401  registers

    quantizer = AUTO_QUANTIZER_MAPPING[METHOD]
    if quantizer is late_quantizer:
        raise ImportError("hf_catquant did not register its quantizer: install it again")
    return quantizer(*args, **kwargs)
