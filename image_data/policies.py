"""Augmentation policies: how far a training image may change, by name.

    policy = get_policy("affine", strength=0.5)

Needs no torch, so that a wrong name is told at once; ``augmentation.py`` applies a policy.
"""

import math
from dataclasses import asdict, dataclass, replace

GRID = 5  # control points of an elastic deformation, along each side


@dataclass(frozen=True)
class Policy:
    """How far an image may change; of each range its own uniform draw, either way."""

    rotation: float = 0.0  # degrees
    shift: float = 0.0  # pixels, along x and along y
    scale: float = 0.0  # part of the size
    shear: float = 0.0  # degrees
    elastic: float = 0.0  # pixels that each control point moves, along x and along y
    thickness: float = 0.0  # from the image towards its 3x3 dilation or erosion: 1 is all the way
    erase: float = 0.0  # pixels: the side of a black square somewhere in the image is at most this
    nearest: bool = False  # rotation alone, taking the nearest pixel; otherwise all of it at once, bilinear

    @property
    def draws(self) -> int:
        return 1 if self.nearest else sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """What is changed when it is not ``nearest``, and how many draws each takes, in their order."""
        wanted = {
            "affine": 5 * any((self.rotation, self.shift, self.scale, self.shear)),
            "elastic": 2 * GRID * GRID * bool(self.elastic),
            "thickness": 1 * bool(self.thickness),
            "erase": 3 * bool(self.erase),
        }
        return {name: count for name, count in wanted.items() if count}


_AFFINE = Policy(rotation=10.0, shift=1.5, scale=0.1, shear=8.0)

POLICIES = {
    "none": Policy(),
    "rotate": Policy(rotation=7.0, nearest=True),  # the specification's
    "affine": _AFFINE,
    "elastic": replace(_AFFINE, elastic=1.5),  # Simard et al. 2003, "Best practices for convolutional networks"
    "thickness": replace(_AFFINE, thickness=0.5),
    "erase": replace(_AFFINE, erase=8.0),  # Zhong et al. 2017, arXiv:1708.04896
}


# However strong a policy is made: the pen goes at most all the way, and a size does not become nothing.
_LARGEST = {"thickness": 1.0, "scale": 0.9}


def get_policy(name: str, strength: float = 1.0) -> Policy:
    """The policy ``name``, its ranges times ``strength`` up to ``_LARGEST``; a ValueError lists what is known."""
    if name not in POLICIES:
        raise ValueError(f"augment: {name!r} is not known; choose from {', '.join(POLICIES)}")
    wanted = {key: value * strength for key, value in asdict(POLICIES[name]).items() if key != "nearest"}
    return replace(POLICIES[name], **{key: min(value, _LARGEST.get(key, math.inf)) for key, value in wanted.items()})
