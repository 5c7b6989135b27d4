"""A stand-in for torchvision, which the CPU install leaves out: transformers imports it before vLLM looks at a model
that has images too. Nothing in it does anything."""

import enum
import sys
import types

__version__ = "0.99.0"


class _Module(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


for _name in ("io", "ops", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional"):
    _parent, _, _last = f"{__name__}.{_name}".rpartition(".")
    _made = sys.modules[f"{__name__}.{_name}"] = _Module(f"{__name__}.{_name}")
    _made.InterpolationMode = InterpolationMode
    setattr(sys.modules[_parent], _last, _made)
