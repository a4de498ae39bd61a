"""Where the random generators of a training process stand: torch's, CUDA's, numpy's, Python's, and a loader's own."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch

from wire.errors import CheckpointError

__all__ = ["capture", "restore"]

_PYTHON_VERSION = 3  # of what random.getstate() gives, in every Python since 3.2
_WORDS = 624  # of a Mersenne Twister's state


def capture(loader: object = None) -> dict[str, torch.Tensor]:
    """The state of all of them, as tensors by name; of ``loader``, that of every generator that it was given."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        state |= {f"cuda/{n}": s for n, s in enumerate(torch.cuda.get_rng_state_all())}
    _, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - the user's code may draw from it
    state["numpy"] = torch.tensor([*map(int, keys), int(position), int(has_gauss)], dtype=torch.int64)
    state["numpy/gauss"] = torch.tensor(float(gauss), dtype=torch.float64)
    _, words, after = random.getstate()
    state["python"] = torch.tensor(words, dtype=torch.int64)
    state["python/gauss"] = torch.tensor([] if after is None else [after], dtype=torch.float64)
    state |= {f"loader/{place}": generator.get_state() for place, generator in _generators(loader).items()}
    return state


def restore(state: Mapping[str, torch.Tensor], loader: object = None) -> None:
    """Puts all of them where :func:`capture` found them.

    Raises:
        CheckpointError: the loader has other generators than then, or a state is none.
    """
    own = _generators(loader)
    wanted = {name.removeprefix("loader/") for name in state if name.startswith("loader/")}
    if wanted != own.keys():
        raise CheckpointError(
            f"the loader had generators of its own in {sorted(wanted)}, and this one has them in {sorted(own)}"
        )
    try:
        torch.set_rng_state(state["torch"])
        cuda = [state[f"cuda/{n}"] for n in range(sum(name.startswith("cuda/") for name in state))]
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda)
        *keys, position, has_gauss = state["numpy"].tolist()
        np.random.set_state(  # noqa: NPY002 - as above
            ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy/gauss"].item())
        )
        after = state["python/gauss"].tolist()
        random.setstate((_PYTHON_VERSION, tuple(state["python"].tolist()), after[0] if after else None))
        for place, generator in own.items():
            generator.set_state(state[f"loader/{place}"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the state of a random generator cannot be restored: {error}") from error


def _generators(loader: object) -> dict[str, torch.Generator]:
    """The generators that a ``DataLoader`` and its samplers were given, by where they are."""
    batches = getattr(loader, "batch_sampler", None)
    holders = {
        "loader": loader,
        "sampler": getattr(loader, "sampler", None),
        "batch_sampler": batches,
        "batch_sampler.sampler": getattr(batches, "sampler", None),
    }
    found: dict[str, torch.Generator] = {}
    for place, holder in holders.items():
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not other for other in found.values()):
            found[place] = generator
    return found
